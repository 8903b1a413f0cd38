"""Sources to records: JSONL files, folders and hub data sets, all as `datasets.Dataset`, split with a seed."""

from __future__ import annotations

import codecs
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dylora_mlx import assets
from dylora_mlx.config import DataConfig, Source
from dylora_mlx.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

T = TypeVar("T")
SPLITS = ("train", "validation", "test")
PRESETS = {
    "mbpp": {"prompt": '"""\n{text}\n"""\n', "completion": "{code}\n"},
    "code_alpaca": {"prompt": "{instruction}\n{input}\n", "completion": "{output}\n"},
}
TEXT_SUFFIXES = {
    ".py",
    ".sql",
    ".txt",
    ".md",
    ".js",
    ".ts",
    ".c",
    ".h",
    ".cpp",
    ".rs",
    ".go",
    ".java",
    ".rb",
    ".sh",
    ".swift",
}


@dataclass(frozen=True)
class SourceRecords:
    """One source, read and split; each split is a `datasets.Dataset`."""

    source: Source
    train: Dataset
    validation: Dataset
    test: Dataset


def read_source(source: Source, data: DataConfig, seed: int) -> SourceRecords:
    """Read a source and split it.

    Splits that the source has are used as they are; missing ones are drawn from the training split by the seed.
    Raises UserError for a source that is missing, unreachable, empty, malformed or too small to split.
    """
    if source.preset != "none":
        source = replace(source, **PRESETS[source.preset])
    splits = {name: _narrow(rows, source, seed) for name, rows in _splits(source).items()}
    train = splits["train"]
    given = len(train)
    for offset, (name, fraction) in enumerate((("validation", data.validation_fraction), ("test", data.test_fraction))):
        if name not in splits:
            held_out = max(1, round(fraction * given))
            if held_out >= len(train):
                raise UserError(f"{source.source}: {given} records are too few to hold some out for {name}")
            parts = train.train_test_split(test_size=held_out, seed=seed + offset)
            train, splits[name] = parts["train"], parts["test"]
    return SourceRecords(source, train, splits["validation"], splits["test"])


def locate_source(source: Source) -> Path | None:
    """The file or folder of a packaged or local source, None for a hub data set.

    Raises UserError for one that is not there.
    """
    if source.source.startswith("packaged/"):
        name = source.source.removeprefix("packaged/")
        if name not in assets.packaged_skills():
            raise UserError(f"{source.source}: no such packaged skill, there are {', '.join(assets.packaged_skills())}")
        return assets.SKILLS / name
    path = Path(source.source).expanduser()
    if path.exists():
        return path
    like_a_file = path.suffix in {".jsonl", ".json", *TEXT_SUFFIXES}  # a hub name may hold a dot too, as in OWNER/v1.5
    if like_a_file or source.source.startswith((".", "/", "~")) or source.source.count("/") != 1:
        raise UserError(f"{source.source}: no such file or folder (skill '{source.name}')")
    return None


def source_files(source: Source) -> list[Path] | None:
    """The files that the records of a packaged or local source are read from, None for a hub data set.

    Raises UserError for a source that is not there.
    """
    path = locate_source(source)
    if path is None or not path.is_dir():
        return [path] if path else None
    found = _split_files(path)
    return [*found.values(), path / f"{source.split}.jsonl"] if found else _text_files(path)


def _split_files(folder: Path) -> dict[str, Path]:
    return {name: folder / f"{name}.jsonl" for name in SPLITS if (folder / f"{name}.jsonl").is_file()}


def _text_files(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*"))
    return [path for path in found if path.suffix in TEXT_SUFFIXES and path.is_file() and not path.is_symlink()]


def _splits(source: Source) -> dict[str, Dataset]:
    path = locate_source(source)
    if path is None:
        return _hub(source)
    if path.is_dir():
        return _folder(path, source)
    _only_train(source)
    return {"train": _table(_json_lines(path), str(path))}


def _only_train(source: Source) -> None:
    if source.split != "train":
        raise UserError(f"{source.source}: has no split '{source.split}', it is one file or folder without splits")


def _folder(folder: Path, source: Source) -> dict[str, Dataset]:
    """A folder with train.jsonl (and validation.jsonl, test.jsonl), or a folder of text files, one document each."""
    found = _split_files(folder)
    if found:
        training = folder / f"{source.split}.jsonl"
        if not training.is_file():
            raise UserError(f"{training}: no such file, the split '{source.split}' of skill '{source.name}'")
        found = _held_out(found, source) | {"train": training}
        return {name: _table(_json_lines(path), str(path)) for name, path in found.items()}
    _only_train(source)
    rows = []
    for path in _text_files(folder):
        text = _decode(path)
        if text.strip():
            rows.append({"text": text, "path": path.relative_to(folder).as_posix()})
    if not rows:
        raise UserError(
            f"{folder}: neither train.jsonl nor text files ({', '.join(sorted(TEXT_SUFFIXES))}) in this folder"
        )
    return {"train": _table(rows, str(folder))}


def _hub(source: Source) -> dict[str, Dataset]:
    import datasets
    from huggingface_hub.errors import GatedRepoError

    logging.getLogger("datasets").setLevel(logging.ERROR)
    try:
        loaded = datasets.load_dataset(source.source, source.subset)
    except Exception as error:  # every kind of network, hub and schema failure ends here
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if isinstance(error, GatedRepoError) or "gated dataset" in reason:  # datasets rewraps the first
            raise UserError(
                f"{source.source}: this data set is gated; accept its terms on huggingface.co and run `hf auth login`"
            ) from error
        raise UserError(
            f"{source.source}: not a local path, and the hub data set could not be loaded ({reason}); "
            "check the name and the connection, or give the path of a local copy"
        ) from error
    if source.split not in loaded:
        raise UserError(f"{source.source}: no split '{source.split}', there are {', '.join(map(str, loaded))}")
    return _held_out({str(name): rows for name, rows in loaded.items()}, source) | {"train": loaded[source.split]}


def _held_out(found: Mapping[str, T], source: Source) -> dict[str, T]:
    """The validation and test splits, unless one of them is what the source trains on."""
    return {name: found[name] for name in SPLITS[1:] if name in found and name != source.split}


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}, line {line}: not UTF-8 (byte {error.object[error.start]:#04x}); convert the file"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_decode(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = (
                "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", "a number too long")
            )
            raise UserError(
                f"{path}, line {number}: not JSON ({reason}); every line must be one JSON object"
            ) from error
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, line {number}: a JSON {type(row).__name__}, but every line must be one JSON object"
            )
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: the file has no records")
    return rows


def _table(rows: list[dict[str, Any]], where: str) -> Dataset:
    import datasets

    try:
        # not from_list: it keeps only the columns of the first row
        columns = dict.fromkeys(name for row in rows for name in row)
        return datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})
    except Exception as error:  # Arrow raises several types for columns whose rows disagree
        reason = str(error).splitlines()[0]
        raise UserError(f"{where}: the records do not share one type per column ({reason})") from error


def _narrow(rows: Dataset, source: Source, seed: int) -> Dataset:
    """Apply `contains` and `limit`."""
    if source.contains:
        wanted = source.contains.lower()
        keep = [i for i, row in enumerate(rows) if any(wanted in str(v).lower() for v in dict(row).values())]
        if not keep:
            raise UserError(f"{source.source}: no record contains '{source.contains}' (skill '{source.name}')")
        rows = rows.select(keep)
    if source.limit is not None and source.limit < len(rows):
        rows = rows.shuffle(seed=seed).select(range(source.limit))
    return rows
