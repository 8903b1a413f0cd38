"""One LoRA expert, and the mixture of all experts on one projection.

Hu et al. 2021, "LoRA", section 4.1, with a gate for every token and expert:

    y = x W + sum_e g_e (alpha_e / r_e) (x A_e) B_e

The sum is computed at once over the concatenated ranks, R = sum of r_e: z = x A [B, L, R]; z *= G; y = x W + z B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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
    """Concatenated factors of one projection: a [inputs, R], b [R, outputs]."""

    a: mx.array
    b: mx.array


class Mixture(NamedTuple):
    """All experts for one step: factors by layer and projection, and rank gates [B, L, R] (gate times alpha / r)."""

    factors: dict[int, dict[str, Factors]]
    rank_gates: mx.array


def concatenate(experts: Sequence[Expert], dtype: mx.Dtype) -> dict[int, dict[str, Factors]]:
    """Concatenate the experts' factors along the rank, cast to the base's dtype."""
    joined: dict[int, dict[str, Factors]] = {}
    for layer, projections in enumerate(experts[0].layers if experts else []):
        joined[layer] = {}
        for name in projections:
            parts = [expert.layers[layer][name] for expert in experts]
            a = mx.concatenate([p.lora_a for p in parts], axis=1).astype(dtype)
            b = mx.concatenate([p.lora_b for p in parts], axis=0).astype(dtype)
            joined[layer][name] = Factors(a, b)
    return joined


def rank_gates(gates: mx.array, experts: Sequence[Expert], dtype: mx.Dtype) -> mx.array:
    """Spread gates [B, L, E] over the ranks: [B, L, R] of g_e * alpha_e / r_e. Column 0, the null expert, has none."""
    ranks = [expert.rank for expert in experts]
    owner = mx.array([e for e, rank in enumerate(ranks) for _ in range(rank)])
    scale = mx.array([expert.scale for expert in experts])
    # A product with a scaled 0/1 matrix: its gradient is a product too, where a gather's would be a scatter.
    spread = (mx.arange(len(ranks))[:, None] == owner[None, :]) * scale[:, None]
    return (gates[..., 1:] @ spread).astype(dtype)


def project(linear: nn.Module, x: mx.array, factors: Factors | None, gates: mx.array | None) -> mx.array:
    """y = x W + ((x A) * G) B, for x [B, L, inputs]; without factors y = x W."""
    y = linear(x)
    if factors is None:
        return y
    assert gates is not None, "factors come with gates"
    return y + ((x @ factors.a) * gates) @ factors.b
