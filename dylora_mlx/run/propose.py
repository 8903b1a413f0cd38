"""A config for data that nobody has described yet: which skills they may be, and options that fit them.

Everything is read, split and tokenized by the functions that training uses.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dylora_mlx.cli.options import source_name
from dylora_mlx.config import Config, DataConfig, GrowthConfig, Source, TrainingConfig, presets
from dylora_mlx.config.load import build
from dylora_mlx.config.paths import resolve_options
from dylora_mlx.data import counts, files, folders, formatting, inspect, layout, skills, stream
from dylora_mlx.data.counts import DataCounts
from dylora_mlx.errors import UserError
from dylora_mlx.run.build import check_enough_data
from dylora_mlx.system.files import parse_yaml

PAIRS = [
    ("question", "answer"), ("query", "answer"), ("query", "response"), ("instruction", "response"), ("input", "output"),
    ("input", "target"), ("problem", "solution"), ("source", "target"), ("title", "body"), ("user", "assistant"),
]  # fmt: skip
"""Names of columns that are read as prompt and completion, if a file has none of the usual ones."""
TEXTS = ["content", "body", "document", "article", "code", "markdown", "sentence", "passage"]
"""Names of columns that are read as plain text, if a file has none of the above."""
MAX_TOKENS = 400_000
"""Training tokens of a skill above which a limit is proposed: about an hour on two CPU cores with Gemma 3 270M."""
MIN_STEPS, MAX_STEPS, MAX_EPOCHS = 20, 150, 5
"""Steps that the smallest skill should get at least and the largest at most, and epochs at most for that."""
MIN_SAMPLES = 8
"""Training documents below which no config is proposed: similarity and early stopping need some."""
MAX_FOLDERS = 8
"""Subfolders up to which each is a skill of its own; more are one source of text, such as a tree of notes by month."""
LONGEST_ROW = 1024
"""Largest data.max_seq_length that is proposed: memory grows with it."""


@dataclass(frozen=True)
class Candidate:
    """A source that may become a skill, and what was found in it."""

    source: Source
    counts: DataCounts | None = None
    """None if it cannot be read."""
    lengths: tuple[int, ...] = ()
    """Tokens of each training document."""
    problem: str = ""
    """Why it cannot be learned; empty if it can."""
    notes: tuple[str, ...] = ()
    """What a person should know about the entry."""

    @property
    def tokens(self) -> int:
        """Training tokens that one epoch takes, with the limit."""
        total, limit = sum(self.lengths), self.source.limit
        return total if limit is None else round(total * min(1.0, limit / max(1, len(self.lengths))))


@dataclass(frozen=True)
class Proposal:
    """The text of a config, and the candidates that it was made of."""

    text: str
    config: Config
    candidates: list[Candidate]


def propose(words: Sequence[str], base: str, tokenizer: Any, folder: Path) -> Proposal:
    """Look at files and folders, and return a config that learns what is in them.

    Args:
        words: sources, as a config's `source` names them.
        base: value of model.base.
        tokenizer: the base's tokenizer.
        folder: folder of the config: paths inside it are written relative to it.

    Raises UserError if nothing in them can be learned, with the reasons.
    """
    candidates = [look(source, tokenizer) for source in with_unique_names(list(sources_in(words)))]
    usable = [candidate for candidate in candidates if not candidate.problem]
    if not usable:
        reasons = "; ".join(candidate.problem for candidate in candidates[:3]) or "no files of text or of records"
        raise UserError(f"{', '.join(words)}: nothing here to learn: {reasons}")
    text = to_text(words, candidates, base, folder)
    options: Any = parse_yaml(text)
    return Proposal(text, build(Config, [resolve_options(options, folder)], {}), candidates)


def sources_in(words: Sequence[str]) -> Iterator[Source]:
    """Yield a source for each skill that the words may name. Raises UserError for a file or folder that does not exist."""
    for word in words:
        source = Source(source_name(word), word)
        root = skills.locate_source(source)
        if root is None or not root.is_dir() or layout.is_pattern(word) or word.startswith("packaged/"):
            yield source
        else:
            yield from sources_of_folder(Path(word).expanduser(), source)


def sources_of_folder(folder: Path, source: Source, depth: int = 1) -> Iterator[Source]:
    """Yield the sources that a folder holds.

    One for a data set with splits. One for each subfolder, if there is nothing else and not too many. Otherwise one for each
    kind of text with enough files, and one for each file of records.
    """
    found = layout.describe(source, folder)
    if found.splits or found.saved is not None:
        yield source
        return
    entries = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    records = [path for path in entries if path.is_file() and files.is_record_file(path)]
    subfolders = [path for path in entries if path.is_dir() and path.name not in folders.SKIPPED_FOLDERS]
    texts = found.texts or []
    is_full = bool(records) or any(path.parent == folder for path in texts)
    if not is_full and depth and (not texts or 1 < len(subfolders) <= MAX_FOLDERS):
        for path in subfolders:
            yield from sources_of_folder(path, Source(source_name(str(path)), str(path)), depth - 1)
        return
    kinds = Counter(files.ending(path) for path in texts)
    enough = [ending for ending, count in kinds.most_common() if count >= MIN_SAMPLES]
    if len(enough) > 1:
        for ending in enough:
            yield replace(source, name=f"{source.name}-{ending[1:]}", include=[f"*{ending}"])
    elif kinds:
        yield replace(source, include=[f"*{enough[0]}"] if enough and len(kinds) > 1 else None)
    for path in records:
        yield Source(source_name(str(path)), str(path))


def with_unique_names(sources: list[Source]) -> list[Source]:
    """Return the sources with a number after each name that an earlier one has, or that the base skill has."""
    base_skill, taken, renamed = GrowthConfig().base_skill, set(), []
    taken.add(base_skill.name if base_skill else "")
    for source in sources:
        numbers = (f"{source.name[:60]}-{number}" for number in range(2, len(sources) + 3))
        name = source.name if source.name not in taken else next(name for name in numbers if name not in taken)
        taken.add(name)
        renamed.append(replace(source, name=name))
    return renamed


def look(source: Source, tokenizer: Any) -> Candidate:
    """Read and tokenize a source, and return it with a field mapping and a limit if it needs them."""
    data, notes = DataConfig(), []
    try:
        source = with_columns(source, data, notes)
        tokenized = stream.read_tokenized(source, data, tokenizer, Config([source]).seed)
    except UserError as error:
        return Candidate(source, problem=str(error))
    skill = stream.make_skill(source, tokenized, data, tokenizer)
    lengths = tuple(inspect.length(document) for document in tokenized.splits["train"])
    counted, problem = counts.summarize(skill, data, tokenizer), ""
    try:
        least = GrowthConfig(min_samples=MIN_SAMPLES)
        check_enough_data(skill, Config([source], growth=least))
    except UserError as error:
        problem = str(error).replace(" (growth.min_samples)", "")
    if sum(lengths) > MAX_TOKENS:
        limit = round_down(len(lengths) * MAX_TOKENS / sum(lengths))
        source = replace(source, limit=limit)
        notes.append(
            f"limit: {limit} of {len(lengths):,} documents drawn at random; remove it to learn from all of them"
        )
    notes += [remark for remark in counts.remarks(counted) if "data.max_seq_length" not in remark]
    return Candidate(source, counted, lengths, problem, tuple(notes))


def round_down(number: float) -> int:
    """Return the number with two digits that are not zero, at least 1."""
    unit = 10 ** max(0, math.floor(math.log10(max(1.0, number))) - 1)
    return max(1, int(number // unit * unit))


def with_columns(source: Source, data: DataConfig, notes: list[str]) -> Source:
    """Return a source with templates if its first record has columns that are not read without, and a note on them."""
    root = skills.locate_source(source)
    if root is not None and layout.describe(source, root, count_left_out=False).texts is not None:
        return source
    record = skills.read_source(source, data, Config([source]).seed).train[0]
    try:
        formatting.read_sample(record.row, source, record.location)
    except UserError:
        guessed = guess_columns(record.row)
        if not guessed:
            raise
        notes.append(f"columns {', '.join(record.row)}: read as {' and '.join(guessed)}; check this with dylora data")
        return replace(source, **guessed)
    return source


def guess_columns(row: Mapping[str, Any]) -> dict[str, str]:
    """Return templates for a record with other than the usual columns, as options of a source; empty if none fits."""
    names = {name.lower(): name for name in row}
    for prompt, completion in PAIRS:
        if prompt in names and completion in names:
            return {"prompt": f"{{{names[prompt]}}}\n", "completion": f"{{{names[completion]}}}\n"}
    return next(({"text": f"{{{names[text]}}}"} for text in TEXTS if text in names), {})


def to_text(words: Sequence[str], candidates: Sequence[Candidate], base: str, folder: Path) -> str:
    """Return the config as commented YAML."""
    usable = [candidate for candidate in candidates if not candidate.problem]
    lines = [
        f"# Written by dylora init from {', '.join(words)}. Every option: docs/reference.md, or dylora train --help.",
        "",
        "# Skills are learned one after another, in this order. Each one that is new gets a LoRA expert of its own. An entry may",
        "# have its own rank and alpha, and include, exclude or contains to choose from its documents.",
        "skills:",
    ]
    for candidate in candidates:
        lines += entry_lines(candidate, folder)
    lines += [
        "",
        *model_lines(base),
        "",
        *section("data", row_lines(usable)),
        *section("training", epoch_lines(usable)),
    ]
    lines += section("growth", growth_lines(usable))
    return "\n".join(lines) + "\n"


def entry_lines(candidate: Candidate, folder: Path) -> list[str]:
    """Return a skill's lines: comments on what was found, and its entry, which is commented out if it cannot be learned."""
    counted, lines = candidate.counts, []
    if counted is not None:
        documents = sum(split.documents for split in counted.splits.values())
        kinds = ", ".join(f"{number:,} {ending}" for ending, number in counted.info.files.items())
        longest = max(candidate.lengths, default=0)
        lines.append(
            f"{kinds or candidate.source.source}: {counted.form}; {documents:,} documents, {len(candidate.lengths):,} of them to learn "
            f"from, with {sum(candidate.lengths):,} tokens; median {median(candidate.lengths):,}, longest {longest:,}"
        )
        if counted.info.left_out:
            lines.append(f"left out: {counted.info.reasons()}")
    lines += candidate.notes
    if candidate.problem:
        lines.append(f"left out: {candidate.problem}")
    defaults = Source(candidate.source.name, candidate.source.source)
    entry = {key: value for key, value in asdict(candidate.source).items() if value != getattr(defaults, key)}
    entry = {"name": candidate.source.name, "source": written_path(candidate.source.source, folder), **entry}
    text = ", ".join(f"{key}: {flow_value(value)}" for key, value in entry.items())
    comments = [f"  # {' '.join(line.split())}" for line in lines]
    return [*comments, f"  {'# ' if candidate.problem else ''}- {{{text}}}"]


