"""The router: a linear gate over adapter-free features, dense or top-k (Shazeer et al. 2017, section 2.1)."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn


class Routing(NamedTuple):
    """How gates are made from logits: top_k experts per token (None: dense), temperature a float32 scalar.

    top_k is part of a compiled step; the temperature is data and may change without compiling again.
    """

    top_k: int | None
    temperature: mx.array


class GateRow(nn.Module):
    """The gate of one expert: weight [D] and bias [1], float32. A row of its own, so that growth never resizes an
    array and each row keeps its optimizer moments."""

    def __init__(self, dims: int):
        super().__init__()
        self.weight = mx.zeros((dims,))
        self.bias = mx.zeros((1,))


class Gate(NamedTuple):
    """All rows as one: weight [E, D], bias [E]."""

    weight: mx.array
    bias: mx.array


class Router(nn.Module):
    """One row per expert; row 0 is the null expert's."""

    def __init__(self, dims: int):
        super().__init__()
        self.rows = [GateRow(dims)]

    def gate(self) -> Gate:
        return Gate(mx.stack([row.weight for row in self.rows]), mx.concatenate([row.bias for row in self.rows]))

    def __call__(self, features: mx.array) -> mx.array:
        return logits(features, self.gate())


def logits(features: mx.array, gate: Gate) -> mx.array:
    """Logits [..., E], float32, of features [..., D]."""
    return features.astype(mx.float32) @ gate.weight.T + gate.bias


def gates(logits: mx.array, routing: Routing) -> mx.array:
    """Gates [..., E] that sum to one: softmax(logits / T), or softmax over the k largest with zeros elsewhere.

    Ties are broken so that exactly k gates are non-zero.
    """
    scaled = logits / routing.temperature
    experts = logits.shape[-1]
    if routing.top_k is None or routing.top_k >= experts:
        return mx.softmax(scaled, axis=-1)
    chosen = mx.argsort(-mx.stop_gradient(scaled), axis=-1)[..., : routing.top_k]
    kept = mx.any(chosen[..., None, :] == mx.arange(experts)[:, None], axis=-1)
    return mx.softmax(mx.where(kept, scaled, -mx.inf), axis=-1)


def entropy(gate: mx.array) -> mx.array:
    """Entropy in nats, [...], of gates [..., E]."""
    return -mx.sum(gate * mx.log(mx.maximum(gate, 1e-9)), axis=-1)
