"""LoRAs with fixed gates: their weights as a tree that is learned, and the base's forward pass with some of them."""

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
"""Makes the stack of all experts of the weights that one of them has, the only ones with a gradient."""


def states(
    model: RoutedDecoder, batch: MicroBatch, stack: Stack | None = None, gates: Sequence[float] = ()
) -> mx.array:
    """Final-norm states [B, L, D] of a micro-batch: the base's, or with a stack whose columns (0: none) have these gates
    on every token."""
    where, h = batch_layout(batch, model.window), model.embed(batch.inputs)
    on = mx.broadcast_to(mx.array(list(gates)), (*batch.inputs.shape, len(gates)))
    mixture = stack.apply_gates(on, None, h.dtype) if stack is not None else None
    h = model._run_blocks(h, where, 0, len(model.base.model.layers), mixture, [])
    return model.base.model.norm(h)


def all_on(model: RoutedDecoder, experts: Sequence[Expert]) -> Forward:
    """The base with the sum of these experts, each with gate 1 on every token."""
    stack = stacked(model, experts)
    return lambda batch: states(model, batch, stack, [1.0] * (len(experts) + 1))


def stacked(model: RoutedDecoder, experts: Sequence[Expert]) -> Stack:
    """Experts as they are now, expert e in column e + 1; evaluated."""
    made = lora.stack_dense(experts, range(1, len(experts) + 1), model.base.model.norm.weight.dtype)
    mx.eval(made)
    return made


def stacking(model: RoutedDecoder, experts: Sequence[Expert], expert_id: int) -> Stacking:
    """All experts as they are, but for the one in this column, whose weights come later."""
    dtype = model.base.model.norm.weight.dtype
    others = [number for number in range(1, len(experts) + 1) if number != expert_id]
    frozen, spread = lora.stack_dense(experts, others, dtype), lora.stack_dense(experts, [expert_id], dtype).rank_scale
    mx.eval(frozen, spread)

    def stack(weights: Any) -> Stack:
        layers = {
            layer: {
                name: ProjectionFactors(f["lora_a"].astype(dtype), f["lora_b"].astype(dtype))
                for name, f in named.items()
            }
            for layer, named in enumerate(weights["layers"])
        }
        return lora.join_stacks(frozen, Stack(layers, spread))

    return stack


def weights_of(expert: Expert) -> Any:
    """What is learned of an adapter, evaluated: {"layers": [{projection: {"lora_a", "lora_b"}}]}."""
    weights = expert.parameters()
    mx.eval(weights)
    return weights


def with_weights(bench: Bench, expert: Expert, weights: Any) -> Expert:
    """An adapter like this one with these weights; the old one stays as it is."""
    made = bench.expert(expert.rank, 0)
    made.update(weights)
    return made
