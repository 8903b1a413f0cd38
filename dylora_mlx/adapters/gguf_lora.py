"""Convert an expert to and from a GGUF LoRA adapter of llama.cpp: the same factors, transposed, under GGUF's names.

llama.cpp adds (alpha / r) B (A x) to the output of the tensor that a pair is named after, whatever quantisation this
tensor has. B's rows must have the order of its rows, which for queries and keys of a Llama is not Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dylora_mlx.adapters.mlx_lm import module_path
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.model.gguf.weights import PROJECTIONS, halves_first, neighbours_first, reordered_heads


def tensors(expert: Expert, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the expert's factors, float32: {blk.N.X.weight.lora_a: [r, inputs], ...lora_b: [outputs, r]}.

    config: the base's config, or mlx-lm's model arguments by name.
    """
    arrays, heads = {}, reordered_heads(config)
    for layer, projections in enumerate(expert.layers):
        for name, factors in projections.items():
            a, b = np.array(factors.lora_a.T), np.array(factors.lora_b.T)
            tensor = f"blk.{layer}.{PROJECTIONS[name]}.weight"
            arrays[f"{tensor}.lora_a"] = a
            arrays[f"{tensor}.lora_b"] = neighbours_first(heads[name])(b) if name in heads else b
    return arrays


def metadata(expert: Expert, name: str, skills: Sequence[str]) -> dict[str, str | float]:
    """Return the metadata besides general.architecture. llama.cpp's server shows the task name beside the file."""
    return {
        "general.type": "adapter",
        "general.name": name,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(expert.alpha),
        "adapter.lora.task_name": ", ".join(skills) or name,
    }


def updates(arrays: Mapping[str, np.ndarray], alpha: float, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return {model.layers.N.X.weight: (alpha / r) B A [outputs, inputs]} of an adapter's tensors, in Hugging Face's order."""
    heads, names = reordered_heads(config), {tensor: name for name, tensor in PROJECTIONS.items()}
    found = {}
    for key in (key for key in arrays if key.endswith(".lora_a")):
        tensor = key.removesuffix(".lora_a")
        _, layer, module, _ = tensor.split(".")
        a, b, name = arrays[key], arrays[f"{tensor}.lora_b"], names[module]
        update = (alpha / len(a)) * (b @ a)
        update = halves_first(heads[name])(update) if name in heads else update
        found[f"{module_path(int(layer), name)}.weight"] = update
    return found
