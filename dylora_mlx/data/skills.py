"""Read sources: local files, folders and patterns, and Hugging Face Hub data sets, as records split with a seed."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from dylora_mlx import assets
from dylora_mlx.config import DataConfig, Source
from dylora_mlx.data import duplicates, files, formatting, layout, readers, split_files
from dylora_mlx.data.duplicates import Keyed
from dylora_mlx.data.files import TEXT_SUFFIXES
from dylora_mlx.data.records import Record, sample
from dylora_mlx.data.source_info import DRAWN, SourceInfo
from dylora_mlx.data.tokenized import SPLITS
from dylora_mlx.errors import UserError

PRESETS: dict[str, dict[str, str]] = {
    "mbpp": {"prompt": '"""\n{text}\n"""\n', "completion": "{code}\n"},
    "code_alpaca": {"prompt": "{instruction}\n{input}\n", "completion": "{output}\n"},
    "alpaca": {},
    "sharegpt": {"messages": "conversations"},
}
"""Field mappings by preset name, as options of a Source. That of alpaca is no template: see `formatting.read_sample`."""
_EMPTY = "empty"
"""Reason for leaving out a text file without text."""


@dataclass(frozen=True)
class SourceRecords:
    """The records of one source, split."""

    source: Source
    """The source, with the field mapping of its preset filled in."""
    train: list[Record]
    validation: list[Record]
    test: list[Record]
    info: SourceInfo = field(default_factory=SourceInfo)
    """Facts from reading the source, for a person to check before training."""


@dataclass
class _Split:
    """One of the source's own splits."""

    records: list[Record]
    origin: str
    """Where the records come from, for people."""


def read_source(source: Source, data: DataConfig, seed: int) -> SourceRecords:
    """Read a source and split it.

    The source's own splits are used unchanged. Missing ones are drawn from the training split with the seed, and then all
    copies of one text go into one split. Raises UserError for a source that is missing, unreachable, empty, malformed or too
    small to split.
    """
    if source.preset != "none":
        source = replace(source, **PRESETS[source.preset])
    source_splits, info = _read_splits(source)
    for split in source_splits.values():
        split.records = _select_records(split.records, source, seed)
    keyed = {name: duplicates.with_keys(split.records, source) for name, split in source_splits.items()}
    keyed = _draw_missing(keyed, source, data, seed)
    num_copies, leaked = duplicates.count_copies(keyed)
    splits = {name: [record for _, record in keyed[name]] for name in SPLITS}
    info = replace(
        info,
        split_origins={name: source_splits[name].origin if name in source_splits else DRAWN for name in SPLITS},
        records={name: len(records) for name, records in splits.items()},
        duplicates=num_copies,
        leaked=leaked,
    )
    return SourceRecords(source, splits["train"], splits["validation"], splits["test"], info)


def _draw_missing(
    splits: dict[str, list[Keyed]], source: Source, data: DataConfig, seed: int
) -> dict[str, list[Keyed]]:
    """Return train, validation and test, the ones that are missing drawn from train: all copies of one text into one split,
    unless there are too few different texts for that."""
    fractions = {"validation": data.validation_fraction, "test": data.test_fraction}
    missing = [name for name in fractions if name not in splits]
    if not missing:
        return splits
    num_records = len(splits["train"])
    groups = duplicates.group_copies(splits["train"])
    if len(groups) <= len(missing):
        groups = [[record] for record in splits["train"]]
    num_groups = len(groups)
    drawn = {}
    for offset, (name, fraction) in enumerate(fractions.items()):
        if name in missing:
            max_records, max_groups = (max(1, round(fraction * count)) for count in (num_records, num_groups))
            groups, held_out = duplicates.hold_out_copies(groups, max_records, max_groups, seed + offset)
            drawn[name] = list(chain.from_iterable(held_out))
            if not groups:
                raise UserError(f"{source.source}: {num_records} records are too few to hold some out for {name}")
    return splits | drawn | {"train": list(chain.from_iterable(groups))}


def locate_source(source: Source) -> Path | None:
    """Return the file or folder of a packaged or local source, the folder of a pattern, or None for a hub data set.

    Raises UserError for a packaged skill, file or folder that does not exist, and for a pattern that matches nothing.
    """
    if source.source.startswith("packaged/"):
        name = source.source.removeprefix("packaged/")
        if name not in assets.packaged_skills():
            raise UserError(f"{source.source}: no such packaged skill, there are {', '.join(assets.packaged_skills())}")
        return assets.SKILLS / name
    path = Path(os.path.expanduser(source.source))
    if os.path.exists(path):  # unlike Path.exists, false for a name that no file can have
        return path
    if layout.is_pattern(source.source):
        if next(glob.iglob(str(path), recursive=True), None) is None:
            raise UserError(f"{source.source}: no file matches this pattern (skill '{source.name}')")
        return layout.pattern_root(source.source)
    # A dot alone does not make it a file name: hub names may contain one too, as in OWNER/v1.5.
    looks_like_file = files.format_suffix(path) is not None
    if looks_like_file or source.source.startswith((".", "/", "~")) or source.source.count("/") != 1:
        raise UserError(f"{source.source}: no such file or folder (skill '{source.name}')")
    if source.include is not None or source.exclude is not None:
        raise UserError(
            f"{source.source}: include and exclude choose files of a local folder, and this is a hub data set"
        )
    return None


