"""Skills ready to train: segments, the batch plan, and batches from any step of it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from dylora_mlx.config import DataConfig, Source
from dylora_mlx.data import cache, formatting, packing, rendering, skills
from dylora_mlx.data.encoding import Document
from dylora_mlx.data.packing import Batch, PackingStats, Segment
from dylora_mlx.data.records import digest
from dylora_mlx.data.rendering import PLAIN_FORMAT, FormatKind, SkillFormat
from dylora_mlx.data.source_info import SourceInfo
from dylora_mlx.data.tokenized import SPLITS, TokenizedSource
from dylora_mlx.errors import UserError
from dylora_mlx.system import console


@dataclass(frozen=True)
class Split:
    """One split of a skill, cut into segments."""

    segments: list[Segment]
    num_documents: int
    """Number of documents that the segments were cut from."""
    num_cut: int = 0
    """Documents that were longer than a row, and so were cut into windows."""
    num_dropped: int = 0
    """Windows that were dropped because no token of them is learned."""

    @property
    def num_tokens(self) -> int:
        """Input positions of all segments. A segment's last token is only a target and does not count."""
        return sum(segment.positions for segment in self.segments)

    def document_tokens(self, documents: Sequence[int]) -> list[np.ndarray]:
        """Return the token ids of some documents, in the order of `documents`. The first token of each segment, a BOS,
        is left out."""
        tokens_of: dict[int, list[np.ndarray]] = {int(number): [] for number in documents}
        for segment in self.segments:
            if segment.document in tokens_of:
                tokens_of[segment.document].append(segment.tokens[1:])
        return [np.concatenate(parts) for parts in tokens_of.values()]

    def document_sizes(self) -> np.ndarray:
        """Return the input positions of every document, int [num_documents]."""
        documents = [segment.document for segment in self.segments]
        positions = [segment.positions for segment in self.segments]
        return np.bincount(documents, positions, self.num_documents).astype(int)

    def select(self, documents: Collection[int]) -> Split:
        """Return some documents, in their order here, renumbered from 0."""
        new_numbers = {document: number for number, document in enumerate(sorted(documents))}
        segments = [
            segment._replace(document=new_numbers[segment.document])
            for segment in self.segments
            if segment.document in new_numbers
        ]
        return Split(segments, len(new_numbers))

    def sample(self, tokens: int | None, rng: np.random.Generator) -> Split:
        """Draw whole documents of at most `tokens` positions together. Returns this split itself if all fit, or for None.

        Documents longer than `tokens` are left out. If all are, the shortest one is returned.
        """
        if tokens is None or self.num_tokens <= tokens:
            return self
        sizes = self.document_sizes()
        short = np.flatnonzero(sizes <= tokens)
        if not len(short):
            return self.select([int(sizes.argmin())])
        return self.select([int(short[i]) for i in draw_within(sizes[short].tolist(), tokens, rng)])


@dataclass(frozen=True)
class Skill:
    """A tokenized and split skill of the stream."""

    name: str
    source: Source
    train: Split
    validation: Split
    test: Split
    digest: str
    """sha256 of the records. A part of a split skill has its parent's digest with the suffix .NUMBER."""
    token_digest: str = ""
    """sha256 of the training tokens: the digest that runs of version 0.1.0 kept."""
    format: SkillFormat = PLAIN_FORMAT
    """Form of the records, and so of the prompts that the skill's expert answers."""
    unlearned: int = 0
    """Records that were left out because nothing of them is learned."""
    kinds: Mapping[FormatKind, int] = field(default_factory=dict)
    """Training records by the form that they were read in."""
    info: SourceInfo = field(default_factory=SourceInfo)
    """Facts from reading the source: files, origins of the splits, copies."""


def draw_within(sizes: Sequence[int], budget: int, rng: np.random.Generator) -> list[int]:
    """Draw indices uniformly at random until the next one's size would exceed what is left of a budget."""
    chosen, used = [], 0
    for index in rng.permutation(len(sizes)):
        used += sizes[index]
        # Stop here: trying smaller ones instead would make small ones more likely than large ones.
        if used > budget:
            break
        chosen.append(int(index))
    return chosen


def prepare_skill(source: Source, data: DataConfig, tokenizer: Any, seed: int) -> Skill:
    """Read, format, tokenize and segment one source. Raises UserError for a bad source or record."""
    return make_skill(source, read_tokenized(source, data, tokenizer, seed), data, tokenizer)


