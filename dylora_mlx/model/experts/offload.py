"""Offload frozen experts to files, so that a pool can be larger than memory.

The factors of a frozen expert never change, so its file is enough. Which experts a batch uses is known once its gates
are. Those are kept in memory in an LRU cache with a limit in bytes. Experts of a batch that exceed the limit are read
per projection, in the forward and again in the backward pass, and are not held in between.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from dylora_mlx.errors import Failure
from dylora_mlx.model.experts import gather, lora
from dylora_mlx.model.experts.gather import Tables
from dylora_mlx.model.experts.lora import Expert, FactorPair, LoRAFactors, Stack

FactorNames = Mapping[int, Mapping[str, tuple[str, str]]]
"""Names of an expert's A and B in its file, {layer: {projection: (a, b)}}."""
Arrays = dict[str, mx.array]


class ExpertCache:
    """LRU cache of offloaded experts' arrays, at most `budget` bytes. Threads may use it concurrently."""

    def __init__(self, budget: int):
        self.max_bytes, self.nbytes = budget, 0
        self._held: OrderedDict[Path, Arrays] = OrderedDict()
        self._lock = threading.Lock()

    def acquire(self, experts: Sequence[OffloadedExpert]) -> dict[Path, Arrays]:
        """Return the arrays of the experts that fit in memory, and mark these as most recently used.

        Experts that are not cached are read while there is room for them.
        """
        requested = {expert.path for expert in experts}
        with self._lock:
            for expert in experts:
                if expert.path in self._held:
                    self._held.move_to_end(expert.path)
                elif self._make_room(expert.nbytes, requested):
                    self._held[expert.path] = read_expert_file(expert.path)
                    # Load now: MLX arrays from a file are lazy, and other threads will share these.
                    mx.eval(self._held[expert.path])
                    self.nbytes += expert.nbytes
            return {path: self._held[path] for path in requested if path in self._held}

    def _make_room(self, needed: int, requested: set[Path]) -> bool:
        """Evict the least recently used experts, except the requested ones. Return whether there is room."""
        while self.nbytes + needed > self.max_bytes:
            oldest = next(iter(self._held), None)
            if oldest is None or oldest in requested:
                return False
            self.nbytes -= sum(array.nbytes for array in self._held.pop(oldest).values())
        return True


class OffloadedExpert(Expert):
    """A frozen expert that is stored in a file.

    Every access to `layers` reads the file. The factors are not registered with nn.Module, so an optimizer does not see
    them; `parameters()` returns them nevertheless.
    """

    names: FactorNames

    def __init__(self, path: Path, names: FactorNames, rank: int, alpha: float, nbytes: int, cache: ExpertCache):
        nn.Module.__init__(self)
        self.path, self.rank, self.alpha, self.nbytes, self.cache = path, rank, alpha, nbytes, cache
        object.__setattr__(self, "names", names)  # nn.Module would register a mapping as parameters

    @property
    def layers(self) -> list[dict[str, LoRAFactors]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Factors by layer and projection. MLX loads each array lazily, when it is evaluated."""
        arrays = read_expert_file(self.path)
        return [
            {name: LoRAFactors.from_factors(arrays[a], arrays[b]) for name, (a, b) in self.names.get(layer, {}).items()}
            for layer in range(max(self.names) + 1)
        ]

    def parameters(self) -> dict:
        return {"layers": [{name: factors.parameters() for name, factors in named.items()} for named in self.layers]}


class LoadedExperts:
    """Table source of one pass: loads the experts that the pass uses, out of those that it may use."""

    def __init__(self, experts: Sequence[Expert], dtype: mx.Dtype):
        self._experts, self._dtype = experts, dtype
        self._used: list[Expert] = []
        self._held: dict[Path, Arrays] = {}
        self._read: dict[Path, Arrays] = {}

    def select(self, rows: mx.array, weights: mx.array) -> mx.array:
        """Select the experts with a non-zero weight, and renumber the rows accordingly.

        Args:
            rows: Positions among the experts that may be used, int32 [P].
            weights: Weights [P] of the pairs.

        Returns:
            Rows of the tables of the used experts, int32 [P].
        """
        # Conversion to NumPy evaluates the gates: which files to read depends on them. So this pass cannot be compiled.
        row_ids, nonzero = np.array(rows), np.array(mx.stop_gradient(weights).astype(mx.float32)) != 0
        # Keep at least one expert, so that the tables are not empty; pairs of weight zero refer to the first.
        used = np.unique(row_ids[nonzero]) if nonzero.any() else row_ids[:1]
        self._used = [self._experts[row] for row in used]
        offloaded = [expert for expert in self._used if isinstance(expert, OffloadedExpert)]
        self._held = offloaded[0].cache.acquire(offloaded) if offloaded else {}
        return mx.array(np.searchsorted(used, np.where(nonzero, row_ids, used[0])).astype(np.int32))

    def tables(self, layer: int, name: str) -> Tables:
        """Return the tables of one projection for the used experts."""
        return gather.stack_tables([self._factors(expert, layer, name) for expert in self._used], self._dtype)

    def _factors(self, expert: Expert, layer: int, name: str) -> FactorPair:
        """Return an expert's (A, B) of one projection, from memory, the cache or its file."""
        if not isinstance(expert, OffloadedExpert):
            factors = expert.layers[layer][name]
            return factors.lora_a, factors.lora_b
        a, b = expert.names[layer][name]
        if expert.path in self._held:
            return self._held[expert.path][a], self._held[expert.path][b]
        # Pop each array, so that its memory is free after its use. The backward pass misses it and reads the file again.
        if a not in self._read.get(expert.path, {}):
            self._read[expert.path] = read_expert_file(expert.path)
        arrays = self._read[expert.path]
        return arrays.pop(a), arrays.pop(b)


def stack_offloaded(experts: Sequence[Expert], expert_ids: Sequence[int], dtype: mx.Dtype) -> Stack:
    """Return a stack of the experts with these expert_ids, offloaded or not, whose tables are built for each pass."""
    chosen = [experts[expert_id - 1] for expert_id in expert_ids]
    index = gather.table_index(expert_ids, [expert.scale for expert in chosen], len(experts) + 1)
    layers = {
        layer: {name: lora.ProjectionFactors(None, None) for name in named}
        for layer, named in expert_projections(chosen[0]).items()
    }
    return Stack(layers, mx.zeros((len(experts) + 1, 0)), index, lambda: LoadedExperts(chosen, dtype))


def expert_projections(expert: Expert) -> Mapping[int, Mapping[str, object]]:
    """Return the adapted projections of an expert by layer, without reading an offloaded expert's file."""
    return expert.names if isinstance(expert, OffloadedExpert) else dict(enumerate(expert.layers))


def load_expert(expert: OffloadedExpert, shapes: lora.Shapes) -> Expert:
    """Return an offloaded expert as an in-memory expert that can be trained."""
    loaded = Expert(shapes, expert.rank, expert.alpha, mx.random.key(0))
    for target, source in zip(loaded.layers, expert.layers, strict=True):
        target.update(source)
    mx.eval(loaded.parameters())
    return loaded


def read_expert_file(path: Path) -> Arrays:
    """Return an expert's arrays, loaded lazily. Raises Failure if the file is gone or damaged."""
    with _raise_failure(path):
        return cast(Arrays, mx.load(str(path)))


@contextmanager
def _raise_failure(path: Path) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise Failure(f"{path}: an expert's file is gone or damaged while it was in use; load the run again") from error
