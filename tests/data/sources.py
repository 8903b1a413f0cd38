"""Helpers for tests of sources: files of records, and what is read from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dylora_mlx.config import DataConfig, Source
from dylora_mlx.data import skills
from dylora_mlx.errors import UserError


def write(path: Path, rows: list[dict]) -> Path:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def numbered(count: int, prefix: str = "text") -> list[dict]:
    """Return records of different texts."""
    return [{"text": f"{prefix} {number}"} for number in range(count)]


def read(source: Path | str, seed: int = 0, **options) -> skills.SourceRecords:
    return skills.read_source(Source(name="s", source=str(source), **options), DataConfig(), seed)


def files_of(source: Path | str, **options) -> list[str]:
    """The names of the files that count for the cache, in alphabetical order."""
    paths = skills.source_files(Source(name="s", source=str(source), **options))
    assert paths is not None
    assert all(path.is_file() for path in paths)
    return sorted(path.name for path in paths)


def parts_of(records: skills.SourceRecords) -> tuple[list, list, list]:
    return records.train, records.validation, records.test


def rows_of(records: skills.SourceRecords) -> list[dict]:
    """The values of all records, in the order of their texts."""
    return sorted((dict(record.row) for part in parts_of(records) for record in part), key=lambda row: str(row))


def texts(records: skills.SourceRecords) -> tuple[list[str], list[str], list[str]]:
    train, validation, test = ([record.row["text"] for record in part] for part in parts_of(records))
    return train, validation, test


def together(splits: tuple[list[str], ...]) -> list[str]:
    return [text for split in splits for text in split]


def complaint(source: Path | str, **options) -> str:
    """The error of a source that cannot be read: one line that names the source's last part."""
    with pytest.raises(UserError) as caught:
        read(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert Path(str(source)).name in message
    return message
