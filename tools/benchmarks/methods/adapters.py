"""LoRAs with fixed gates: their weights as a trainable tree, and the base's forward pass with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.experts import lora
from dylora_mlx.model.experts.lora import Expert, ProjectionFactors, Stack
from dylora_mlx.training.step.losses import MicroBatch, batch_layout
from methods.bench import Bench
from methods.training import Forward

Stacking = Callable[[Any], Stack]
"""Builds the stack of all experts from the trainable weights of one; only these have a gradient."""


def states(
    model: RoutedDecoder, batch: MicroBatch, stack: Stack | None = None, gates: Sequence[float] = ()
) -> mx.array:
    """Return the final-norm states [B, L, D] of a micro-batch under the base, optionally with experts.

    Args:
        model: The decoder.
        batch: The micro-batch.
        stack: The experts; None for the base alone.
        gates: Gates by expert_id, the same for every token; that of expert_id 0 has no effect.
    """
    attn_layout, h = batch_layout(batch, model.window), model.embed(batch.inputs)
    token_gates = mx.broadcast_to(mx.array(list(gates)), (*batch.inputs.shape, len(gates)))
    mixture = stack.apply_gates(token_gates, None, h.dtype) if stack is not None else None
    h = model._run_blocks(h, attn_layout, 0, len(model.base.model.layers), mixture, [])
    return model.base.model.norm(h)


def all_on(model: RoutedDecoder, experts: Sequence[Expert]) -> Forward:
    """Return the forward pass of the base with the sum of these experts, each with gate 1 on every token."""
    stack = stacked(model, experts)
    return lambda batch: states(model, batch, stack, [1.0] * (len(experts) + 1))


def stacked(model: RoutedDecoder, experts: Sequence[Expert]) -> Stack:
    """Stack the experts with their current weights: expert e has expert_id e + 1. The arrays are evaluated."""
    stack = lora.stack_dense(experts, range(1, len(experts) + 1), model.base.model.norm.weight.dtype)
    mx.eval(stack)
    return stack


def stacking(model: RoutedDecoder, experts: Sequence[Expert], expert_id: int) -> Stacking:
    """Return a function that stacks all experts, given the weights of the one with this expert_id.

    The other experts are frozen with their current weights.
    """
    dtype = model.base.model.norm.weight.dtype
    others = [other for other in range(1, len(experts) + 1) if other != expert_id]
    frozen, rank_scale = (
        lora.stack_dense(experts, others, dtype),
        lora.stack_dense(experts, [expert_id], dtype).rank_scale,
    )
    mx.eval(frozen, rank_scale)

    def stack(weights: Any) -> Stack:
        layers = {
            layer: {
                name: ProjectionFactors(f["lora_a"].astype(dtype), f["lora_b"].astype(dtype))
                for name, f in named.items()
            }
            for layer, named in enumerate(weights["layers"])
        }
        return lora.join_stacks(frozen, Stack(layers, rank_scale))

    return stack


def weights_of(expert: Expert) -> Any:
    """Return the trainable weights of an adapter, evaluated: {"layers": [{projection: {"lora_a", "lora_b"}}]}."""
    weights = expert.parameters()
    mx.eval(weights)
    return weights


def with_weights(bench: Bench, expert: Expert, weights: Any) -> Expert:
    """Return a copy of an adapter with other weights; the original is not changed."""
    copy = bench.expert(expert.rank, 0)
    copy.update(weights)
    return copy
