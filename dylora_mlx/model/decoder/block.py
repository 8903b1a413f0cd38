"""Run one transformer block with experts on its projections, calling mlx-lm's modules in our own order.

The gates are an explicit argument; no state is stored on a module.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from dylora_mlx.model.base.families import Family, apply_norm
from dylora_mlx.model.decoder import attention
from dylora_mlx.model.decoder.attention import AttentionLayout
from dylora_mlx.model.experts import lora
from dylora_mlx.model.experts.lora import ExpertGates, ProjectionFactors
from dylora_mlx.model.kernels import quantized


def run_block(
    family: Family,
    block: Any,
    x: mx.array,
    attn_layout: AttentionLayout,
    is_global: bool,
    cache: Any,
    factors: dict[str, ProjectionFactors],
    gates: ExpertGates | None,
) -> mx.array:
    """Return the hidden states [B, L, D] after the block.

    Args:
        family: The model's family.
        block: mlx-lm's block.
        x: Hidden states [B, L, D].
        attn_layout: Masks or gathered documents.
        is_global: Whether the layer has global attention, not a sliding window.
        cache: mlx-lm's key-value cache of this layer, or None.
        factors: Experts of the projections that carry any, by name.
        gates: Gates of these experts; None without experts.
    """
    norms = family.norms
    y = _attention(
        family, block, apply_norm(block, norms.before_attention, x), attn_layout, is_global, cache, factors, gates
    )
    x = x + apply_norm(block, norms.after_attention, y)
    y = _mlp(family, block, apply_norm(block, norms.before_mlp, x), factors, gates)
    return x + apply_norm(block, norms.after_mlp, y)


def run_block_checkpointed(
    family: Family,
    block: Any,
    attn_layout: AttentionLayout,
    is_global: bool,
    factors: dict[str, ProjectionFactors],
    h: mx.array,
    gates: ExpertGates | None,
) -> mx.array:
    """Run the block with gradient checkpointing: the backward pass recomputes its activations."""
    # Pass factors and gates to mx.checkpoint as flat arrays, and restore their structure inside.
    inputs, arrays = (factors, gates), []
    tree_map(lambda leaf: arrays.append(leaf) if isinstance(leaf, mx.array) else None, inputs)

    def recompute(h: mx.array, *flat: mx.array) -> mx.array:
        remaining = iter(flat)
        restored = tree_map(lambda leaf: next(remaining) if isinstance(leaf, mx.array) else leaf, inputs)
        return run_block(family, block, h, attn_layout, is_global, None, *restored)

    return mx.checkpoint(recompute)(h, *arrays)


def _attention(
    family: Family,
    block: Any,
    x: mx.array,
    attn_layout: AttentionLayout,
    is_global: bool,
    cache: Any,
    factors: dict[str, ProjectionFactors],
    gates: ExpertGates | None,
) -> mx.array:
    layer = block.self_attn

    def heads(name: str, count: int) -> mx.array:
        return _project(layer, name, x, factors, gates).reshape(*x.shape[:2], count, -1)

    queries, keys, values = (
        heads("q_proj", layer.n_heads),
        heads("k_proj", layer.n_kv_heads),
        heads("v_proj", layer.n_kv_heads),
    )
    out = attention.attend(family, layer, queries, keys, values, attn_layout, is_global, cache)
    return _project(layer, "o_proj", out, factors, gates)


def _mlp(
    family: Family, block: Any, x: mx.array, factors: dict[str, ProjectionFactors], gates: ExpertGates | None
) -> mx.array:
    mlp = block.mlp
    gate = _project(mlp, "gate_proj", x, factors, gates)
    up = _project(mlp, "up_proj", x, factors, gates)
    return _project(mlp, "down_proj", family.gating.rows(gate, up), factors, gates)


def _project(
    module: Any, name: str, x: mx.array, factors: dict[str, ProjectionFactors], gates: ExpertGates | None
) -> mx.array:
    return lora.project(quantized.for_batch(module[name]), x, factors.get(name), gates)
