"""The documents that a run learned from, kept in its folder as data/NAME.npz.

A resumed run uses the tokens that it began with, whatever a chat template or a tokenizer's library would write today. The
source itself is compared by the sha256 of its records, and may be gone.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dylora_mlx.config import Config, DataConfig, Source
from dylora_mlx.data import skills, stream
from dylora_mlx.data.rendering import SkillFormat
from dylora_mlx.data.stream import Skill
from dylora_mlx.data.tokenized import TokenizedSource
from dylora_mlx.errors import UserError
from dylora_mlx.system import console
from dylora_mlx.system.files import atomic_write

FOLDER = "data"
"""Folder in a run folder."""
RECORDS = "records:"
"""Prefix of a digest of records. A digest without it is one of training tokens, by version 0.1.0."""
FILE_BYTES = 6000
"""Approximate bytes of a file beside its documents: options, and the headers of its arrays."""
_SOURCE_KEYS = [entry.name for entry in fields(Source) if entry.name not in ("name", "source", "rank", "alpha")]
_DATA_KEYS = ("validation_fraction", "test_fraction", "chat_template")


class KeptSource(NamedTuple):
    """The documents of one source as a run stores them, with the options that they depend on."""

    documents: TokenizedSource
    format: SkillFormat
    """Form that the source was learned in."""
    options: dict[str, Any]
    """Options other than the default that the documents depend on, by full name."""
    max_seq_length: int
    """Tokens in a row of the run, at which documents are cut."""

    def num_bytes(self) -> int:
        """Return the approximate size of the file."""
        documents = [document for split in self.documents.splits.values() for document in split]
        return sum(8 + 5 * len(document.tokens) for document in documents) + FILE_BYTES

    def skill(self, source: Source, data: DataConfig, tokenizer: Any) -> Skill:
        """Return the skill of these documents."""
        skill = stream.make_skill(source, self.documents, data, tokenizer)
        return replace(skill, format=self.format)


def keep(source: Source, documents: TokenizedSource, form: SkillFormat, config: Config) -> KeptSource:
    """Return the documents and options that a run stores for a source that was just read."""
    return KeptSource(documents, form, _options(source, config), config.data.max_seq_length)


def _options(source: Source, config: Config) -> dict[str, Any]:
    """Return the options that the documents depend on, as JSON values; only those that are not the default."""
    values = {name: getattr(source, name) for name in _SOURCE_KEYS}
    values |= {f"data.{name}": getattr(config.data, name) for name in _DATA_KEYS}
    default = Source(name="default", source="default"), DataConfig()
    defaults = {name: getattr(default[0], name) for name in _SOURCE_KEYS}
    defaults |= {f"data.{name}": getattr(default[1], name) for name in _DATA_KEYS}
    chosen = {name: value for name, value in values.items() if value != defaults[name]}
    return json.loads(json.dumps(chosen | {"seed": config.seed}))


def path_of(run: Path, name: str) -> Path:
    """Return the file of a skill's or domain's documents in a run folder."""
    return run / FOLDER / f"{name}.npz"


def write(run: Path, name: str, kept: KeptSource) -> None:
    """Write the documents of a source into a run folder. Raises OSError."""
    info = {"format": str(kept.format), "options": kept.options, "max_seq_length": kept.max_seq_length}
    arrays = kept.documents.to_arrays() | {"run": np.array(json.dumps(info, sort_keys=True))}
    path = path_of(run, name)
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as temporary:
        np.savez(temporary, **arrays)  # type: ignore[arg-type]


def read(content: Path | bytes, vocab_size: int) -> KeptSource:
    """Read a file that `write` wrote, given its path or its content.

    Raises OSError, or ValueError for a damaged file and for token ids that the base has no embedding of.
    """
    try:
        with open(content, "rb") if isinstance(content, Path) else io.BytesIO(content) as file:
            if any(member.compress_type != zipfile.ZIP_STORED for member in zipfile.ZipFile(file).infolist()):
                raise ValueError("compressed arrays")  # a small file of these may hold any amount of data
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                documents = TokenizedSource.from_arrays(arrays)
                info = json.loads(str(arrays["run"]))
        form = SkillFormat.parse(info["format"])
        if form is None or not isinstance(info["options"], dict) or type(info["max_seq_length"]) is not int:
            raise ValueError("the description of its documents")
    except OSError:
        raise
    except Exception as error:  # a damaged archive raises errors of many types
        raise ValueError(f"damaged ({type(error).__name__})") from error
    if not all(documents.splits.values()):
        raise ValueError("damaged (a split without documents)")
    if max(int(document.tokens.max()) for split in documents.splits.values() for document in split) >= vocab_size:
        raise ValueError("damaged (a token that the base does not have)")
    return KeptSource(documents, form, info["options"], info["max_seq_length"])


def digest_of(skill: Skill) -> str:
    """Return the digest of a skill's records, as a run stores it."""
    return RECORDS + skill.digest


