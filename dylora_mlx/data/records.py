"""Records of a source, and how they are drawn with a seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")


class Record(NamedTuple):
    """One record of a source."""

    row: Mapping[str, Any]
    """Values by column."""
    location: str
    """File and line, or data set and number, for messages: `notes.jsonl, line 3`."""


def sample(records: Sequence[T], count: int, seed: int) -> list[T]:
    """Draw `count` records without replacement, in the order that `datasets.Dataset.shuffle` gives with this seed."""
    order = np.random.default_rng(seed).permutation(len(records))
    return [records[i] for i in order[:count]]


def hold_out(records: Sequence[T], count: int, seed: int) -> tuple[list[T], list[T]]:
    """Return (kept, held out) records, as `datasets.Dataset.train_test_split` draws them with this seed."""
    order = np.random.default_rng(seed).permutation(len(records))
    return [records[i] for i in order[count:]], [records[i] for i in order[:count]]


def digest(splits: Mapping[str, Iterable[Record]]) -> str:
    """Return the sha256 of the records of all splits: of their values, not of where they stand."""
    total = hashlib.sha256()
    for name, records in sorted(splits.items()):
        total.update(f"{name}\n".encode())
        for record in records:
            total.update(json.dumps(dict(record.row), sort_keys=True, ensure_ascii=True, default=str).encode() + b"\n")
    return total.hexdigest()