def flow_value(value: Any) -> str:
    """Return a value as YAML on one line."""
    if isinstance(value, str) and not value.isprintable():
        return json.dumps(value, ensure_ascii=False)
    # A text alone ends with YAML's mark of a document's end, one in a list does not.
    return yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=math.inf).strip()[1:-1]


def median(lengths: Sequence[int]) -> int:
    return int(np.median(lengths)) if lengths else 0


def written_path(source: str, folder: Path) -> str:
    """Return a local source relative to the config's folder if it lies in it, else absolute; a name stays as it is."""
    path = Path(os.path.expanduser(source))
    if source.startswith("packaged/") or not (path.exists() or layout.is_pattern(source)):
        return source
    absolute = Path(os.path.abspath(path))
    inside = absolute.is_relative_to(folder.absolute())
    return absolute.relative_to(folder.absolute()).as_posix() if inside else absolute.as_posix()


def model_lines(base: str) -> list[str]:
    """Return the section on the base, with what its preset sets."""
    name = presets.preset_for(base)
    values = ", ".join(f"{option} {value:g}" for option, value in presets.PRESETS[name].options.items())
    if base == "embedded":
        comments = [
            "# The frozen base. embedded is a toy of 5 M parameters, with which a run takes minutes: it shows whether the data are",
            "# read as intended. For real use: google/gemma-3-270m (accept its licence on the hub, then hf auth login), a folder,",
            "# or a .gguf file.",
        ]
    else:
        sets = f", which sets {values}" if values else ""
        comments = [f"# The frozen base. Its size gives the preset {name}{sets} (model.preset)."]
    return [*comments, yaml.safe_dump({"model": {"base": base}}, default_flow_style=None, allow_unicode=True).strip()]


