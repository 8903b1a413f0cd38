"""Copies among the records of a source, and drawn splits that keep all copies of one text together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from dylora_mlx.config import Source
from dylora_mlx.data import formatting
from dylora_mlx.data.records import Record, sample
from dylora_mlx.errors import UserError


class Keyed(NamedTuple):
    """A record with a digest of what is learned from it."""

    key: bytes
    record: Record


def with_keys(records: Iterable[Record], source: Source) -> list[Keyed]:
    """Return the records with their keys, see `content_key`."""
    return [Keyed(content_key(record, source), record) for record in records]


def content_key(record: Record, source: Source) -> bytes:
    """Return a digest of what is learned from a record: equal for records that are read as the same text or chat.

    Columns that no template uses, such as a number or the path of a file, do not count. A record that cannot be read as a
    sample has the digest of its values; its error is raised where it is tokenized.
    """
    try:
        read = formatting.read_sample(record.row, source, record.location)
        content = [type(read).__name__, *read]
    except UserError:
        content = ["row", dict(record.row)]
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def group_copies(records: Iterable[Keyed]) -> list[list[Keyed]]:
    """Group records by content, the groups in the order of their first records."""
    groups: dict[bytes, list[Keyed]] = {}
    for record in records:
        groups.setdefault(record.key, []).append(record)
    return list(groups.values())


def hold_out_copies(
    groups: Sequence[list[Keyed]], max_records: int, max_groups: int, seed: int
) -> tuple[list[list[Keyed]], list[list[Keyed]]]:
    """Draw groups with the seed until one limit is met, and return (kept, held out). Groups that exceed it are passed over.

    Without copies this is `records.hold_out` of `max_records` records: the same draws in the same order. At least one group
    is held out; if none fits, the smallest.
    """
    order = sample(groups, len(groups), seed)
    held_out: list[int] = []
    size = 0
    for number, copies in enumerate(order):
        if len(held_out) < max_groups and size + len(copies) <= max_records:
            held_out.append(number)
            size += len(copies)
    if not held_out:
        held_out = [min(range(len(order)), key=lambda number: len(order[number]))]
    chosen = set(held_out)
    return [copies for i, copies in enumerate(order) if i not in chosen], [order[i] for i in held_out]


def count_copies(splits: Mapping[str, Iterable[Keyed]]) -> tuple[int, dict[str, int]]:
    """Return the number of records that are copies of an earlier one, in whichever split, and for each other split than train
    how many of its records are also in train, if any are."""
    keys = {name: [record.key for record in records] for name, records in splits.items()}
    total, distinct = sum(map(len, keys.values())), len(set().union(*keys.values()))
    train = set(keys["train"])
    leaked = {name: sum(key in train for key in of_split) for name, of_split in keys.items() if name != "train"}
    return total - distinct, {name: number for name, number in leaked.items() if number}
