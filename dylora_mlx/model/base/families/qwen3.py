"""Qwen3 (Qwen team 2025): Llama's block with norms of queries and keys; dense models only."""

from __future__ import annotations

from typing import Any

from dylora_mlx.model.base.families.family import SILU, TWO, Family


def of(args: Any) -> Family:
    """The family by mlx-lm's arguments of a qwen3 model."""
    return Family(
        title="Qwen3",
        norms=TWO,
        gating=SILU,
        head_dim=args.head_dim,
        is_global=(True,) * args.num_hidden_layers,
        heads_normed=True,
    )
