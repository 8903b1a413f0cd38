"""One skill, ready to train: its pieces, its row plan, and batches from any cursor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dylora_mlx.config import Data, Source
from dylora_mlx.data import formatting, packing, skills
from dylora_mlx.data.packing import Batch, Packing, Piece
from dylora_mlx.errors import UserError


@dataclass(frozen=True)
class Split:
    """One split of a skill: its pieces and the number of documents they were cut from."""

    pieces: list[Piece]
    documents: int

    @property
    def tokens(self) -> int:
        """Tokens, counting each position that is an input once."""
        return sum(piece.positions for piece in self.pieces)


@dataclass(frozen=True)
class Skill:
    """A skill of the stream, tokenised and split; `digest` identifies its training tokens."""

    name: str
    source: Source
    train: Split
    validation: Split
    test: Split
    digest: str


def prepare(source: Source, data: Data, tokenizer: Any, seed: int) -> Skill:
    """Read, format, tokenise and cut one source. Raises UserError for bad sources and records."""
    records = skills.read(source, data, seed)
    splits = {}
    for name in skills.SPLITS:
        documents = list(formatting.encode_all(getattr(records, name), records.source, tokenizer, name))
        if not any(d.learn.any() for d in documents):
            raise UserError(f"{source.source} ({name}): no token to learn")
        splits[name] = Split(packing.cut(documents, data.row_length), len(documents))
    digest = hashlib.sha256(b"".join(p.tokens.tobytes() for p in splits["train"].pieces)).hexdigest()
    return Skill(source.name, source, splits["train"], splits["validation"], splits["test"], digest)


@dataclass(frozen=True)
class Stream:
    """The steps of one skill: `rows` in training order, cut into steps of micro-batches.

    The whole plan follows from the seed, so a cursor (the next step's number) is enough to go on exactly.
    """

    pieces: Sequence[Piece]
    rows: list[list[int]]
    row_length: int
    batch_rows: int
    accumulation: int

    @classmethod
    def of(cls, split: Split, data: Data, epochs: int, batch_rows: int, accumulation: int, seed: int) -> Stream:
        lengths = [piece.positions for piece in split.pieces]
        rows = packing.plan(lengths, data.row_length, epochs, data.pack_window, seed)
        return cls(split.pieces, rows, data.row_length, batch_rows, accumulation)

    def __len__(self) -> int:
        """Steps, the last one possibly with fewer rows."""
        return -(-len(self.rows) // (self.batch_rows * self.accumulation))

    def _micro_rows(self, number: int) -> list[list[list[int]]]:
        size = self.batch_rows * self.accumulation
        rows = self.rows[number * size : (number + 1) * size]
        return [rows[i : i + self.batch_rows] for i in range(0, len(rows), self.batch_rows)]

    def step(self, number: int) -> list[Batch]:
        """The micro-batches of a step."""
        return [packing.collate(self.pieces, rows, self.row_length) for rows in self._micro_rows(number)]

    def steps(self, start: int = 0, stop: int | None = None) -> Iterator[list[Batch]]:
        """Micro-batches of steps `start` to `stop`."""
        for number in range(start, len(self) if stop is None else min(stop, len(self))):
            yield self.step(number)

    def statistics(self) -> Packing:
        """Padding and filled lengths over the whole plan."""
        batches = [rows for number in range(len(self)) for rows in self._micro_rows(number)]
        return packing.statistics(self.pieces, batches, self.row_length)


def evaluation_batches(pieces: Sequence[Piece], row_length: int, batch_rows: int) -> list[Batch]:
    """All rows of some pieces, packed once, the last batch possibly short."""
    rows = packing.best_fit([piece.positions for piece in pieces], row_length)
    return [packing.collate(pieces, rows[i : i + batch_rows], row_length) for i in range(0, len(rows), batch_rows)]


class Values(Protocol):
    """Arrays by piece: a list of them, or kept elsewhere."""

    def __getitem__(self, index: int, /) -> np.ndarray: ...


def gather(values: Values, batch: Batch) -> np.ndarray:
    """Lay per-piece arrays [positions, D] out as the batch's rows [B, L, D], zeros where there is padding."""
    first = values[batch.pieces[0][0]]
    out = np.zeros((*batch.inputs.shape, first.shape[-1]), first.dtype)
    for r, row in enumerate(batch.pieces):
        at = 0
        for index in row:
            part = values[index]
            out[r, at : at + len(part)] = part
            at += len(part)
    return out
