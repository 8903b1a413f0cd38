"""One LoRA expert, and the mixture of all experts on one projection.

Hu et al. 2021, "LoRA", section 4.1, with a gate for every token and expert:

    y = x W + sum_e g_e (alpha_e / r_e) (x A_e) B_e

The sum is computed at once over the concatenated ranks, R = sum of r_e: z = x A [B, L, R]; z *= G; y = x W + z B. Where
each token uses few of many experts, those that are not learned are looked up instead (see lookup.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn

from dylora_mlx.model.experts import gather
from dylora_mlx.model.experts.gather import TableIndex, Tables, TableSource, TopKPairs

Shapes = dict[int, dict[str, tuple[int, int]]]


class LoRAFactors(nn.Module):
    """The factors of one projection's update: lora_a [inputs, r], lora_b [r, outputs], float32.

    The names and shapes are mlx-lm's. A is uniform within 1 / sqrt(inputs), B is zero: a new expert is the identity.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, key: mx.array):
        super().__init__()
        bound = inputs**-0.5
        self.lora_a = mx.random.uniform(-bound, bound, (inputs, rank), key=key)
        self.lora_b = mx.zeros((rank, outputs))

    @classmethod
    def from_factors(cls, a: mx.array, b: mx.array) -> LoRAFactors:
        """Of factors that are there: nothing is drawn."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.lora_a, made.lora_b = a, b
        return made


class Expert(nn.Module):
    """One expert: a low-rank update for each named projection of each of its layers.

    shapes: {layer: {projection: (inputs, outputs)}}. `layers` has an entry for every layer up to the last, empty below
    the lowest that carries experts.
    """

    def __init__(self, shapes: Shapes, rank: int, alpha: float, key: mx.array):
        super().__init__()
        self.rank, self.alpha = rank, alpha
        keys = iter(mx.random.split(key, sum(map(len, shapes.values()))))
        self.layers = [
            {name: LoRAFactors(*shape, rank, next(keys)) for name, shape in shapes.get(layer, {}).items()}
            for layer in range(max(shapes) + 1)
        ]

    @property
    def scale(self) -> float:
        """alpha / r, what mlx-lm calls scale."""
        return self.alpha / self.rank


class ProjectionFactors(NamedTuple):
    """Experts of one projection: concatenated factors a [inputs, R] and b [R, outputs], or None, and tables, what makes
    them, or None.

    learned: factors of the last concatenated ranks, the only ones with a gradient; None where nothing is learned.
    """

    a: mx.array | None
    b: mx.array | None
    trainable: tuple[mx.array, mx.array] | None = None
    tables: Tables | Callable[[], Tables] | None = None


Layers = dict[int, dict[str, ProjectionFactors]]
FactorPair = tuple[mx.array, mx.array]
FactorPairs = dict[int, dict[str, FactorPair]]


class ExpertGates(NamedTuple):
    """What the gates of the rows at hand say: of concatenated ranks [B, L, R], and of the tables."""

    by_rank: mx.array
    top_k_pairs: TopKPairs | None = None


class Mixture(NamedTuple):
    """Factors by layer and projection, and the gates of the rows at hand."""

    layers: Layers
    gates: ExpertGates


class Stack(NamedTuple):
    """Some experts for one step: factors by layer and projection, and spread [E, R], the gates' way to the concatenated
    ranks. index: of the experts in tables, None if there are none; lend: where the tables are made for each pass.

    spread has alpha_e / r_e where a rank belongs to gate column e, and zeros elsewhere; row 0, the null expert's, is zero.
    """

    layers: Layers
    rank_scale: mx.array
    table_index: TableIndex | None = None
    load_experts: Callable[[], TableSource] | None = None

    def rank_gates(self, gates: mx.array) -> mx.array:
        """Gates [B, L, E] spread over the concatenated ranks, [B, L, R]."""
        # A product with a matrix: its gradient is a product too, where a gather's would be a scatter.
        return gates @ self.rank_scale

    def apply_gates(self, gates: mx.array, top_k: int | None, dtype: mx.Dtype) -> Mixture | None:
        """The mixture under gates [B, L, E], at most top_k of which are not zero (None: any number, which tables do not
        serve); None without experts."""
        if not self.layers:
            return None
        layers, picked = self.layers, None
        if self.table_index is not None:
            assert top_k is not None, "tables serve the chosen experts only"
            lent = self.load_experts() if self.load_experts else None
            picked = gather.top_k_pairs(self.table_index, gates, top_k, dtype, lent)
            layers = _with_loaded_tables(layers, lent) if lent else layers
        return Mixture(layers, ExpertGates(self.rank_gates(gates).astype(dtype), picked))


def _with_loaded_tables(layers: Layers, lent: TableSource) -> Layers:
    return {
        layer: {name: f._replace(tables=partial(lent.tables, layer, name)) for name, f in named.items()}
        for layer, named in layers.items()
    }


def stack_dense(experts: Sequence[Expert], expert_ids: Sequence[int], dtype: mx.Dtype) -> Stack:
    """Concatenate the factors of the experts with these gate columns (column e is expert e - 1), cast to `dtype`."""
    chosen = [experts[expert_id - 1] for expert_id in expert_ids]

    def concatenated(parts: list[LoRAFactors]) -> ProjectionFactors:
        a = mx.concatenate([p.lora_a for p in parts], axis=1).astype(dtype)
        return ProjectionFactors(a, mx.concatenate([p.lora_b for p in parts], axis=0).astype(dtype))

    owner = mx.array([expert_id for expert_id in expert_ids for _ in range(experts[expert_id - 1].rank)], mx.int32)
    scale = mx.array([expert.scale for expert in chosen for _ in range(expert.rank)], mx.float32)
    return Stack(_map_factors(chosen, concatenated), (mx.arange(len(experts) + 1)[:, None] == owner[None, :]) * scale)


def stack_for_gather(experts: Sequence[Expert], expert_ids: Sequence[int], dtype: mx.Dtype) -> Stack:
    """The experts with these gate columns as tables, which cost a token what the experts that it uses cost."""
    chosen = [experts[expert_id - 1] for expert_id in expert_ids]

    def as_tables(parts: list[LoRAFactors]) -> ProjectionFactors:
        return ProjectionFactors(None, None, None, gather.stack_tables([(p.lora_a, p.lora_b) for p in parts], dtype))

    index = gather.table_index(expert_ids, [expert.scale for expert in chosen], len(experts) + 1)
    return Stack(_map_factors(chosen, as_tables), mx.zeros((len(experts) + 1, 0)), index)


def _map_factors(chosen: Sequence[Expert], make: Callable[[list[LoRAFactors]], ProjectionFactors]) -> Layers:
    """Of every layer and projection what `make` makes of all experts' factors."""
    return {
        layer: {name: make([expert.layers[layer][name] for expert in chosen]) for name in projections}
        for layer, projections in enumerate(chosen[0].layers if chosen else [])
    }


