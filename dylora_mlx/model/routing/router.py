"""The router: a linear gate over adapter-free features, dense or top-k (Shazeer et al. 2017, section 2.1).

Logits become gates in this order: select the k largest, softmax, apply the minimum gate of the expert in training,
apply the capacity limit of each expert.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from dylora_mlx.errors import UserError
from dylora_mlx.model.kernels import numerics


class Routing(NamedTuple):
    """Settings that turn router logits into gates.

    Every field but the temperature is a constant of a compiled step. The temperature is data and may change without a
    recompilation.
    """

    top_k: int | None
    """Experts per token; None for dense routing over all experts."""
    temperature: mx.array
    """Divisor of the logits, a float32 scalar."""
    trainable_expert: int = 0
    """expert_id of the expert whose gate is at least `min_gate`."""
    min_gate: float = 0.0
    """Lower bound of that expert's gate; 0 for none."""
    capacity_factor: float = 0.0
    """Capacity as a multiple of an expert's even share of the tokens, see `apply_capacity`; 0 for no limit."""


class GateRow(nn.Module):
    """The gate of one expert: weight [D] and bias [1], float32.

    Each row is a separate module, so that adding an expert resizes no array and each row keeps its optimizer moments.
    """

    def __init__(self, dims: int):
        super().__init__()
        self.weight = mx.zeros((dims,))
        self.bias = mx.zeros((1,))

    def load_arrays(self, arrays: dict[str, mx.array]) -> None:
        """Load weight and bias from a checkpoint. Raises UserError if names, shapes or values do not fit this row."""
        _load_arrays(self, arrays)


class Gate(NamedTuple):
    """The rows of all experts stacked."""

    weight: mx.array
    """float32 [E, D]."""
    bias: mx.array
    """float32 [E]."""


class Router(nn.Module):
    """A linear gate with one row per expert; row 0 belongs to the null expert."""

    def __init__(self, dims: int):
        super().__init__()
        self.rows = [GateRow(dims)]

    def gate(self) -> Gate:
        """Return all rows stacked into one gate."""
        return Gate(mx.stack([row.weight for row in self.rows]), mx.concatenate([row.bias for row in self.rows]))

    def set_gate(self, gate: Gate) -> None:
        """Set the rows from a stacked gate."""
        for expert_id, row in enumerate(self.rows):
            row.weight, row.bias = gate.weight[expert_id], gate.bias[expert_id : expert_id + 1]

    def load_arrays(self, arrays: dict[str, mx.array]) -> None:
        """Load the existing rows from a checkpoint, {rows.E.weight: [D], rows.E.bias: [1]}.

        Raises UserError for a missing or an unknown row, and for one that has another size or is not finite.
        """
        _load_arrays(self, arrays)

    def __call__(self, features: mx.array) -> mx.array:
        return logits(features, self.gate())


def _load_arrays(rows: nn.Module, arrays: dict[str, mx.array]) -> None:
    expected = dict(tree_flatten(rows.parameters()))
    for name in expected.keys() ^ arrays.keys():
        raise UserError(f"the router's '{name}' is {'missing' if name in expected else 'not that of an expert'}")
    for name, value in arrays.items():
        if value.shape != expected[name].shape or value.dtype != mx.float32 or not mx.isfinite(value).all().item():
            raise UserError(f"the router's '{name}' is not a row of {expected[name].size} finite float32 numbers")
    rows.update(tree_unflatten(list(arrays.items())))


def logits(features: mx.array, gate: Gate) -> mx.array:
    """Return logits [..., E], float32, of features [..., D]."""
    return features.astype(mx.float32) @ gate.weight.T + gate.bias


def cross_entropy(logits: mx.array, expert_ids: mx.array) -> mx.array:
    """Return the cross-entropy in nats, [...], of logits [..., E] against each token's true expert_id, int32 [...]."""
    return mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, expert_ids[..., None], axis=-1)[..., 0]


def forced_routing() -> Routing:
    """Return the routing for passes with given gates that send each token to at most one expert."""
    return Routing(1, mx.array(1.0))


