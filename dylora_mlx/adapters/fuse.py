"""Fuse experts: blend several into one exactly, by concatenating their ranks, or merge an expert into full weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from dylora_mlx.adapters.mlx_lm import module_path
from dylora_mlx.model.experts.lora import Expert, Shapes


def blend_experts(experts: Sequence[Expert], weights: Sequence[float], shapes: Shapes) -> Expert:
    """Return sum_i w_i (alpha_i / r_i) A_i B_i as one expert of rank sum r_i.

    Its alpha equals its rank, so its scale is 1; weights and scales are multiplied into B. An expert of weight 0 takes
    no rank. Raises ValueError if all weights are 0.
    """
    parts = [(expert, weight * expert.scale) for expert, weight in zip(experts, weights, strict=True) if weight]
    if not parts:
        raise ValueError("a blend needs a weight other than 0")
    rank = sum(expert.rank for expert, _ in parts)
    blended, layers = Expert(shapes, rank, float(rank), mx.random.key(0)), [expert.layers for expert, _ in parts]
    for layer, projections in enumerate(blended.layers):
        for name, factors in projections.items():
            sources = [(source[layer][name], scale) for source, (_, scale) in zip(layers, parts, strict=True)]
            factors.lora_a = mx.concatenate([source.lora_a for source, _ in sources], axis=1)
            factors.lora_b = mx.concatenate([source.lora_b * scale for source, scale in sources], axis=0)
    return blended


QUANTIZATION_PARTS = ("scales", "biases")
"""Names of the arrays that accompany a quantised weight in an MLX checkpoint."""


def weight_updates(expert: Expert) -> dict[str, mx.array]:
    """Return {model.layers.N.X.weight: (alpha / r) (A B)^T [outputs, inputs]}, float32."""
    return {
        f"{module_path(layer, name)}.weight": expert.scale * (factors.lora_a @ factors.lora_b).T
        for layer, projections in enumerate(expert.layers)
        for name, factors in projections.items()
    }


def fuse_weights(weights: dict[str, mx.array], updates: dict[str, mx.array]) -> dict[str, mx.array]:
    """Add `updates` to the weights of a file by name.

    Sums are computed in float32 and cast back to the weight's dtype. Other weights stay unchanged.
    """
    fused = dict(weights)
    for name in updates.keys() & weights.keys():
        fused[name] = (weights[name].astype(mx.float32) + updates[name]).astype(weights[name].dtype)
    return fused


def dequantize_weights(
    weights: dict[str, mx.array], all_weights: dict[str, mx.array], options: dict[str, Any], dtype: mx.Dtype
) -> dict[str, mx.array]:
    """Return a file's weights with every quantised one as a matrix of `dtype`.

    Args:
        weights: The weights of one file.
        all_weights: The weights of all files, since the scales of a weight may be in another file than the weight.
        options: The quantisation section of MLX's config: group_size, bits and mode, and the same keys again under the
            name of a module that differs.
        dtype: dtype of the dequantised weights.
    """
    dequantized = {}
    for name, value in weights.items():
        module, _, part = name.rpartition(".")
        if part in QUANTIZATION_PARTS and f"{module}.weight" in all_weights:
            continue
        if f"{module}.scales" in all_weights and part == "weight":
            module_options = options.get(module) if isinstance(options.get(module), dict) else options
            assert module_options is not None
            value = mx.dequantize(
                value,
                all_weights[f"{module}.scales"],
                all_weights.get(f"{module}.biases"),
                group_size=module_options["group_size"],
                bits=module_options["bits"],
                mode=module_options.get("mode", "affine"),
            ).astype(dtype)
        dequantized[name] = value
    return dequantized
