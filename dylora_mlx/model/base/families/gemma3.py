"""Gemma 3 (Gemma team 2025, "Gemma 3 technical report"): four norms a block, sliding layers with every n-th global."""

from __future__ import annotations

from typing import Any

from dylora_mlx.model.base.families.family import GELU, Family, Norms

FOUR = Norms("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


def of(args: Any) -> Family:
    """The family by mlx-lm's arguments of a gemma3_text model."""
    pattern = args.sliding_window_pattern
    return Family(
        title="Gemma 3",
        norms=FOUR,
        gating=GELU,
        head_dim=args.head_dim,
        is_global=tuple(layer % pattern == pattern - 1 for layer in range(args.num_hidden_layers)),
        window=args.sliding_window,
        heads_normed=True,
        embedding_scale=args.hidden_size**0.5,
    )
