"""One skill, ready to train: its pieces, its row plan, and batches from any cursor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from dylora_mlx.config import DataConfig, Source
from dylora_mlx.data import cache, formatting, packing, skills
from dylora_mlx.data.cache import Splits
from dylora_mlx.data.packing import Batch, PackingStats, Segment
from dylora_mlx.errors import UserError
from dylora_mlx.system import console


@dataclass(frozen=True)
class Split:
    """One split of a skill: its pieces and the number of documents they were cut from."""

    segments: list[Segment]
    num_documents: int

    @property
    def num_tokens(self) -> int:
        """Tokens, counting each position that is an input once."""
        return sum(piece.positions for piece in self.segments)

    def document_tokens(self, documents: Sequence[int]) -> list[np.ndarray]:
        """Token ids of some documents, each piece's first token, a BOS, left out."""
        found: dict[int, list[np.ndarray]] = {int(number): [] for number in documents}
        for piece in self.segments:
            if piece.document in found:
                found[piece.document].append(piece.tokens[1:])
        return [np.concatenate(parts) for parts in found.values()]


@dataclass(frozen=True)
class Skill:
    """A skill of the stream, tokenised and split; `digest` identifies its training tokens."""

    name: str
    source: Source
    train: Split
    validation: Split
    test: Split
    digest: str


def prepare_skill(source: Source, data: DataConfig, tokenizer: Any, seed: int) -> Skill:
    """Read, format, tokenise and cut one source. Raises UserError for bad sources and records.

    Documents come from the cache where the same have been made before; the tokenizer is then left alone.
    """
    key = cache.cache_key(source, data, tokenizer, seed)
    documents = cache.load(key) if key else None
    if documents is None:
        documents = _tokenise(source, data, tokenizer, seed)
        if key and key == cache.cache_key(source, data, tokenizer, seed):  # no file changed while it was read
            cache.store(key, documents)
    splits = {
        name: Split(packing.split_documents(found, data.max_seq_length), len(found))
        for name, found in documents.items()
    }
    digest = hashlib.sha256(b"".join(p.tokens.tobytes() for p in splits["train"].segments)).hexdigest()
    return Skill(source.name, source, splits["train"], splits["validation"], splits["test"], digest)


def _tokenise(source: Source, data: DataConfig, tokenizer: Any, seed: int) -> Splits:
    records = skills.read_source(source, data, seed)
    documents = {}
    for name in skills.SPLITS:
        texts = getattr(records, name)
        encoded = formatting.encode_all(texts, records.source, tokenizer, name)
        documents[name] = list(console.track(encoded, f"tokenising {source.name} ({name})", len(texts)))
        if not any(d.loss_mask.any() for d in documents[name]):
            raise UserError(f"{source.source} ({name}): no token to learn")
    return documents


class BatchShape(NamedTuple):
    """Of a batch: rows, positions of each, and learned positions of all, what fills up included."""

    rows: int
    length: int
    targets: int


