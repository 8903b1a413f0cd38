"""Names of splits, and the files of a folder that are splits: `train.jsonl`, `valid.csv`, `test-00000-of-00002.parquet`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from dylora_mlx.data import files
from dylora_mlx.errors import UserError

T = TypeVar("T")
NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
"""The names that each split goes by, the usual one first."""
_SPLIT_OF = {name: split for split, names in NAMES.items() for name in names}
_SHARD = re.compile(r"[-_.]?(?P<number>\d{1,9})(-of-(?P<count>\d{1,9}))?(-[0-9a-f]{8,})?")
"""Suffix of a split's name in the file name of one shard: `-00000-of-00002`, `_3`, `-00000-of-00001-a1b2c3d4e5`."""


class _Named(NamedTuple):
    """A file's name, taken apart."""

    name: str
    """Name of the split, as the file has it but in lower case."""
    shard: int | None
    """Number among several files of this split."""
    shards: int | None
    """How many there should be."""


def canonical(name: str) -> str:
    """Return the split that a name stands for: validation for `valid`; the name itself if it is none of the known ones."""
    return _SPLIT_OF.get(name, name)


def _parse(path: Path, wanted: str) -> _Named | None:
    """Return the split's name that a file is named by, None if it is no split's file.

    Only files that hold many records count, and .txt files, in which a split is one long text.
    """
    if files.format_suffix(path) not in (*files.RECORD_SUFFIXES, ".txt"):
        return None
    stem = path.name[: len(path.name) - len(files.ending(path))]
    for name in sorted({*_SPLIT_OF, wanted}, key=len, reverse=True):
        start = stem[: len(name)]
        if start != name and not (name in _SPLIT_OF and start.lower() == name):
            continue
        if len(stem) == len(name):
            return _Named(name, None, None)
        if shard := _SHARD.fullmatch(stem, len(name)):
            return _Named(name, int(shard["number"]), int(shard["count"]) if shard["count"] else None)
    return None


def find(paths: Iterable[Path], wanted: str) -> dict[str, tuple[Path, ...]]:
    """Sort files into splits: each split's file or shards, by its usual name, or by `wanted`.

    If the split to train on is among them, raises UserError for two sets of files of one split, and for a missing shard.

    Args:
        paths: the files. Those that are no split's are ignored.
        wanted: name of the split to train on.
    """
    groups: dict[str, dict[tuple[str, str, bool], list[tuple[_Named, Path]]]] = {}
    for path in sorted(paths):
        named = _parse(path, wanted)
        if named is not None:
            split = named.name if named.name == wanted else canonical(named.name)
            key = (named.name, files.ending(path), named.shard is not None)
            groups.setdefault(split, {}).setdefault(key, []).append((named, path))
    candidates = {split: list(of_split.values()) for split, of_split in groups.items()}
    if training_split(candidates, wanted) is not None:
        for split, sets in candidates.items():
            _check(split, sets)
    return {
        split: tuple(path for _, path in sorted(sets[0], key=lambda pair: (pair[0].shard or 0, pair[1])))
        for split, sets in candidates.items()
    }


def find_folders(subfolders: Mapping[str, list[Path]], folder: Path, wanted: str) -> dict[str, tuple[Path, ...]]:
    """Sort subfolders of files, by name, into splits. Raises UserError, as `find` does, for two folders of one split."""
    names: dict[str, list[str]] = {}
    for name, paths in subfolders.items():
        split = name if name == wanted else canonical(name.lower())
        if paths and split in (*NAMES, wanted):
            names.setdefault(split, []).append(name)
    if training_split(names, wanted) is not None:
        for split, same in names.items():
            if len(same) > 1:
                raise UserError(
                    f"{folder}: the folders {same[0]} and {same[1]} are both the {split} split; keep one of them"
                )
    return {split: tuple(subfolders[same[0]]) for split, same in names.items()}


def _check(split: str, sets: list[list[tuple[_Named, Path]]]) -> None:
    """Raise UserError for two sets of files of one split, and for a missing shard."""
    paths = [shards[0][1] for shards in sets]
    if len(paths) > 1:
        raise UserError(
            f"{paths[0].parent}: {paths[0].name} and {paths[1].name} are both the {canonical(split)} split; "
            "keep one of them, or leave one out with the option exclude"
        )
    numbers = {named.shard for named, _ in sets[0]}
    for count in {named.shards for named, _ in sets[0] if named.shards}:
        missing = min((sorted(set(range(first, first + count)) - numbers) for first in (0, 1)), key=len)
        if missing:
            raise UserError(f"{paths[0]}: of the {count} files of this split, number {missing[0]} is missing")


def training_split(splits: Mapping[str, T], wanted: str) -> str | None:
    """Return which of a source's splits `wanted` names, exactly or by another name of the same split; None if none."""
    if wanted in splits:
        return wanted
    return next((name for name in splits if canonical(name) == canonical(wanted)), None)


def held_out_splits(splits: Mapping[str, T], training: str) -> dict[str, tuple[str, T]]:
    """Return validation and test, each with the name that it has in `splits`, without the split that is trained on.

    Where several names stand for one split, the usual one comes first.
    """
    held_out = {}
    for split in ("validation", "test"):
        name = next((name for name in NAMES[split] if name in splits and name != training), None)
        if name is not None:
            held_out[split] = (name, splits[name])
    return held_out