def section(name: str, lines: list[str]) -> list[str]:
    """Return a section of options; nothing if it has no lines, and commented out if all of them are comments."""
    if not lines:
        return []
    heading = f"{name}:" if any(not line.startswith("#") for line in lines) else f"# {name}:"
    return [heading, *(f"  {line}" for line in lines), ""]


def row_length(candidates: Sequence[Candidate]) -> int:
    """Return data.max_seq_length: enough for 95% of the documents, from the default up to LONGEST_ROW."""
    lengths = [length for candidate in candidates for length in candidate.lengths]
    wanted = int(-(-np.quantile(lengths, 0.95) // 64) * 64)
    return min(max(wanted, DataConfig().max_seq_length), LONGEST_ROW)


def row_lines(candidates: Sequence[Candidate]) -> list[str]:
    """Return the length of a row, if it is not the default or some documents are longer."""
    row = row_length(candidates)
    lengths = [length for candidate in candidates for length in candidate.lengths]
    cut = sum(length > row for length in lengths)
    if row == DataConfig().max_seq_length and not cut:
        return []
    are = "is longer and is" if cut == 1 else "are longer and are"
    comment = f"# Tokens in a row. {cut:,} of {len(lengths):,} documents {are} cut into windows; less saves memory."
    return [comment, f"max_seq_length: {row}"]


def epoch_lines(candidates: Sequence[Candidate]) -> list[str]:
    """Return the epochs: more than the default if the smallest skill would get fewer than MIN_STEPS steps, up to MAX_EPOCHS,
    and as long as the largest gets no more than MAX_STEPS."""
    training = TrainingConfig()
    per_step = training.batch_size * training.grad_accumulation_steps * row_length(candidates)
    steps = [max(1, math.ceil(candidate.tokens / per_step)) for candidate in candidates]
    fewest, most = min(steps), max(steps)
    epochs = max(training.epochs, min(MAX_EPOCHS, math.ceil(MIN_STEPS / fewest), MAX_STEPS // most))
    smallest = candidates[steps.index(fewest)].source.name
    largest = f", {most} for {candidates[steps.index(most)].source.name}" if most > fewest else ""
    reason = f"an epoch is about {fewest} step{'s' * (fewest != 1)} for {smallest}{largest}"
    return [f"# Passes over a skill; {reason}. Early stopping may end a skill sooner.", f"epochs: {epochs}"]


def growth_lines(candidates: Sequence[Candidate]) -> list[str]:
    """Return fewer documents than the default as the least, if a skill needs that, and what the base knows already."""
    least, default = min(len(candidate.lengths) for candidate in candidates), GrowthConfig().min_samples
    lines = []
    if least < default:
        lines += [
            f"# A skill has only {least} documents to learn from. Fewer than {default} make its similarity to others less certain.",
            f"min_samples: {least}",
        ]
    return [
        *lines,
        "# Text that the base knows already and must not lose: its loss is in every table. Name a source of your own, or null.",
        "# base_skill: {name: python, source: packaged/python}",
    ]
