"""Read sources: JSONL files, folders and Hugging Face Hub data sets, all as `datasets.Dataset`, split with a seed."""

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
"""Names of the splits, also the stems of a folder's .jsonl files."""
PRESETS = {
    "mbpp": {"prompt": '"""\n{text}\n"""\n', "completion": "{code}\n"},
    "code_alpaca": {"prompt": "{instruction}\n{input}\n", "completion": "{output}\n"},
}
"""Field mappings by preset name, as options of a Source."""
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
"""Suffixes of files that are read as plain text, one document each."""


@dataclass(frozen=True)
class SourceRecords:
    """The records of one source, split."""

    source: Source
    """The source, with the field mapping of its preset filled in."""
    train: Dataset
    validation: Dataset
    test: Dataset


def read_source(source: Source, data: DataConfig, seed: int) -> SourceRecords:
    """Read a source and split it.

    The source's own splits are used unchanged. Missing ones are drawn from the training split with the seed. Raises
    UserError for a source that is missing, unreachable, empty, malformed or too small to split.
    """
    if source.preset != "none":
        source = replace(source, **PRESETS[source.preset])
    splits = {name: _select_records(rows, source, seed) for name, rows in _read_splits(source).items()}
    train = splits["train"]
    num_records = len(train)
    for offset, (name, fraction) in enumerate((("validation", data.validation_fraction), ("test", data.test_fraction))):
        if name not in splits:
            held_out = max(1, round(fraction * num_records))
            if held_out >= len(train):
                raise UserError(f"{source.source}: {num_records} records are too few to hold some out for {name}")
            parts = train.train_test_split(test_size=held_out, seed=seed + offset)
            train, splits[name] = parts["train"], parts["test"]
    return SourceRecords(source, train, splits["validation"], splits["test"])


def locate_source(source: Source) -> Path | None:
    """Return the file or folder of a packaged or local source, or None for a hub data set.

    Raises UserError for a packaged skill, file or folder that does not exist.
    """
    if source.source.startswith("packaged/"):
        name = source.source.removeprefix("packaged/")
        if name not in assets.packaged_skills():
            raise UserError(f"{source.source}: no such packaged skill, there are {', '.join(assets.packaged_skills())}")
        return assets.SKILLS / name
    path = Path(source.source).expanduser()
    if path.exists():
        return path
    # A dot alone does not make it a file name: hub names may contain one too, as in OWNER/v1.5.
    looks_like_file = path.suffix in {".jsonl", ".json", *TEXT_SUFFIXES}
    if looks_like_file or source.source.startswith((".", "/", "~")) or source.source.count("/") != 1:
        raise UserError(f"{source.source}: no such file or folder (skill '{source.name}')")
    return None


def source_files(source: Source) -> list[Path] | None:
    """Return the files that a packaged or local source is read from, or None for a hub data set.

    Raises UserError for a source that does not exist.
    """
    path = locate_source(source)
    if path is None or not path.is_dir():
        return [path] if path else None
    split_files = _split_files(path)
    return [*split_files.values(), path / f"{source.split}.jsonl"] if split_files else _text_files(path)


def _split_files(folder: Path) -> dict[str, Path]:
    return {name: folder / f"{name}.jsonl" for name in SPLITS if (folder / f"{name}.jsonl").is_file()}


def _text_files(folder: Path) -> list[Path]:
    paths = sorted(folder.rglob("*"))
    return [path for path in paths if path.suffix in TEXT_SUFFIXES and path.is_file() and not path.is_symlink()]


def _read_splits(source: Source) -> dict[str, Dataset]:
    """Return the source's own splits by name, at least `train`."""
    path = locate_source(source)
    if path is None:
        return _load_hub_dataset(source)
    if path.is_dir():
        return _read_folder(path, source)
    _require_train_split(source)
    return {"train": _to_dataset(_read_json_lines(path), str(path))}


