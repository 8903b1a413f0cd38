"""Records of everything that the package `datasets` reads: Parquet and Arrow files, saved data sets, the Hugging Face Hub."""

from __future__ import annotations

import datetime
import decimal
import glob
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Value
from huggingface_hub.errors import GatedRepoError

from dylora_mlx.data.records import Record
from dylora_mlx.errors import UserError

_BATCH = 1000
"""Rows that are converted at a time."""
_MISSING = object()
"""Stands for a value without a text form, e.g. a picture. It is left out of its record."""


def read_table(path: Path, suffix: str) -> list[Record]:
    """Read a .parquet or .arrow file. Raises UserError if it is damaged."""
    with _quiet(), tempfile.TemporaryDirectory(prefix="dylora-") as folder:
        try:
            # Streamed, so that the library makes no copy; it still locks a file in its cache, which may be read-only. The path
            # is escaped because the library takes patterns.
            table = datasets.load_dataset(
                suffix.removeprefix("."),
                data_files=[glob.escape(str(path))],
                split="train",
                streaming=True,
                cache_dir=folder,
            )
            return _records(table, f"{path}, record")
        except Exception as error:  # Damaged files raise errors of many types.
            raise UserError(
                f"{path}: cannot be read as {suffix.removeprefix('.').capitalize()} ({_reason(error)})"
            ) from error


def saved_splits(folder: Path) -> dict[str, datasets.Dataset]:
    """Open a folder written by `save_to_disk`: its splits by name, or one named train. Raises UserError if it is damaged."""
    with _quiet():
        try:
            loaded = datasets.load_from_disk(str(folder))
        except Exception as error:
            raise UserError(f"{folder}: cannot be read as a saved data set ({_reason(error)})") from error
    if isinstance(loaded, datasets.Dataset):
        return {"train": loaded}
    return {str(name): rows for name, rows in loaded.items()}


def hub_splits(name: str, subset: str | None) -> dict[str, datasets.Dataset]:
    """Load a data set of the hub: its splits by name. Raises UserError if that is not possible."""
    with _quiet():
        try:
            loaded: Any = datasets.load_dataset(name, subset)
        except Exception as error:  # Network, hub and schema failures have no common type.
            reason = _reason(error)
            # `datasets` may wrap the GatedRepoError in an error of its own, which is only recognised by its text.
            if isinstance(error, GatedRepoError) or "gated dataset" in reason:
                raise UserError(
                    f"{name}: this data set is gated; accept its terms on huggingface.co and run `hf auth login`"
                ) from error
            raise UserError(
                f"{name}: not a local path, and the hub data set could not be loaded ({reason}); "
                "check the name and the connection, or give the path of a local copy"
            ) from error
    return {str(split): rows for split, rows in loaded.items()}


def split_records(rows: datasets.Dataset, place: str) -> list[Record]:
    """Return the rows of one split as records, `place` being the data set and the split for their locations.

    Raises UserError for rows that cannot be read.
    """
    with _quiet():
        try:
            return _records(rows, f"{place}, record")
        except Exception as error:
            raise UserError(f"{place}: cannot be read ({_reason(error)})") from error


def _records(table: Any, place: str) -> list[Record]:
    features = table.features or {}
    return [Record(row, f"{place} {number}") for number, row in enumerate(_rows(table, features), 1)]


def _rows(table: Any, features: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows as they are stored: the library's own decoding would need packages for pictures and sounds."""
    batches: Iterable[Any] = table.with_format("arrow").iter(batch_size=_BATCH)
    for batch in batches:
        for row in batch.to_pylist():
            plain = {name: _plain(value, features.get(name)) for name, value in row.items()}
            yield {name: value for name, value in plain.items() if value is not _MISSING}


def _plain(value: Any, feature: Any) -> Any:
    """Return a stored value as JSON has it, or _MISSING for a picture and for bytes that are no text.

    Fields of an object that are null are left out: Arrow gives all objects of a column the same fields, and fills in null
    where an object did not have one. Dates, times and decimal numbers become text. A number of 16 or 32 bits becomes the
    shortest one that it stands for: 0.1, not 0.10000000149011612.
    """
    if value is None:
        return None
    if isinstance(feature, datasets.Json):
        return json.loads(value) if isinstance(value, str) else value
    if isinstance(value, dict):
        if value.keys() == {"bytes", "path"} and feature is not None and not isinstance(feature, Mapping):
            return _MISSING  # a picture, a sound or another file
        inner = feature if isinstance(feature, Mapping) else {}
        fields = {name: _plain(part, inner.get(name)) for name, part in value.items() if part is not None}
        return {name: part for name, part in fields.items() if part is not _MISSING}
    if isinstance(value, (list, tuple)):
        inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
        parts = [_plain(part, inner) for part in value]
        return _MISSING if any(part is _MISSING for part in parts) else parts
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return _MISSING
    if isinstance(value, float) and isinstance(feature, Value) and feature.dtype in ("float32", "float16"):
        return float(str(np.dtype(feature.dtype).type(value)))
    if isinstance(value, (datetime.date, datetime.time)):  # a datetime is a date, and so is the Timestamp of pandas
        return value.isoformat()
    if isinstance(value, (decimal.Decimal, datetime.timedelta)):
        return str(value)
    return value


def _reason(error: BaseException) -> str:
    """Return the first line of an error's text, at most 200 characters, or the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's log lines off the terminal within the block: what they say is raised as an error as well."""
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