def source_files(source: Source) -> list[Path] | None:
    """Return the files that a packaged or local source is read from, or None for a hub data set.

    Raises UserError for a source that does not exist.
    """
    root = locate_source(source)
    return None if root is None else layout.describe(source, root, count_left_out=False).files


def current_info(source: Source, info: SourceInfo) -> SourceInfo:
    """Return what is known of a source that was read before, with today's number of files that are left out of its folder:
    they may have changed although no file that is read did."""
    root = locate_source(source)
    if root is None or not root.is_dir():
        return info
    left_out = layout.describe(source, root).left_out
    left_out[_EMPTY] = info.left_out.get(_EMPTY, 0)
    return replace(info, left_out=dict((+left_out).most_common()))


def _read_splits(source: Source) -> tuple[dict[str, _Split], SourceInfo]:
    """Return the source's own splits by name, at least `train`, and what was read."""
    root = locate_source(source)
    if root is None:
        from dylora_mlx.data import tables  # imports `datasets`, which other sources do not need

        return _choose(tables.hub_splits(source.source, source.subset), source, source.source), SourceInfo()
    source_layout = layout.describe(source, root)
    info = SourceInfo(source_layout.by_ending(), dict(source_layout.left_out.most_common()))
    if source_layout.saved is not None:
        from dylora_mlx.data import tables

        return _choose(tables.saved_splits(root), source, root.name), info
    if source_layout.texts is not None:
        return _read_texts(source_layout, source, info)
    return _read_files(source_layout, source), info


def _read_texts(source_layout: layout.Layout, source: Source, info: SourceInfo) -> tuple[dict[str, _Split], SourceInfo]:
    """Read a folder of text files, one document each; empty ones are left out."""
    rows, read = [], Counter()
    left_out = Counter(info.left_out)
    for path in source_layout.texts or ():
        text = files.read_text(path)
        if text.strip():
            rows.append(Record({"text": text, "path": source_layout.name(path)}, str(path)))
            read[files.ending(path)] += 1
        else:
            left_out[_EMPTY] += 1
    info = SourceInfo(dict(read.most_common()), dict(left_out.most_common()))
    if not rows:
        raise _nothing_to_read(source_layout.root, source, info)
    return {"train": _Split(rows, f"{len(rows)} files of text")}, info


def _nothing_to_read(folder: Path, source: Source, info: SourceInfo) -> UserError:
    """Return the error for a folder without split files and without text."""
    if source.include is not None or source.exclude is not None:
        what = "no text file is left of this folder by include and exclude"
    else:
        what = f"neither train.jsonl nor text files ({', '.join(sorted(TEXT_SUFFIXES))}) in this folder"
    tables = sorted(path.name for path in folder.iterdir() if path.is_file() and files.is_record_file(path))
    if tables:
        what += (
            f"; it has {', '.join(tables[:3])}{', ...' if len(tables) > 3 else ''}: name the file, or write a pattern"
        )
    return UserError(f"{folder}: {what}" + (f"; left out: {info.reasons()}" if info.left_out else ""))


def _read_files(source_layout: layout.Layout, source: Source) -> dict[str, _Split]:
    """Read the files of each split that is used."""
    training = split_files.training_split(source_layout.splits, source.split) or source.split
    missing = next((path for path in source_layout.splits[training] if not path.is_file()), None)
    if missing is not None:
        raise UserError(f"{missing}: no such file, the split '{source.split}' of skill '{source.name}'")
    chosen = {
        "train": (training, source_layout.splits[training]),
        **split_files.held_out_splits(source_layout.splits, training),
    }
    splits = {}
    for split, (_, paths) in chosen.items():
        origin = source_layout.name(paths[0])
        if len(paths) > 1:
            is_pattern = layout.is_pattern(source.source) and set(source_layout.splits) == {"train"}
            origin = (
                f"{Path(source.source).name}, {len(paths)} files"
                if is_pattern
                else f"{origin} and {len(paths) - 1} more"
            )
        splits[split] = _Split([record for path in paths for record in readers.read_file(path)], origin)
    return splits


def _choose(splits: Mapping[str, Any], source: Source, label: str) -> dict[str, _Split]:
    """Read the splits that are used of a data set that `datasets` has loaded. `label` is what people call it."""
    from dylora_mlx.data import tables

    training = split_files.training_split(splits, source.split)
    if training is None:
        raise UserError(f"{source.source}: no split '{source.split}', there are {', '.join(splits)}")
    chosen = {"train": (training, splits[training]), **split_files.held_out_splits(splits, training)}
    return {
        split: _Split(tables.split_records(rows, f"{source.source} ({name})"), f"{label}, split {name}")
        for split, (name, rows) in chosen.items()
    }


def _select_records(records: list[Record], source: Source, seed: int) -> list[Record]:
    """Apply the source's `contains` and `limit` options."""
    if source.contains:
        wanted = source.contains.lower()
        records = [
            record
            for record in records
            if any(wanted in formatting.as_text(value).lower() for value in record.row.values())
        ]
        if not records:
            raise UserError(f"{source.source}: no record contains '{source.contains}' (skill '{source.name}')")
    if source.limit is not None and source.limit < len(records):
        records = sample(records, source.limit, seed)
    return records
