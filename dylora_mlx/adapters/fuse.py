"""One static expert out of several: the weighted sum of their updates, exactly, by putting their ranks side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from dylora_mlx.adapters.mlx_lm import module_path
from dylora_mlx.model.experts.lora import Expert, Shapes


def blend_experts(experts: Sequence[Expert], weights: Sequence[float], shapes: Shapes) -> Expert:
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


QUANTIZATION_PARTS = ("scales", "biases")
"""Beside a quantised weight in an MLX checkpoint."""


def weight_updates(expert: Expert) -> dict[str, mx.array]:
    """{model.layers.N.X.weight: (alpha / r) (A B)^T [outputs, inputs]}, float32."""
    return {
        f"{module_path(layer, name)}.weight": expert.scale * (factors.lora_a @ factors.lora_b).T
        for layer, projections in enumerate(expert.layers)
        for name, factors in projections.items()
    }


def fuse_weights(weights: dict[str, mx.array], added: dict[str, mx.array]) -> dict[str, mx.array]:
    """A file's weights, those that `added` names summed in float32 and cast to what they were; the rest as it is."""
    found = dict(weights)
    for name in added.keys() & weights.keys():
        found[name] = (weights[name].astype(mx.float32) + added[name]).astype(weights[name].dtype)
    return found


def dequantize_weights(
    weights: dict[str, mx.array], everything: dict[str, mx.array], options: dict[str, Any], dtype: mx.Dtype
) -> dict[str, mx.array]:
    """A file's weights with every quantised one as a matrix of `dtype`, as MLX's config describes its quantisation:
    options has group_size, bits and mode, and the same again under a module's name where that differs.

    everything: the weights of all files; a weight's scales may lie in another one than the weight.
    """
    found = {}
    for name, value in weights.items():
        module, _, part = name.rpartition(".")
        if part in QUANTIZATION_PARTS and f"{module}.weight" in everything:
            continue
        if f"{module}.scales" in everything and part == "weight":
            own = options.get(module) if isinstance(options.get(module), dict) else options
            assert own is not None
            value = mx.dequantize(
                value,
                everything[f"{module}.scales"],
                everything.get(f"{module}.biases"),
                group_size=own["group_size"],
                bits=own["bits"],
                mode=own.get("mode", "affine"),
            ).astype(dtype)
        found[name] = value
    return found
