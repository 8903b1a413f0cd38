"""The router: a linear gate over adapter-free features, dense or top-k (Shazeer et al. 2017, section 2.1).

From logits to gates, in this order: the k largest, softmax, the floor of a young expert, the experts' capacity.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from dylora_mlx.errors import UserError
from dylora_mlx.model.kernels import numerics


class Routing(NamedTuple):
    """How gates are made from logits: top_k experts per token (None: dense), temperature a float32 scalar.

    young: column of an expert whose gate is at least `floor`; capacity: see `limited`, 0 for no limit. All but the
    temperature are part of a compiled step; the temperature is data and may change without compiling again.
    """

    top_k: int | None
    temperature: mx.array
    trainable_expert: int = 0
    min_gate: float = 0.0
    capacity_factor: float = 0.0


class GateRow(nn.Module):
    """The gate of one expert: weight [D] and bias [1], float32. A row of its own, so that growth never resizes an
    array and each row keeps its optimizer moments."""

    def __init__(self, dims: int):
        super().__init__()
        self.weight = mx.zeros((dims,))
        self.bias = mx.zeros((1,))

    def load_arrays(self, arrays: dict[str, mx.array]) -> None:
        """Take weight and bias of a checkpoint. Raises UserError for what is no row of this size."""
        _load_arrays(self, arrays)


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

    def set_gate(self, gate: Gate) -> None:
        """Give the rows the values of a whole gate."""
        for number, row in enumerate(self.rows):
            row.weight, row.bias = gate.weight[number], gate.bias[number : number + 1]

    def load_arrays(self, arrays: dict[str, mx.array]) -> None:
        """Give the rows that are there the weights of a checkpoint, {rows.E.weight: [D], rows.E.bias: [1]}.

        Raises UserError for a row too many or too few, and for one of another size or that is not finite.
        """
        _load_arrays(self, arrays)

    def __call__(self, features: mx.array) -> mx.array:
        return logits(features, self.gate())


def _load_arrays(rows: nn.Module, arrays: dict[str, mx.array]) -> None:
    own = dict(tree_flatten(rows.parameters()))
    for name in own.keys() ^ arrays.keys():
        raise UserError(f"the router's '{name}' is {'missing' if name in own else 'not that of an expert'}")
    for name, value in arrays.items():
        if value.shape != own[name].shape or value.dtype != mx.float32 or not mx.isfinite(value).all().item():
            raise UserError(f"the router's '{name}' is no row of {own[name].size} finite float32 numbers")
    rows.update(tree_unflatten(list(arrays.items())))


def logits(features: mx.array, gate: Gate) -> mx.array:
    """Logits [..., E], float32, of features [..., D]."""
    return features.astype(mx.float32) @ gate.weight.T + gate.bias


def cross_entropy(logits: mx.array, expert_ids: mx.array) -> mx.array:
    """Cross-entropy in nats, [...], of logits [..., E] against the experts that tokens belong to, int32 [...]."""
    return mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, expert_ids[..., None], axis=-1)[..., 0]


def forced_routing() -> Routing:
    """For passes whose gates are given and send every token to at most one expert."""
    return Routing(1, mx.array(1.0))


def route(
    features: mx.array, gate: Gate, routing: Routing, valid_mask: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Logits and gates, [..., E] each, of features [..., D]."""
    found = logits(features, gate)
    return found, gates(found, routing, valid_mask)


def gates(logits: mx.array, routing: Routing, valid_mask: mx.array | None = None) -> mx.array:
    """Gates [..., E] that sum to one, of logits [..., E].

    real: [...], 0 on padding, which takes no capacity; None: all tokens are real.
    """
    found = top_k_softmax(logits / routing.temperature, routing.top_k)
    if routing.min_gate:
        own = mx.arange(logits.shape[-1]) == routing.trainable_expert
        found = (1 - routing.min_gate) * found + routing.min_gate * own
    if routing.capacity_factor:
        found = apply_capacity(
            found,
            mx.ones(logits.shape[:-1]) if valid_mask is None else valid_mask,
            routing.capacity_factor,
            routing.top_k,
        )
    return found


def top_k_softmax(scaled: mx.array, top_k: int | None) -> mx.array:
    """softmax of scaled logits [..., E], or over the k largest with zeros elsewhere.

    Ties are broken so that exactly k gates are non-zero.
    """
    experts = scaled.shape[-1]
    if top_k is None or top_k >= experts:
        return mx.softmax(scaled, axis=-1)
    largest = numerics.top_k_indices(scaled, top_k)
    kept = mx.zeros(scaled.shape, mx.bool_)
    for place in range(top_k):  # not all at once: [..., E, k] would be k times as large as the gates
        kept = kept | (largest[..., place : place + 1] == mx.arange(experts))
    return mx.softmax(mx.where(kept, scaled, -mx.inf), axis=-1)


def apply_capacity(gates: mx.array, valid_mask: mx.array, capacity: float, top_k: int | None) -> mx.array:
    """Gates [..., E] with which no expert serves more than ceil(capacity * N * k / E) of the N real tokens.

    The overflow rule: an expert keeps the tokens whose gate for it is largest (Riquelme et al. 2021, "V-MoE", batch
    prioritized routing), of equal ones those that come first; the others' share of it goes to the base, column 0, which
    has no limit. The gates still sum to one. real: [...], 0 on padding; k is E where routing is dense.
    """
    experts = gates.shape[-1]
    flat = gates.reshape(-1, experts)
    counts = mx.stop_gradient(mx.where(valid_mask.reshape(-1, 1) > 0, flat, 0.0))
    share = capacity * (top_k or experts) / experts
    room = mx.ceil(share * (valid_mask > 0).sum() - 1e-4)  # the share's rounding must not open another place
    order = mx.argsort(-counts, axis=0)
    places = mx.argsort(order, axis=0)
    kept = mx.where((places < room) | (mx.arange(experts) == 0), flat, 0.0)
    base = mx.concatenate([(flat - kept).sum(-1, keepdims=True), mx.zeros_like(flat[:, 1:])], axis=-1)
    return (kept + base).reshape(gates.shape)


def mean_logits(logits: mx.array, valid_mask: mx.array) -> mx.array:
    """One row of logits for a whole prompt, [B, 1, E]: the mean of logits [B, L, E] over real tokens [B, L]."""
    weight = valid_mask / mx.maximum(valid_mask.sum(-1, keepdims=True), 1)
    return (logits * weight[..., None]).sum(1, keepdims=True)


def entropy(gate: mx.array) -> mx.array:
    """Entropy in nats, [...], of gates [..., E]."""
    return -mx.sum(gate * mx.log(mx.maximum(gate, 1e-9)), axis=-1)
