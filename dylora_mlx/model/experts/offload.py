"""Experts that stand in files until a token uses them: a pool larger than memory.

A frozen expert's factors never change, so its file is all there needs to be of it. Which experts a batch uses is known once its
gates are: those stay in memory, the ones used longest ago leave it, and together they take a number of bytes at most. What
one batch uses beyond that is read for each projection, in the pass and again in its gradient, and not held between.
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
"""By layer and projection what an expert's a and b are called in its file."""
Arrays = dict[str, mx.array]


class ExpertCache:
    """The arrays of the experts used last, `budget` bytes of them at most. Lanes may ask side by side."""

    def __init__(self, budget: int):
        self.max_bytes, self.nbytes = budget, 0
        self._held: OrderedDict[Path, Arrays] = OrderedDict()
        self._lock = threading.Lock()

    def acquire(self, experts: Sequence[OffloadedExpert]) -> dict[Path, Arrays]:
        """Those of some experts that are in memory, now that they are used; as many of them as there is room for."""
        asked = {expert.path for expert in experts}
        with self._lock:
            for expert in experts:
                if expert.path in self._held:
                    self._held.move_to_end(expert.path)
                elif self._make_room(expert.nbytes, asked):
                    self._held[expert.path] = read_expert_file(expert.path)
                    mx.eval(self._held[expert.path])
                    self.nbytes += expert.nbytes
            return {path: self._held[path] for path in asked if path in self._held}

    def _make_room(self, wanted: int, asked: set[Path]) -> bool:
        """Make room, at the cost of the experts used longest ago that are not asked for."""
        while self.nbytes + wanted > self.max_bytes:
            oldest = next(iter(self._held), None)
            if oldest is None or oldest in asked:
                return False
            self.nbytes -= sum(array.nbytes for array in self._held.pop(oldest).values())
        return True


class OffloadedExpert(Expert):
    """A frozen expert that is a file. Its `layers` are read whenever they are asked for, and are no parameters."""

    names: FactorNames

    def __init__(self, path: Path, names: FactorNames, rank: int, alpha: float, nbytes: int, cache: ExpertCache):
        nn.Module.__init__(self)
        self.path, self.rank, self.alpha, self.nbytes, self.cache = path, rank, alpha, nbytes, cache
        object.__setattr__(self, "names", names)  # a module takes a mapping for parameters

    @property
    def layers(self) -> list[dict[str, LoRAFactors]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Factors by layer and projection; MLX reads each when it is computed with."""
        found = read_expert_file(self.path)
        return [
            {name: LoRAFactors.from_factors(found[a], found[b]) for name, (a, b) in self.names.get(layer, {}).items()}
            for layer in range(max(self.names) + 1)
        ]

    def parameters(self) -> dict:
        return {"layers": [{name: own.parameters() for name, own in named.items()} for named in self.layers]}


class LoadedExperts:
    """The experts that one pass uses, of those that it may use."""

    def __init__(self, experts: Sequence[Expert], dtype: mx.Dtype):
        self._experts, self._dtype = experts, dtype
        self._used: list[Expert] = []
        self._held: dict[Path, Arrays] = {}
        self._read: dict[Path, Arrays] = {}

    def select(self, rows: mx.array, weights: mx.array) -> mx.array:
        """Rows int32 [P] of the experts that may be used, as rows of those that are: whose weight [P] is not zero."""
        found, bear = np.array(rows), np.array(mx.stop_gradient(weights).astype(mx.float32)) != 0
        used = np.unique(found[bear]) if bear.any() else found[:1]
        self._used = [self._experts[row] for row in used]
        shelved = [expert for expert in self._used if isinstance(expert, OffloadedExpert)]
        self._held = shelved[0].cache.acquire(shelved) if shelved else {}
        return mx.array(np.searchsorted(used, np.where(bear, found, used[0])).astype(np.int32))

    def tables(self, layer: int, name: str) -> Tables:
        """Tables of the used experts' factors of one projection."""
        return gather.stack_tables([self._factors(expert, layer, name) for expert in self._used], self._dtype)

    def _factors(self, expert: Expert, layer: int, name: str) -> FactorPair:
        if not isinstance(expert, OffloadedExpert):
            own = expert.layers[layer][name]
            return own.lora_a, own.lora_b
        a, b = expert.names[layer][name]
        if expert.path in self._held:
            return self._held[expert.path][a], self._held[expert.path][b]
        # Each array is taken once and let go, so that it is gone when it has been used; the gradient reads the file again.
        if a not in self._read.get(expert.path, {}):
            self._read[expert.path] = read_expert_file(expert.path)
        found = self._read[expert.path]
        return found.pop(a), found.pop(b)


def stack_offloaded(experts: Sequence[Expert], expert_ids: Sequence[int], dtype: mx.Dtype) -> Stack:
    """The experts with these gate columns, in files or not, as a stack whose tables are made for each pass."""
    chosen = [experts[expert_id - 1] for expert_id in expert_ids]
    index = gather.table_index(expert_ids, [expert.scale for expert in chosen], len(experts) + 1)
    layers = {
        layer: {name: lora.ProjectionFactors(None, None) for name in named}
        for layer, named in expert_projections(chosen[0]).items()
    }
    return Stack(layers, mx.zeros((len(experts) + 1, 0)), index, lambda: LoadedExperts(chosen, dtype))


def expert_projections(expert: Expert) -> Mapping[int, Mapping[str, object]]:
    """What carries an expert, by layer and projection."""
    return expert.names if isinstance(expert, OffloadedExpert) else dict(enumerate(expert.layers))


def load_expert(expert: OffloadedExpert, shapes: lora.Shapes) -> Expert:
    """The expert in memory, to learn again."""
    made = Expert(shapes, expert.rank, expert.alpha, mx.random.key(0))
    for own, found in zip(made.layers, expert.layers, strict=True):
        own.update(found)
    mx.eval(made.parameters())
    return made


def read_expert_file(path: Path) -> Arrays:
    """An expert's arrays, read when they are computed with. Raises Failure when the file is gone."""
    with _check_exists(path):
        return cast(Arrays, mx.load(str(path)))


@contextmanager
def _check_exists(path: Path) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise Failure(f"{path}: an expert's file is gone or damaged while it was in use; load the run again") from error
