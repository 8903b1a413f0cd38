"""One LoRA expert, and the mixture of all experts on one projection.

This is Hu et al. 2021, "LoRA", section 4.1, with a gate per token and expert:

    y = x W + sum_e g_e (alpha_e / r_e) (x A_e) B_e

The dense form computes the sum at once over the concatenated ranks, R = sum of r_e, where G [B, L, R] holds the scaled
gates:

    z = x A [B, L, R];  z *= G;  y = x W + z B

If each token uses few of many experts, the frozen experts are gathered per token instead (see gather.py).
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
"""{layer: {projection: (inputs, outputs)}}."""


class LoRAFactors(nn.Module):
    """The LoRA factors of one projection: lora_a [inputs, r] and lora_b [r, outputs], float32.

    Names and shapes are those of mlx-lm. A is uniform within +-1 / sqrt(inputs) and B is zero, so a new expert changes
    nothing.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, key: mx.array):
        super().__init__()
        bound = inputs**-0.5
        self.lora_a = mx.random.uniform(-bound, bound, (inputs, rank), key=key)
        self.lora_b = mx.zeros((rank, outputs))

    @classmethod
    def from_factors(cls, a: mx.array, b: mx.array) -> LoRAFactors:
        """Wrap existing factors, without drawing random ones."""
        factors = cls.__new__(cls)
        nn.Module.__init__(factors)
        factors.lora_a, factors.lora_b = a, b
        return factors


class Expert(nn.Module):
    """One expert: a LoRA update for each adapted projection of each of its layers.

    `shapes` is {layer: {projection: (inputs, outputs)}}. `layers` has an entry for every layer up to the last; it is
    empty below the lowest layer that carries experts.
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
        """Return alpha / r, which mlx-lm calls scale."""
        return self.alpha / self.rank


class Dropout(NamedTuple):
    """Dropout of the inputs of one projection's trainable factors (LoRA dropout)."""

    rate: float
    """Share of the inputs that are dropped, from 0 to below 1; the others are scaled by 1 / (1 - rate)."""
    key: mx.array
    """Random key of the mask, uint32 [2]."""

    def __call__(self, x: mx.array) -> mx.array:
        # Without a gradient, which mx.checkpoint asks of all its inputs and random bits have none.
        keep, key = 1 - self.rate, mx.stop_gradient(self.key)
        return x * (mx.random.bernoulli(keep, x.shape, key=key) * (1 / keep)).astype(x.dtype)


class ProjectionFactors(NamedTuple):
    """The experts of one projection: dense concatenated factors, gather tables, or both."""

    a: mx.array | None
    """Concatenated A [inputs, R]; None without dense experts."""
    b: mx.array | None
    """Concatenated B [R, outputs]; None without dense experts."""
    trainable: tuple[mx.array, mx.array] | None = None
    """(A, B) of the last concatenated ranks, the only ones with a gradient; None if nothing is trained."""
    tables: Tables | Callable[[], Tables] | None = None
    """Tables of the gathered experts, or a function that builds them; None without gathered experts."""
    dropout: Dropout | None = None
    """Dropout of the inputs of the trainable factors; None without one."""


Layers = dict[int, dict[str, ProjectionFactors]]
"""Factors by layer and projection."""
FactorPair = tuple[mx.array, mx.array]
"""(A [inputs, R], B [R, outputs])."""
FactorPairs = dict[int, dict[str, FactorPair]]


class ExpertGates(NamedTuple):
    """Gates of the tokens of one batch, in the forms that projections use."""

    by_rank: mx.array
    """Gate times alpha / r for each concatenated rank, [B, L, R]."""
    top_k_pairs: TopKPairs | None = None
    """Selected (token, expert) pairs for the tables; None without gathered experts."""


class Mixture(NamedTuple):
    """The factors of all projections, with the gates of one batch."""

    layers: Layers
    gates: ExpertGates