def route(
    features: mx.array, gate: Gate, routing: Routing, valid_mask: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Return logits and gates, [..., E] each, of features [..., D]."""
    router_logits = logits(features, gate)
    return router_logits, gates(router_logits, routing, valid_mask)


def gates(logits: mx.array, routing: Routing, valid_mask: mx.array | None = None) -> mx.array:
    """Return gates [..., E] of logits [..., E], normalised by a softmax: they sum to one.

    Args:
        logits: Router logits [..., E].
        routing: Top-k, temperature, minimum gate and capacity.
        valid_mask: [...], 0 on padding, which takes no capacity. None means that all tokens are valid.
    """
    mixed = top_k_softmax(logits / routing.temperature, routing.top_k)
    if routing.min_gate:
        is_trainable = mx.arange(logits.shape[-1]) == routing.trainable_expert
        mixed = (1 - routing.min_gate) * mixed + routing.min_gate * is_trainable
    if routing.capacity_factor:
        mixed = apply_capacity(
            mixed,
            mx.ones(logits.shape[:-1]) if valid_mask is None else valid_mask,
            routing.capacity_factor,
            routing.top_k,
        )
    return mixed


def top_k_softmax(scaled: mx.array, top_k: int | None) -> mx.array:
    """Return the softmax of scaled logits [..., E], or over the k largest with zeros elsewhere (sparse gates).

    Ties are broken so that exactly k gates are non-zero.
    """
    experts = scaled.shape[-1]
    if top_k is None or top_k >= experts:
        return mx.softmax(scaled, axis=-1)
    largest = numerics.top_k_indices(scaled, top_k)
    selected = mx.zeros(scaled.shape, mx.bool_)
    # One of the k at a time: comparing all at once would allocate [..., E, k], k times the size of the gates.
    for i in range(top_k):
        selected = selected | (largest[..., i : i + 1] == mx.arange(experts))
    return mx.softmax(mx.where(selected, scaled, -mx.inf), axis=-1)


def apply_capacity(gates: mx.array, valid_mask: mx.array, capacity: float, top_k: int | None) -> mx.array:
    """Limit the tokens of each expert to ceil(capacity * N * k / E) of the N valid tokens.

    Overflow rule: an expert keeps the tokens with the largest gates for it (Riquelme et al. 2021, "V-MoE", batch
    prioritized routing); among equal gates, the first tokens. The gate of a dropped token moves to the base (null
    expert, expert_id 0), which has no limit. The gates still sum to one.

    Args:
        gates: [..., E].
        valid_mask: [...], 0 on padding.
        capacity: Multiple of an expert's even share of the tokens.
        top_k: k; None for dense routing, where k is E.
    """
    experts = gates.shape[-1]
    flat = gates.reshape(-1, experts)
    priority = mx.stop_gradient(mx.where(valid_mask.reshape(-1, 1) > 0, flat, 0.0))
    tokens_share = capacity * (top_k or experts) / experts
    # Subtract an epsilon: a rounding error of the share must not let the ceiling add a slot.
    slots = mx.ceil(tokens_share * (valid_mask > 0).sum() - 1e-4)
    # The argsort of an argsort is each token's rank in the expert's queue.
    order = mx.argsort(-priority, axis=0)
    ranks = mx.argsort(order, axis=0)
    kept_gates = mx.where((ranks < slots) | (mx.arange(experts) == 0), flat, 0.0)
    overflow = mx.concatenate([(flat - kept_gates).sum(-1, keepdims=True), mx.zeros_like(flat[:, 1:])], axis=-1)
    return (kept_gates + overflow).reshape(gates.shape)


def mean_logits(logits: mx.array, valid_mask: mx.array) -> mx.array:
    """Return one row of logits per prompt, [B, 1, E]: the mean of logits [B, L, E] over valid tokens [B, L]."""
    weight = valid_mask / mx.maximum(valid_mask.sum(-1, keepdims=True), 1)
    return (logits * weight[..., None]).sum(1, keepdims=True)


def entropy(gate: mx.array) -> mx.array:
    """Return the entropy in nats, [...], of gates [..., E]."""
    return -mx.sum(gate * mx.log(mx.maximum(gate, 1e-9)), axis=-1)