@dataclass(frozen=True)
class BatchPlan:
    """The steps of one skill: `rows` in training order, cut into steps of micro-batches.

    The whole plan follows from the seed, so a cursor (the next step's number) is enough to go on exactly. Batches are as
    large as they need to be; or, if `targets` is given, all of one shape, and so is every step, the last one filled up
    with empty rows. Then `targets` is the largest number of learned positions in a micro-batch.
    """

    segments: Sequence[Segment]
    rows: list[list[int]]
    max_seq_length: int
    batch_size: int
    grad_accumulation_steps: int
    max_targets: int | None = None

    @classmethod
    def plan(
        cls,
        split: Split,
        data: DataConfig,
        epochs: int,
        batch_size: int,
        grad_accumulation_steps: int,
        seed: int,
        fixed: bool = False,
    ) -> BatchPlan:
        """Plan `epochs` passes over a split; `fixed`: every micro-batch has the same shapes."""
        lengths = [piece.positions for piece in split.segments]
        rows = packing.plan_rows(lengths, data.max_seq_length, epochs, data.packing_window, seed)
        plan = cls(split.segments, rows, data.max_seq_length, batch_size, grad_accumulation_steps)
        return replace(plan, max_targets=max_targets(split.segments, plan._all_rows())) if fixed else plan

    def __len__(self) -> int:
        """Steps, the last one possibly with fewer rows."""
        return -(-len(self.rows) // (self.batch_size * self.grad_accumulation_steps))

    def _micro_rows(self, number: int) -> list[list[list[int]]]:
        size = self.batch_size * self.grad_accumulation_steps
        rows = self.rows[number * size : (number + 1) * size]
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]

    def _all_rows(self) -> list[list[list[int]]]:
        return [rows for number in range(len(self)) for rows in self._micro_rows(number)]

    def shapes(self, number: int) -> list[BatchShape]:
        """Of the micro-batches of a step, without making them."""
        found = self._micro_rows(number)
        if self.max_targets is not None:
            return [BatchShape(self.batch_size, self.max_seq_length, self.max_targets)] * self.grad_accumulation_steps
        learned = [max(1, max_targets(self.segments, [rows])) for rows in found]
        extents = [packing.batch_extent(self.segments, rows, self.max_seq_length, None) for rows in found]
        return [BatchShape(*extent, targets) for extent, targets in zip(extents, learned, strict=True)]

    def step(self, number: int) -> list[Batch]:
        """The micro-batches of a step."""
        found = self._micro_rows(number)
        if self.max_targets is None:
            return [packing.collate(self.segments, rows, self.max_seq_length) for rows in found]
        found += [[]] * (self.grad_accumulation_steps - len(found))
        return [packing.collate(self.segments, rows, self.max_seq_length, self.batch_size) for rows in found]

    def steps(self, start: int = 0, stop: int | None = None) -> Iterator[list[Batch]]:
        """Micro-batches of steps `start` to `stop`."""
        for number in range(start, len(self) if stop is None else min(stop, len(self))):
            yield self.step(number)

    def statistics(self) -> PackingStats:
        """Padding and filled lengths over the whole plan."""
        size = len(self) * self.grad_accumulation_steps * self.batch_size * self.max_seq_length
        positions = None if self.max_targets is None else size
        return packing.packing_stats(self.segments, self._all_rows(), self.max_seq_length, positions=positions)


def max_targets(segments: Sequence[Segment], batches: Sequence[Sequence[Sequence[int]]]) -> int:
    """The largest number of learned positions in one of the batches, each a list of rows of pieces."""
    return max(sum(int(segments[i].loss_mask[1:].sum()) for row in rows for i in row) for rows in batches)


def evaluation_rows(segments: Sequence[Segment], max_seq_length: int, batch_size: int) -> list[list[list[int]]]:
    """Some pieces packed once: of every batch the rows, each a list of pieces' numbers; the last batch may be short."""
    rows = packing.best_fit([piece.positions for piece in segments], max_seq_length)
    return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]


def evaluation_batches(
    segments: Sequence[Segment], max_seq_length: int, batch_size: int, fixed: bool = False
) -> list[Batch]:
    """All rows of some pieces, packed once; `fixed`: all batches of one shape."""
    parts = evaluation_rows(segments, max_seq_length, batch_size)
    return [packing.collate(segments, part, max_seq_length, batch_size if fixed else None) for part in parts]


class SegmentArrays(Protocol):
    """Arrays by piece: a list of them, or kept elsewhere."""

    def __getitem__(self, index: int, /) -> np.ndarray: ...


def gather_rows(values: SegmentArrays, batch: Batch) -> np.ndarray:
    """Lay per-piece arrays [positions, D] out as the batch's rows [B, L, D], zeros where there is padding."""
    out = np.zeros((*batch.inputs.shape, values[0].shape[-1]), values[0].dtype)
    for r, row in enumerate(batch.rows):
        at = 0
        for index in row:
            part = values[index]
            out[r, at : at + len(part)] = part
            at += len(part)
    return out