def read_tokenized(source: Source, data: DataConfig, tokenizer: Any, seed: int) -> TokenizedSource:
    """Read and tokenize a source, or load its documents from the cache if the same source was tokenized before.

    The tokenizer is not used then. Raises UserError for a bad source or record.
    """
    key = cache.cache_key(source, data, tokenizer, seed)
    tokenized = cache.load(key) if key else None
    if tokenized is None:
        tokenized = tokenize(source, data, tokenizer, seed)
        # A file may have changed while it was read. Its documents must then not be cached under the old content's key.
        if key and key == cache.cache_key(source, data, tokenizer, seed):
            cache.store(key, tokenized)
    else:
        tokenized.info = skills.current_info(source, tokenized.info)
    return tokenized


def read_digest(source: Source, data: DataConfig, tokenizer: Any, seed: int) -> str:
    """Return the sha256 of a source's records as they are now. Nothing is tokenized. Raises UserError for a bad source."""
    key = cache.cache_key(source, data, tokenizer, seed)
    tokenized = cache.load(key) if key else None
    if tokenized is not None:
        return tokenized.digest
    records = skills.read_source(source, data, seed)
    return digest({name: getattr(records, name) for name in SPLITS})


def make_skill(source: Source, tokenized: TokenizedSource, data: DataConfig, tokenizer: Any) -> Skill:
    """Cut a tokenized source into segments. The tokenizer is used only for the chat template's identity."""
    splits = {name: make_split(documents, data.max_seq_length) for name, documents in tokenized.splits.items()}
    token_digest = hashlib.sha256(b"".join(p.tokens.tobytes() for p in splits["train"].segments)).hexdigest()
    return Skill(
        source.name, source, splits["train"], splits["validation"], splits["test"], tokenized.digest, token_digest,
        rendering.format_of(tokenized.kind, tokenizer), tokenized.unlearned, tokenized.kinds,
        tokenized.info,
    )  # fmt: skip


def make_split(documents: Sequence[Document], max_seq_length: int) -> Split:
    """Cut documents into segments. A window without a learned token, such as the beginning of a long prompt, is dropped:
    a step on it would learn nothing."""
    windows = packing.split_documents(documents, max_seq_length)
    segments = [window for window in windows if window.loss_mask.any()]
    num_cut = sum(len(document.tokens) > max_seq_length + 1 for document in documents)
    return Split(segments, len(documents), num_cut, len(windows) - len(segments))


def tokenize(source: Source, data: DataConfig, tokenizer: Any, seed: int) -> TokenizedSource:
    """Read and tokenize all splits of a source. Raises UserError for a bad source or record, and if nothing is learned."""
    records = skills.read_source(source, data, seed)
    by_split = {name: getattr(records, name) for name in SPLITS}
    splits, kinds, unlearned = {}, {}, 0
    for name, of_split in by_split.items():
        encoded = formatting.encode_records(of_split, records.source, tokenizer)
        split = formatting.collect(console.track(encoded, f"tokenising {source.name} ({name})", len(of_split)))
        if not split.documents:
            raise UserError(
                f"{source.source} ({name}): no token to learn, every completion is empty or no chat has an answer"
            )
        splits[name], unlearned = split.documents, unlearned + split.unlearned
        kinds = dict(split.kinds) if name == "train" else kinds
    return TokenizedSource(splits, digest(by_split), kinds, unlearned, records.info)


class BatchShape(NamedTuple):
    """Shape of a batch, padding included."""

    rows: int
    """Rows, the batch size."""
    length: int
    """Positions in each row."""
    targets: int
    """Positions over all rows for which a loss is computed."""