class Stack(NamedTuple):
    """Experts laid out for a step: factors by layer and projection, and the maps from gates to these factors."""

    layers: Layers
    rank_scale: mx.array
    """[E, R]: alpha_e / r_e where the rank belongs to expert_id e, zero elsewhere. Row 0 (the null expert) is zero."""
    table_index: TableIndex | None = None
    """Index of the experts in gather tables; None if there are no tables."""
    load_experts: Callable[[], TableSource] | None = None
    """Creates the source of the tables of one pass if experts are offloaded; None if all are in memory."""

    def rank_gates(self, gates: mx.array) -> mx.array:
        """Return the scaled gates of the concatenated ranks, [B, L, R], for gates [B, L, E]."""
        # Use a matmul, not a gather: its gradient is a matmul too, while the gradient of a gather is a scatter.
        return gates @ self.rank_scale

    def apply_gates(self, gates: mx.array, top_k: int | None, dtype: mx.Dtype) -> Mixture | None:
        """Return the mixture under gates [B, L, E], or None if there are no experts.

        Args:
            gates: [B, L, E].
            top_k: Upper bound of the non-zero gates of a token. None means any number, which gather tables do not
                support.
            dtype: dtype of the gates in the mixture.
        """
        if not self.layers:
            return None
        layers, pairs = self.layers, None
        if self.table_index is not None:
            assert top_k is not None, "tables serve the chosen experts only"
            source = self.load_experts() if self.load_experts else None
            pairs = gather.top_k_pairs(self.table_index, gates, top_k, dtype, source)
            layers = _with_loaded_tables(layers, source) if source else layers
        return Mixture(layers, ExpertGates(self.rank_gates(gates).astype(dtype), pairs))


def _with_loaded_tables(layers: Layers, source: TableSource) -> Layers:
    """Let each projection build its tables from the source when it is computed."""
    return {
        layer: {name: f._replace(tables=partial(source.tables, layer, name)) for name, f in named.items()}
        for layer, named in layers.items()
    }


def stack_dense(experts: Sequence[Expert], expert_ids: Sequence[int], dtype: mx.Dtype) -> Stack:
    """Concatenate the factors of the experts with these expert_ids (expert_id e is experts[e - 1]), cast to `dtype`."""
    chosen = [experts[expert_id - 1] for expert_id in expert_ids]

    def concatenated(parts: list[LoRAFactors]) -> ProjectionFactors:
        a = mx.concatenate([p.lora_a for p in parts], axis=1).astype(dtype)
        return ProjectionFactors(a, mx.concatenate([p.lora_b for p in parts], axis=0).astype(dtype))

    owner_ids = mx.array([expert_id for expert_id in expert_ids for _ in range(experts[expert_id - 1].rank)], mx.int32)
    scale = mx.array([expert.scale for expert in chosen for _ in range(expert.rank)], mx.float32)
    return Stack(
        _map_factors(chosen, concatenated), (mx.arange(len(experts) + 1)[:, None] == owner_ids[None, :]) * scale
    )


def stack_for_gather(experts: Sequence[Expert], expert_ids: Sequence[int], dtype: mx.Dtype) -> Stack:
    """Stack the experts with these expert_ids in tables to gather from.

    The cost of a token is then that of the experts that it uses.
    """
    chosen = [experts[expert_id - 1] for expert_id in expert_ids]

    def as_tables(parts: list[LoRAFactors]) -> ProjectionFactors:
        return ProjectionFactors(None, None, None, gather.stack_tables([(p.lora_a, p.lora_b) for p in parts], dtype))

    index = gather.table_index(expert_ids, [expert.scale for expert in chosen], len(experts) + 1)
    return Stack(_map_factors(chosen, as_tables), mx.zeros((len(experts) + 1, 0)), index)


def _map_factors(chosen: Sequence[Expert], make: Callable[[list[LoRAFactors]], ProjectionFactors]) -> Layers:
    """Apply `make` to the factors that the experts have for each layer and projection."""
    return {
        layer: {name: make([expert.layers[layer][name] for expert in chosen]) for name in projections}
        for layer, projections in enumerate(chosen[0].layers if chosen else [])
    }


