"""One transformer block with experts on its projections: mlx-lm's modules, our own order of calls.

Gates of the ranks come as an explicit argument; nothing is stashed on a module.
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
    """Hidden states [B, L, D] after the block. factors: of the projections that carry experts; gates: [B, L, R] of their
    ranks; cache: mlx-lm's key-value cache of this layer, or None."""
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
    """The block, its activations computed again in the backward pass instead of kept."""
    given, arrays = (factors, gates), []
    tree_map(lambda leaf: arrays.append(leaf) if isinstance(leaf, mx.array) else None, given)

    def again(h: mx.array, *flat: mx.array) -> mx.array:
        rest = iter(flat)
        restored = tree_map(lambda leaf: next(rest) if isinstance(leaf, mx.array) else leaf, given)
        return run_block(family, block, h, attn_layout, is_global, None, *restored)

    return mx.checkpoint(again)(h, *arrays)


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
    owner: Any, name: str, x: mx.array, factors: dict[str, ProjectionFactors], gates: ExpertGates | None
) -> mx.array:
    return lora.project(quantized.for_batch(owner[name]), x, factors.get(name), gates)
