"""Families of decoders that can be a base, by the model_type of their config. A new one is a module here and a line below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dylora_mlx.model.base.families import gemma3, llama, qwen3
from dylora_mlx.model.base.families.family import Family

FAMILIES = {"gemma3_text": gemma3.of, "llama": llama.of, "qwen3": qwen3.of}


def of(args: Any) -> Family:
    """The family of a model, by mlx-lm's arguments of it."""
    return FAMILIES[args.model_type](args)


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says where mlx-lm does not look: transformers 5 keeps rotary options under rope_parameters, by kind
    of layer if there are two. Raises AttributeError or TypeError for a config that is damaged there."""
    stated = config.get("rope_parameters") or {}
    full, sliding = stated.get("full_attention", stated), stated.get("sliding_attention", {})
    found = {
        "rope_theta": full.get("rope_theta"),
        "rope_local_base_freq": sliding.get("rope_theta"),
        "rope_scaling": full if full.get("rope_type", "default") != "default" else None,
    }
    return {name: value for name, value in found.items() if value is not None and config.get(name) is None}