def _require_train_split(source: Source) -> None:
    """Raise UserError if a source without splits is configured with a split other than train."""
    if source.split != "train":
        raise UserError(f"{source.source}: has no split '{source.split}', it is one file or folder without splits")


def _read_folder(folder: Path, source: Source) -> dict[str, Dataset]:
    """Read a folder of train.jsonl (and validation.jsonl, test.jsonl), or a folder of text files, one document each."""
    split_files = _split_files(folder)
    if split_files:
        training = folder / f"{source.split}.jsonl"
        if not training.is_file():
            raise UserError(f"{training}: no such file, the split '{source.split}' of skill '{source.name}'")
        split_files = _held_out_splits(split_files, source) | {"train": training}
        return {name: _to_dataset(_read_json_lines(path), str(path)) for name, path in split_files.items()}
    _require_train_split(source)
    rows = []
    for path in _text_files(folder):
        text = _read_text(path)
        if text.strip():
            rows.append({"text": text, "path": path.relative_to(folder).as_posix()})
    if not rows:
        raise UserError(
            f"{folder}: neither train.jsonl nor text files ({', '.join(sorted(TEXT_SUFFIXES))}) in this folder"
        )
    return {"train": _to_dataset(rows, str(folder))}


def _load_hub_dataset(source: Source) -> dict[str, Dataset]:
    import datasets
    from huggingface_hub.errors import GatedRepoError

    logging.getLogger("datasets").setLevel(logging.ERROR)
    try:
        loaded = datasets.load_dataset(source.source, source.subset)
    except Exception as error:  # Network, hub and schema failures have no common type.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        # `datasets` may wrap the GatedRepoError in an error of its own, which is only recognised by its text.
        if isinstance(error, GatedRepoError) or "gated dataset" in reason:
            raise UserError(
                f"{source.source}: this data set is gated; accept its terms on huggingface.co and run `hf auth login`"
            ) from error
        raise UserError(
            f"{source.source}: not a local path, and the hub data set could not be loaded ({reason}); "
            "check the name and the connection, or give the path of a local copy"
        ) from error
    if source.split not in loaded:
        raise UserError(f"{source.source}: no split '{source.split}', there are {', '.join(map(str, loaded))}")
    return _held_out_splits({str(name): rows for name, rows in loaded.items()}, source) | {
        "train": loaded[source.split]
    }


def _held_out_splits(splits: Mapping[str, T], source: Source) -> dict[str, T]:
    """Return the validation and test splits, without the one that the source trains on."""
    return {name: splits[name] for name in SPLITS[1:] if name in splits and name != source.split}


def _read_text(path: Path) -> str:
    """Read a UTF-8 file, without its byte order mark. Raises UserError that names the line of an invalid byte."""
    try:
        return path.read_bytes().removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}, line {line}: not UTF-8 (byte {error.object[error.start]:#04x}); convert the file"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
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


def _to_dataset(rows: list[dict[str, Any]], location: str) -> Dataset:
    import datasets

    try:
        # Dataset.from_list would keep only the columns of the first row.
        columns = dict.fromkeys(name for row in rows for name in row)
        return datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})
    except Exception as error:  # Arrow raises several types for a column with values of different types.
        reason = str(error).splitlines()[0]
        raise UserError(f"{location}: the records do not share one type per column ({reason})") from error


def _select_records(rows: Dataset, source: Source, seed: int) -> Dataset:
    """Apply the source's `contains` and `limit` options."""
    if source.contains:
        wanted = source.contains.lower()
        keep = [i for i, row in enumerate(rows) if any(wanted in str(v).lower() for v in dict(row).values())]
        if not keep:
            raise UserError(f"{source.source}: no record contains '{source.contains}' (skill '{source.name}')")
        rows = rows.select(keep)
    if source.limit is not None and source.limit < len(rows):
        rows = rows.shuffle(seed=seed).select(range(source.limit))
    return rows
