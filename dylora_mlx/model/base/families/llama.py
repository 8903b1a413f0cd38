"""Llama (Touvron et al. 2023, section 2.2; Llama 3 scales its rotary frequencies), and what is built like it."""

from __future__ import annotations

from typing import Any

from dylora_mlx.model.base.families.family import EVERYTHING, SILU, TWO, Family


def of(args: Any) -> Family:
    """The family by mlx-lm's arguments of a llama model; some have sliding layers."""
    return Family(
        title="Llama",
        norms=TWO,
        gating=SILU,
        head_dim=args.head_dim or args.hidden_size // args.num_attention_heads,
        is_global=tuple(kind != "sliding_attention" for kind in args.layer_types),
        window=args.sliding_window or EVERYTHING,
        halves=not args.rope_traditional,
    )
