"""Convert an expert to a PEFT LoRA adapter: the same factors, transposed, under PEFT's names."""

from __future__ import annotations

import mlx.core as mx

from dylora_mlx.adapters import mlx_lm
from dylora_mlx.model.experts.lora import Expert


def weights(expert: Expert) -> dict[str, mx.array]:
    """Return the expert's factors under PEFT's names, float32.

    {base_model.model.model.layers.N.X.lora_A.weight: [r, inputs], ...lora_B.weight: [outputs, r]}
    """
    arrays = {}
    for name, value in mlx_lm.weights(expert).items():
        path, part = name.rsplit(".", 1)
        letter = "A" if part == "lora_a" else "B"
        arrays[f"base_model.model.{path}.lora_{letter}.weight"] = mx.contiguous(value.T)
    return arrays


def config(expert: Expert, base: str) -> dict:
    """Return adapter_config.json. Every field that PEFT would otherwise fill with its own default is explicit."""
    layers = [i for i, projections in enumerate(expert.layers) if projections]
    partial = {} if len(layers) == len(expert.layers) else {"layers_to_transform": layers, "layers_pattern": "layers"}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": expert.rank,
        "lora_alpha": expert.alpha,
        "target_modules": sorted({name for projections in expert.layers for name in projections}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        **partial,
    }
