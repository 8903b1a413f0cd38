"""One static expert out of several: the weighted sum of their updates, exactly, by putting their ranks side by side."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from dylora_mlx.model.experts.lora import Expert, Shapes


def blend(experts: Sequence[Expert], weights: Sequence[float], shapes: Shapes) -> Expert:
    """sum_i w_i (alpha_i / r_i) A_i B_i as one expert of rank sum r_i with alpha equal to it, so that its scale is 1.

    Weights and scales go into B. An expert of weight 0 takes no rank. Raises ValueError where nothing is left.
    """
    parts = [(expert, weight * expert.scale) for expert, weight in zip(experts, weights, strict=True) if weight]
    if not parts:
        raise ValueError("a blend needs a weight other than 0")
    rank = sum(expert.rank for expert, _ in parts)
    made, layers = Expert(shapes, rank, float(rank), mx.random.key(0)), [expert.layers for expert, _ in parts]
    for layer, projections in enumerate(made.layers):
        for name, factors in projections.items():
            found = [(own[layer][name], scale) for own, (_, scale) in zip(layers, parts, strict=True)]
            factors.lora_a = mx.concatenate([own.lora_a for own, _ in found], axis=1)
            factors.lora_b = mx.concatenate([own.lora_b * scale for own, scale in found], axis=0)
    return made
