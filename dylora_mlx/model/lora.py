"""One LoRA expert, and the mixture of all experts on one projection.

Hu et al. 2021, "LoRA", section 4.1, with a gate for every token and expert:

    y = x W + sum_e g_e (alpha_e / r_e) (x A_e) B_e

The sum is computed at once over the concatenated ranks, R = sum of r_e: z = x A [B, L, R]; z *= G; y = x W + z B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn

Shapes = dict[int, dict[str, tuple[int, int]]]


class LowRank(nn.Module):
    """The factors of one projection's update: lora_a [inputs, r], lora_b [r, outputs], float32.

    The names and shapes are mlx-lm's. A is uniform within 1 / sqrt(inputs), B is zero: a new expert is the identity.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, key: mx.array):
        super().__init__()
        bound = inputs**-0.5
        self.lora_a = mx.random.uniform(-bound, bound, (inputs, rank), key=key)
        self.lora_b = mx.zeros((rank, outputs))


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
            {name: LowRank(*shape, rank, next(keys)) for name, shape in shapes.get(layer, {}).items()}
            for layer in range(max(shapes) + 1)
        ]

    @property
    def scale(self) -> float:
        """alpha / r, what mlx-lm calls scale."""
        return self.alpha / self.rank


class Factors(NamedTuple):
    """Concatenated factors of one projection: a [inputs, R], b [R, outputs].

    learned: factors of the last ranks, the only ones with a gradient; None where nothing is learned.
    """

    a: mx.array
    b: mx.array
    learned: tuple[mx.array, mx.array] | None = None


Layers = dict[int, dict[str, Factors]]
Pairs = dict[int, dict[str, tuple[mx.array, mx.array]]]


class Stack(NamedTuple):
    """Some experts for one step: factors by layer and projection, and spread [E, R], the gates' way to the ranks.

    spread has alpha_e / r_e where a rank belongs to gate column e, and zeros elsewhere; row 0, the null expert's, is zero.
    """

    layers: Layers
    spread: mx.array

    def rank_gates(self, gates: mx.array) -> mx.array:
        """Gates [B, L, E] spread over the ranks, [B, L, R]."""
        # A product with a matrix: its gradient is a product too, where a gather's would be a scatter.
        return gates @ self.spread


class Mixture(NamedTuple):
    """Factors by layer and projection, and the rank gates [B, L, R] of the rows at hand."""

    layers: Layers
    rank_gates: mx.array


def stack(experts: Sequence[Expert], columns: Sequence[int], dtype: mx.Dtype) -> Stack:
    """Concatenate the factors of the experts with these gate columns (column e is expert e - 1), cast to `dtype`."""
    chosen = [experts[column - 1] for column in columns]
    layers: Layers = {}
    for layer, projections in enumerate(chosen[0].layers if chosen else []):
        layers[layer] = {}
        for name in projections:
            parts = [expert.layers[layer][name] for expert in chosen]
            a = mx.concatenate([p.lora_a for p in parts], axis=1).astype(dtype)
            b = mx.concatenate([p.lora_b for p in parts], axis=0).astype(dtype)
            layers[layer][name] = Factors(a, b)
    owner = mx.array([column for column in columns for _ in range(experts[column - 1].rank)], mx.int32)
    scale = mx.array([expert.scale for expert in chosen for _ in range(expert.rank)], mx.float32)
    return Stack(layers, (mx.arange(len(experts) + 1)[:, None] == owner[None, :]) * scale)


def kept(frozen: Stack) -> Stack:
    """A stack of arrays of its own, evaluated: a compiled step may hold it beside the model that it came from."""
    layers = {
        layer: {name: Factors(f.a + 0, f.b + 0) for name, f in named.items()} for layer, named in frozen.layers.items()
    }
    own = Stack(layers, frozen.spread + 0)
    mx.eval(own)
    return own


def joined(frozen: Stack, young: Stack) -> Stack:
    """Both stacks as one, frozen ranks first; the young ones' factors are what is learned."""
    if not young.layers:
        return frozen
    layers = {
        layer: {name: _join(frozen.layers[layer][name] if frozen.layers else None, own) for name, own in named.items()}
        for layer, named in young.layers.items()
    }
    return Stack(layers, mx.concatenate([frozen.spread, young.spread], axis=1))


def _join(frozen: Factors | None, young: Factors) -> Factors:
    if frozen is None:
        return Factors(young.a, young.b, (young.a, young.b))
    a, b = mx.concatenate([frozen.a, young.a], axis=1), mx.concatenate([frozen.b, young.b], axis=0)
    return Factors(a, b, (young.a, young.b))


def pairs(young: Stack) -> Pairs:
    """A stack's factors (a, b) by layer and projection, as a fresh tree."""
    return {layer: {name: (f.a, f.b) for name, f in named.items()} for layer, named in young.layers.items()}


def split(gradients: Pairs, experts: Sequence[Expert]) -> list[dict]:
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


def project(linear: nn.Module, x: mx.array, factors: Factors | None, gates: mx.array | None) -> mx.array:
    """y = x W + ((x A) * G) B, for x [B, L, inputs]; without factors y = x W."""
    y = linear(x)
    if factors is None:
        return y
    assert gates is not None, "factors come with gates"
    if factors.learned is None:
        return y + ((x @ factors.a) * gates) @ factors.b
    return y + cast(tuple[mx.array, mx.array], _update(x, gates, factors.a, factors.b, *factors.learned))[0]


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