@dataclass(frozen=True)
class BatchPlan:
    """All steps of one skill: rows in training order, divided into steps of micro-batches.

    The plan is deterministic in the seed, so the number of the next step is all that is needed to resume exactly.

    By default a batch is only as large as its rows need. With `max_targets` all micro-batches have the same shape and
    all steps the same number of them, so that a compiled step is not traced again for new shapes. The last step is
    filled up with empty rows.
    """

    segments: Sequence[Segment]
    rows: list[list[int]]
    """Indices into `segments`, row by row."""
    max_seq_length: int
    batch_size: int
    """Rows in a micro-batch."""
    grad_accumulation_steps: int
    """Micro-batches in a step."""
    max_targets: int | None = None
    """The largest number of targets in a micro-batch if shapes are fixed, else None."""

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
        """Plan `epochs` passes over a split. With `fixed` every micro-batch has the same shape."""
        lengths = [segment.positions for segment in split.segments]
        rows = packing.plan_rows(lengths, data.max_seq_length, epochs, data.packing_window, seed)
        plan = cls(split.segments, rows, data.max_seq_length, batch_size, grad_accumulation_steps)
        return replace(plan, max_targets=max_targets(split.segments, plan._all_micro_batch_rows())) if fixed else plan

    def __len__(self) -> int:
        """Return the number of steps. The last one may have fewer rows."""
        return -(-len(self.rows) // (self.batch_size * self.grad_accumulation_steps))

    def _micro_batch_rows(self, number: int) -> list[list[list[int]]]:
        """Return the rows of each micro-batch of a step, every row a list of segment indices."""
        size = self.batch_size * self.grad_accumulation_steps
        rows = self.rows[number * size : (number + 1) * size]
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]

    def _all_micro_batch_rows(self) -> list[list[list[int]]]:
        """Return the rows of every micro-batch of the plan."""
        return [rows for number in range(len(self)) for rows in self._micro_batch_rows(number)]

    def shapes(self, number: int) -> list[BatchShape]:
        """Return the shapes of a step's micro-batches without building them."""
        micro_batches = self._micro_batch_rows(number)
        if self.max_targets is not None:
            return [BatchShape(self.batch_size, self.max_seq_length, self.max_targets)] * self.grad_accumulation_steps
        num_targets = [max(1, max_targets(self.segments, [rows])) for rows in micro_batches]
        extents = [packing.batch_extent(self.segments, rows, self.max_seq_length, None) for rows in micro_batches]
        return [BatchShape(*extent, targets) for extent, targets in zip(extents, num_targets, strict=True)]

    def step(self, number: int) -> list[Batch]:
        """Build the micro-batches of a step."""
        micro_batches = self._micro_batch_rows(number)
        if self.max_targets is None:
            return [packing.collate(self.segments, rows, self.max_seq_length) for rows in micro_batches]
        micro_batches += [[]] * (self.grad_accumulation_steps - len(micro_batches))
        return [packing.collate(self.segments, rows, self.max_seq_length, self.batch_size) for rows in micro_batches]

    def steps(self, start: int = 0, stop: int | None = None) -> Iterator[list[Batch]]:
        """Yield the micro-batches of the steps from `start` up to, not including, `stop`."""
        for number in range(start, len(self) if stop is None else min(stop, len(self))):
            yield self.step(number)

    def statistics(self) -> PackingStats:
        """Return padding and row-length statistics of the whole plan."""
        size = len(self) * self.grad_accumulation_steps * self.batch_size * self.max_seq_length
        positions = None if self.max_targets is None else size
        return packing.packing_stats(
            self.segments, self._all_micro_batch_rows(), self.max_seq_length, positions=positions
        )


def max_targets(segments: Sequence[Segment], batches: Sequence[Sequence[Sequence[int]]]) -> int:
    """Return the largest number of targets in one batch. Each batch is a list of rows of segment indices."""
    return max(sum(int(segments[i].loss_mask[1:].sum()) for row in rows for i in row) for rows in batches)


def evaluation_rows(segments: Sequence[Segment], max_seq_length: int, batch_size: int) -> list[list[list[int]]]:
    """Pack segments once and divide the rows into batches of segment indices. The last batch may be short."""
    rows = packing.best_fit([segment.positions for segment in segments], max_seq_length)
    return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]


def evaluation_batches(
    segments: Sequence[Segment], max_seq_length: int, batch_size: int, fixed: bool = False
) -> list[Batch]:
    """Build evaluation batches that contain every segment once. With `fixed` all batches have the same shape."""
    batches = evaluation_rows(segments, max_seq_length, batch_size)
    return [packing.collate(segments, rows, max_seq_length, batch_size if fixed else None) for rows in batches]


class SegmentArrays(Protocol):
    """One array per segment, indexed by the segment's number: a list, or an array on disk."""

    def __getitem__(self, index: int, /) -> np.ndarray: ...


def gather_rows(values: SegmentArrays, batch: Batch) -> np.ndarray:
    """Arrange per-segment arrays [positions, D] in the layout of a batch's rows, [B, L, D], with zeros on padding."""
    out = np.zeros((*batch.inputs.shape, values[0].shape[-1]), values[0].dtype)
    for r, row in enumerate(batch.rows):
        offset = 0
        for index in row:
            segment_values = values[index]
            out[r, offset : offset + len(segment_values)] = segment_values
            offset += len(segment_values)
    return out
