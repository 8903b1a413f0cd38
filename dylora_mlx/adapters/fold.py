"""An expert folded into the base's own weights, file by file, as Hugging Face keeps them."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from dylora_mlx.adapters.mlx_lm import module_path
from dylora_mlx.model.experts.lora import Expert

QUANTISED = ("scales", "biases")
"""Beside a quantised weight in an MLX checkpoint."""


def updates(expert: Expert) -> dict[str, mx.array]:
    """{model.layers.N.X.weight: (alpha / r) (A B)^T [outputs, inputs]}, float32."""
    return {
        f"{module_path(layer, name)}.weight": expert.scale * (factors.lora_a @ factors.lora_b).T
        for layer, projections in enumerate(expert.layers)
        for name, factors in projections.items()
    }


def folded(weights: dict[str, mx.array], added: dict[str, mx.array]) -> dict[str, mx.array]:
    """A file's weights, those that `added` names summed in float32 and cast to what they were; the rest as it is."""
    found = dict(weights)
    for name in added.keys() & weights.keys():
        found[name] = (weights[name].astype(mx.float32) + added[name]).astype(weights[name].dtype)
    return found


def dequantised(
    weights: dict[str, mx.array], everything: dict[str, mx.array], options: dict[str, Any], dtype: mx.Dtype
) -> dict[str, mx.array]:
    """A file's weights with every quantised one as a matrix of `dtype`, as MLX's config describes its quantisation:
    options has group_size, bits and mode, and the same again under a module's name where that differs.

    everything: the weights of all files; a weight's scales may lie in another one than the weight.
    """
    found = {}
    for name, value in weights.items():
        module, _, part = name.rpartition(".")
        if part in QUANTISED and f"{module}.weight" in everything:
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
