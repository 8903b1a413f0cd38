"""The gates of an answer's tokens while they are generated, for requests that ask for them.

They travel with the row's router cache through mlx-lm's own merging and filtering of batches, so they are the gates that the
tokens were computed with, not those of a second pass, and they are there with each token. Rows without a trace cost nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import BatchKVCache, CacheList, KVCache

from dylora_mlx.model.decoder.decode_cache import DecoderCache


class Note(NamedTuple):
    """The gates of one pass of the model over a row."""

    start: int
    """Position of the first token of the pass."""
    row: int
    """The row's place in the batch."""
    gates: mx.array
    """Gates [B, L, E] of the batch, evaluated once the tokens are known that follow from this pass."""


class GateTrace:
    """The gates of one row. The engine's thread adds to it, the thread of its request takes from it.

    Args:
        first: Position of the prompt's last token, whose gates choose the first token of the answer.
    """

    def __init__(self, first: int):
        self._first = first
        self._notes: deque[Note] = deque()
        self._start, self._gates = first, np.zeros((0, 0), np.float32)

    def __deepcopy__(self, memo: Any) -> GateTrace:
        return self  # mlx-lm copies the caches of prompts that it divides; the request stays the same

    def add(self, note: Note) -> None:
        """Add the gates of a pass, unless all of its tokens are the prompt's."""
        if note.start + note.gates.shape[1] > self._first:
            self._notes.append(note)

    def take(self, number: int) -> np.ndarray:
        """Return the gates [E] that chose an answer's token, given its number from 0. Ask for ascending numbers of known tokens."""
        position = self._first + number
        # The last pass that begins before this token is its own: earlier ones read the prompt, which is never evaluated, or
        # were drafted in vain; later ones may still be at work.
        note = None
        while self._notes and self._notes[0].start <= position:
            note = self._notes.popleft()
        if note is not None:
            self._start, self._gates = note.start, np.array(note.gates)[note.row]
        # The last response may repeat the token before it.
        return self._gates[min(position - self._start, len(self._gates) - 1)]


class TracedCache(KVCache):
    """A row's router cache (decode_cache.py) with a trace.

    Args:
        router: The router's cache, whose arrays it shares.
        trace: Where the gates go; None for nowhere.
    """

    def __init__(self, router: KVCache, trace: GateTrace | None):
        super().__init__()
        self.keys, self.values, self.offset, self.trace = router.keys, router.values, router.offset, trace

    @classmethod
    def merge(cls, caches: Sequence[Any]) -> Any:
        return TracedBatchCache.merge(caches)

    def plain(self) -> KVCache:
        """Return the cache without its trace."""
        cache = KVCache()
        cache.keys, cache.values, cache.offset = self.keys, self.values, self.offset
        return cache

    def add(self, gates: mx.array) -> None:
        """Add the gates [1, L, E] of the last tokens to the trace."""
        if self.trace is not None:  # the cache's first slot is no token
            self.trace.add(Note(self.offset - 1 - gates.shape[1], 0, gates))

    @property
    def is_traced(self) -> bool:
        return self.trace is not None


class TracedBatchCache(BatchKVCache):
    """The router caches of a batch, with the trace and the length of each row: mlx-lm's own are arrays, not yet computed."""

    def __init__(self, left_padding: list[int]):
        super().__init__(left_padding)
        self.traces: list[GateTrace | None] = [None] * len(left_padding)
        self.lengths = [0] * len(left_padding)
        self._padded: list[int] | None = None

    @classmethod
    def merge(cls, caches: Sequence[TracedCache]) -> Any:
        batch: Any = super().merge(caches)
        batch.traces, batch.lengths = [cache.trace for cache in caches], [cache.offset for cache in caches]
        return batch

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        self.lengths = [length + keys.shape[2] for length in self.lengths]
        return super().update_and_fetch(keys, values)

    def prepare(self, *, right_padding: Any = None, **options: Any) -> None:
        super().prepare(right_padding=right_padding, **options)
        if right_padding is not None and max(right_padding) > 0:
            self._padded = list(right_padding)

    def finalize(self) -> None:
        super().finalize()
        if self._padded is not None:
            self.lengths = [length - padding for length, padding in zip(self.lengths, self._padded, strict=True)]
            self._padded = None

    def trim(self, n: int) -> int:
        trimmed = super().trim(n)
        self.lengths = [length - trimmed for length in self.lengths]
        return trimmed

    def filter(self, batch_indices: Any) -> None:
        super().filter(batch_indices)
        self.traces = [self.traces[index] for index in batch_indices]
        self.lengths = [self.lengths[index] for index in batch_indices]

    def extend(self, other: Any) -> None:
        super().extend(other)
        self.traces, self.lengths = [*self.traces, *other.traces], [*self.lengths, *other.lengths]

    def add(self, gates: mx.array) -> None:
        """Add the gates [B, L, E] of the last tokens to the traces."""
        for row, (trace, length) in enumerate(zip(self.traces, self.lengths, strict=True)):
            if trace is not None:
                trace.add(Note(length - 1 - gates.shape[1], row, gates))

    @property
    def is_traced(self) -> bool:
        return any(trace is not None for trace in self.traces)


class TracedModel(nn.Module):
    """A routed model whose caches, those of `with_trace`, note the gates of every token.

    Args:
        model: The routed model.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    @property
    def layers(self) -> list[Any]:
        return self.model.layers

    def make_cache(self, fixed_gates: np.ndarray | None = None) -> list[Any]:
        return self.model.make_cache(fixed_gates)

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        logits, router = self.model(tokens, cache=cache), DecoderCache.of(cache).router
        if router.is_traced:
            # A copy (+ 0): a view would keep the cache's arrays, so that mlx-lm could not write to them in place.
            gates = router.values[:, 0, router.size() - tokens.shape[1] : router.size(), 1:] + 0
            # The thread of a request reads the gates: they are evaluated with the logits, on the thread that built them.
            logits = mx.depends(logits, gates)
            router.add(gates)
        return logits


def with_trace(layers: list[Any], trace: GateTrace | None) -> list[Any]:
    """Return the caches of a row, those of the model first, with a trace in its router cache."""
    *first, router = layers[0].caches
    return [CacheList(*first, TracedCache(router, trace)), *layers[1:]]


def without_trace(layers: list[Any]) -> list[Any]:
    """Return the caches of a row without a trace, as they are kept for other requests."""
    *first, router = layers[0].caches
    return [CacheList(*first, router.plain() if isinstance(router, TracedCache) else router), *layers[1:]]