def join_stacks(frozen: Stack, young: Stack) -> Stack:
    """Both stacks as one, frozen ranks first; the young ones' factors are what is learned."""
    if not young.layers:
        return frozen
    layers = {
        layer: {
            name: _join_factors(frozen.layers[layer][name] if frozen.layers else None, own)
            for name, own in named.items()
        }
        for layer, named in young.layers.items()
    }
    return Stack(
        layers, mx.concatenate([frozen.rank_scale, young.rank_scale], axis=1), frozen.table_index, frozen.load_experts
    )


def _join_factors(frozen: ProjectionFactors | None, young: ProjectionFactors) -> ProjectionFactors:
    own = cast(FactorPair, (young.a, young.b))  # what is learned is concatenated
    if frozen is None or frozen.a is None or frozen.b is None:
        return ProjectionFactors(*own, own, frozen and frozen.tables)
    return ProjectionFactors(
        mx.concatenate([frozen.a, own[0]], axis=1), mx.concatenate([frozen.b, own[1]], axis=0), own
    )


def factor_pairs(young: Stack) -> FactorPairs:
    """A stack's factors (a, b) by layer and projection, as a fresh tree."""
    return {
        layer: {name: cast(FactorPair, (f.a, f.b)) for name, f in named.items()}
        for layer, named in young.layers.items()
    }


def split_gradients(gradients: FactorPairs, experts: Sequence[Expert]) -> list[dict]:
    """Gradients of a young stack's factors, cut into those of its experts, laid out as `Expert.parameters` is."""
    found, begin = [], 0
    for expert in experts:
        ranks = slice(begin, begin + expert.rank)
        begin += expert.rank
        layers = [
            {
                name: {"lora_a": a[:, ranks].astype(mx.float32), "lora_b": b[ranks].astype(mx.float32)}
                for name, (a, b) in gradients[layer].items()
            }
            for layer in range(len(expert.layers))
        ]
        found.append({"layers": layers})
    return found


def project(linear: nn.Module, x: mx.array, factors: ProjectionFactors | None, gates: ExpertGates | None) -> mx.array:
    """y = x W + ((x A) * G) B and what tables add, for x [B, L, inputs]; without factors y = x W."""
    y = linear(x)
    if factors is None:
        return y
    assert gates is not None, "factors come with gates"
    if factors.tables is not None and gates.top_k_pairs is not None:
        y = y + gather.gather_update(x, factors.tables, gates.top_k_pairs)
    if factors.a is None or factors.b is None:
        return y
    if factors.trainable is None:
        return y + ((x @ factors.a) * gates.by_rank) @ factors.b
    return y + cast(tuple[mx.array, mx.array], _update(x, gates.by_rank, factors.a, factors.b, *factors.trainable))[0]


@mx.custom_function
def _update(
    x: mx.array, gates: mx.array, a: mx.array, b: mx.array, _young_a: mx.array, _young_b: mx.array
) -> tuple[mx.array, mx.array]:
    z = x @ a
    return (z * gates) @ b, z


@_update.vjp
def _update_vjp(primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]) -> tuple[mx.array, ...]:
    """Only the last ranks, the learned ones, have a gradient; [B, L, R] is all that the backward pass keeps."""
    x, gates, a, b, young_a, _ = primals
    given, z, count = cotangents[0], outputs[1], young_a.shape[1]
    weighted = given @ b.T
    d_z = weighted * gates
    flat = (-1, count)
    d_young_a = x.reshape(-1, x.shape[-1]).T @ d_z[..., -count:].reshape(flat)
    d_young_b = (z * gates)[..., -count:].reshape(flat).T @ given.reshape(-1, given.shape[-1])
    return d_z @ a.T, weighted * z, mx.zeros_like(a), mx.zeros_like(b), d_young_a, d_young_b