def join_stacks(frozen: Stack, trainable: Stack) -> Stack:
    """Join two stacks, the frozen ranks first. Only the factors of `trainable` have a gradient."""
    if not trainable.layers:
        return frozen
    layers = {
        layer: {
            name: _join_factors(frozen.layers[layer][name] if frozen.layers else None, factors)
            for name, factors in named.items()
        }
        for layer, named in trainable.layers.items()
    }
    return Stack(
        layers,
        mx.concatenate([frozen.rank_scale, trainable.rank_scale], axis=1),
        frozen.table_index,
        frozen.load_experts,
    )


def _join_factors(frozen: ProjectionFactors | None, trainable: ProjectionFactors) -> ProjectionFactors:
    pair = cast(FactorPair, (trainable.a, trainable.b))  # a trainable stack is always dense
    if frozen is None or frozen.a is None or frozen.b is None:
        return ProjectionFactors(*pair, pair, frozen and frozen.tables)
    return ProjectionFactors(
        mx.concatenate([frozen.a, pair[0]], axis=1), mx.concatenate([frozen.b, pair[1]], axis=0), pair
    )


def with_dropout(stack: Stack, rate: float, key: mx.array) -> Stack:
    """Return a stack whose trainable factors get inputs with dropout, each projection with a mask of its own.

    The frozen experts and the base get the whole inputs: they are what they are when the model is used.
    """
    keys = iter(mx.random.split(key, sum(map(len, stack.layers.values()))))
    layers = {
        layer: {name: f._replace(dropout=Dropout(rate, next(keys))) for name, f in named.items()}
        for layer, named in stack.layers.items()
    }
    return stack._replace(layers=layers)


def factor_pairs(trainable: Stack) -> FactorPairs:
    """Return the dense factors (A, B) of a trainable stack by layer and projection, as a new tree."""
    return {
        layer: {name: cast(FactorPair, (f.a, f.b)) for name, f in named.items()}
        for layer, named in trainable.layers.items()
    }


def split_gradients(gradients: FactorPairs, experts: Sequence[Expert]) -> list[dict]:
    """Split the gradients of a trainable stack's factors by expert.

    Returns:
        One tree per expert with the layout of `Expert.parameters()`, float32.
    """
    trees, begin = [], 0
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
        trees.append({"layers": layers})
    return trees


def project(linear: nn.Module, x: mx.array, factors: ProjectionFactors | None, gates: ExpertGates | None) -> mx.array:
    """Return y = x W + ((x A) * G) B plus the gathered experts, for x [B, L, inputs].

    Without factors it returns y = x W.
    """
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
    a, b, by_rank = factors.a, factors.b, gates.by_rank
    if factors.dropout is not None:
        frozen = a.shape[1] - factors.trainable[0].shape[1]
        if frozen:
            y = y + ((x @ a[:, :frozen]) * by_rank[..., :frozen]) @ b[:frozen]
        x, by_rank, (a, b) = factors.dropout(x), by_rank[..., frozen:], factors.trainable
    return y + cast(tuple[mx.array, mx.array], _update(x, by_rank, a, b, *factors.trainable))[0]


@mx.custom_function
def _update(
    x: mx.array, gates: mx.array, a: mx.array, b: mx.array, _trainable_a: mx.array, _trainable_b: mx.array
) -> tuple[mx.array, mx.array]:
    z = x @ a
    return (z * gates) @ b, z


@_update.vjp
def _update_vjp(primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]) -> tuple[mx.array, ...]:
    """Compute gradients of x, of the gates and of the last ranks, the trainable ones.

    A and B of the frozen ranks get zeros. The backward pass keeps only z [B, L, R]. `a` and `b` already contain the
    trainable factors; these are separate inputs so that they receive the gradient.
    """
    x, gates, a, b, trainable_a, _ = primals
    d_y, z, count = cotangents[0], outputs[1], trainable_a.shape[1]
    weighted = d_y @ b.T
    d_z = weighted * gates
    flat = (-1, count)
    d_trainable_a = x.reshape(-1, x.shape[-1]).T @ d_z[..., -count:].reshape(flat)
    d_trainable_b = (z * gates)[..., -count:].reshape(flat).T @ d_y.reshape(-1, d_y.shape[-1])
    return d_z @ a.T, weighted * z, mx.zeros_like(a), mx.zeros_like(b), d_trainable_a, d_trainable_b