@dataclass
class RunSources:
    """Reads the sources of a run, or the documents that it kept of them."""

    run: Path | None = None
    """The run folder; None for a run that begins now."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Digests by skill or domain from the run's checkpoint; empty without a checkpoint."""
    resuming: bool = False
    """Whether the run is resumed and still trains on these sources. False for a finished run."""
    received: Mapping[str, bytes] | None = None
    """Contents of the kept files by name, on a rank that got them from rank 0; None to read the run folder."""
    new: dict[str, KeptSource] = field(default_factory=dict)
    """Sources, by name, that the run folder does not have yet. `write_new` writes them."""
    num_bytes: int = 0
    """Approximate size of the files of all sources that were read."""

    def check_available(self, sources: Sequence[Source]) -> None:
        """Check, before long work, that every source is there or was kept. Raises UserError."""
        for source in sources:
            if not self._has(source.name):
                skills.locate_source(source)

    def read_all(self, sources: Sequence[Source], config: Config, tokenizer: Any, vocab_size: int) -> list[Skill]:
        """Read sources, each from the documents that the run kept if they are intact.

        Sources that are gone give one warning for all. Raises UserError for a bad source, and for a local source whose
        records are not those that the run learned.
        """
        self.check_available(sources)
        gone: list[str] = []
        read = [self._read(source, config, tokenizer, vocab_size, gone) for source in sources]
        if gone:
            console.warn(f"{', '.join(gone)}: gone; the documents that the run kept are used")
        return read

    def write_new(self, run: Path) -> None:
        """Write the sources that the run folder does not have yet. Raises OSError; then nothing was added."""
        with self.written(run):
            pass

    @contextmanager
    def written(self, run: Path) -> Iterator[None]:
        """Write the sources that the run folder does not have yet before the block, and remove it again if the block raises."""
        created, had_folder = (
            [path for name in self.new if not (path := path_of(run, name)).exists()],
            (run / FOLDER).exists(),
        )
        try:
            for name, kept in self.new.items():
                write(run, name, kept)
            yield
        except BaseException:
            for path in created:
                path.unlink(missing_ok=True)
            if not had_folder:
                with suppress(OSError):
                    (run / FOLDER).rmdir()
            raise
        self.new.clear()

    def _read(self, source: Source, config: Config, tokenizer: Any, vocab_size: int, gone: list[str]) -> Skill:
        kept, damage = self._kept(source.name, vocab_size)
        begun = source.name in self.digests
        if kept is not None:
            changed = self._changed_options(kept, source, config)
            if begun and changed:
                raise UserError(
                    f"{self.run}/config.yaml: {', '.join(changed)} of '{source.name}' changed since the run began; put the "
                    "old values back"
                )
            skill = kept.skill(source, config.data, tokenizer)
            if begun and not self._is_digest(skill):
                kept, damage = None, "other documents than the run learned"
            elif changed:
                kept = None
            elif self._use_kept(kept, source, config, tokenizer, begun, gone):
                self.num_bytes += kept.num_bytes()
                return skill
        return self._read_source(source, config, tokenizer, damage)

    def _read_source(self, source: Source, config: Config, tokenizer: Any, damage: str | None) -> Skill:
        """Read a source of which no documents were kept, or with `damage`."""
        file = damage and path_of(self.run or Path(), source.name)
        try:
            skills.locate_source(source)
        except UserError as error:
            if damage is None:
                raise
            raise UserError(f"{file}: {damage}, and {source.source} is gone; put one of them back") from error
        documents = stream.read_tokenized(source, config.data, tokenizer, config.seed)
        skill = stream.make_skill(source, documents, config.data, tokenizer)
        if source.name in self.digests and not self._is_digest(skill):
            self._refuse_others(skill)
        if damage is not None:
            console.warn(f"{file}: {damage}; {source.source} was read again")
        self.new[source.name] = keep(source, documents, skill.format, config)
        self.num_bytes += self.new[source.name].num_bytes()
        return skill

    def _refuse_others(self, skill: Skill) -> None:
        """Raise UserError for a source whose digest is not the run's.

        Version 0.1.0 kept digests of tokens, and it rendered chats and prompts in another way. In a finished run of it, the
        source gives a warning only.
        """
        if self.digests[skill.name].startswith(RECORDS) or skill.format.kind == "plain":
            raise self._changed(skill.source, kept=False)
        what = (
            f"{skill.source.source}: other tokens of '{skill.name}' than version 0.1.0 of dylora_mlx learned: the records "
            "changed, or this version renders them in another way"
        )
        if self.resuming:
            raise UserError(f"{what}; finish the run with that version")
        console.warn(what)

    def _use_kept(
        self, kept: KeptSource, source: Source, config: Config, tokenizer: Any, begun: bool, gone: list[str]
    ) -> bool:
        """Compare kept documents with the source as it is now. Returns False if the source is to be read instead."""
        is_local = False
        try:
            is_local = skills.locate_source(source) is not None and not source.source.startswith("packaged/")
            is_same = stream.read_digest(source, config.data, tokenizer, config.seed) == kept.documents.digest
        except UserError:
            if is_local:  # it is there, but it cannot be read
                raise
            gone.append(source.source)
            return True
        if is_same or not begun:  # nothing was learned yet from a source that the checkpoint does not know
            return is_same
        if is_local:
            raise self._changed(source, kept=True)
        console.warn(
            f"{source.source}: other records now than those that the run learned; the documents that it kept are used"
        )
        return True

    def _kept(self, name: str, vocab_size: int) -> tuple[KeptSource | None, str | None]:
        """Return the kept documents of a source, or None and what is wrong with their file, if there is one."""
        if not self._has(name):
            return None, None
        try:
            content = path_of(self.run or Path(), name) if self.received is None else self.received[name]
            return read(content, vocab_size), None
        except OSError as error:
            return None, f"cannot be read ({error.strerror})"
        except ValueError as error:
            return None, str(error)

    def _has(self, name: str) -> bool:
        if self.received is not None:
            return bool(self.received.get(name))
        return self.run is not None and path_of(self.run, name).exists()

    def _changed_options(self, kept: KeptSource, source: Source, config: Config) -> list[str]:
        """Return the names of options that the documents depend on and that are others now."""
        now, then = _options(source, config), kept.options
        names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
        shorter, longer = sorted((kept.max_seq_length, config.data.max_seq_length))
        is_cut = any(len(d.tokens) > shorter + 1 for split in kept.documents.splits.values() for d in split)
        return [*names, "data.max_seq_length"] if self.resuming and shorter != longer and is_cut else names

    def _is_digest(self, skill: Skill) -> bool:
        """Return whether the run's checkpoint has this skill's digest, of its records or of its training tokens."""
        return self.digests[skill.name] in (digest_of(skill), skill.token_digest)

    def _changed(self, source: Source, kept: bool) -> UserError:
        """Return the error for a source with other records than the run learned."""
        away = ", or move it away: the run kept what it learned from" if kept else ""
        if self.resuming:
            return UserError(
                f"{source.source}: the data of '{source.name}' changed since the run began; put it back to resume{away}"
            )
        return UserError(
            f"{self.run} was trained on other records of '{source.name}' than {source.source} has now; put the old ones "
            f"back{away}"
        )
