"""One transformer block of Gemma 3 with experts on its projections: mlx-lm's modules, our own order of calls.

Gates of the ranks come as an explicit argument; nothing is stashed on a module.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from dylora_mlx.model import attention, lora, numerics
from dylora_mlx.model.attention import Layout
from dylora_mlx.model.lora import Factors, Gates


def run(
    block: Any,
    x: mx.array,
    where: Layout,
    is_global: bool,
    cache: Any,
    factors: dict[str, Factors],
    gates: Gates | None,
) -> mx.array:
    """Hidden states [B, L, D] after the block. factors: of the projections that carry experts; gates: [B, L, R] of their
    ranks; cache: mlx-lm's key-value cache of this layer, or None."""
    y = _attention(block, block.input_layernorm(x), where, is_global, cache, factors, gates)
    x = x + block.post_attention_layernorm(y)
    y = _mlp(block, block.pre_feedforward_layernorm(x), factors, gates)
    return x + block.post_feedforward_layernorm(y)


def checkpointed(
    block: Any, where: Layout, is_global: bool, factors: dict[str, Factors], h: mx.array, gates: Gates | None
) -> mx.array:
    """The block, its activations computed again in the backward pass instead of kept."""
    given, arrays = (factors, gates), []
    tree_map(lambda leaf: arrays.append(leaf) if isinstance(leaf, mx.array) else None, given)

    def again(h: mx.array, *flat: mx.array) -> mx.array:
        rest = iter(flat)
        restored = tree_map(lambda leaf: next(rest) if isinstance(leaf, mx.array) else leaf, given)
        return run(block, h, where, is_global, None, *restored)

    return mx.checkpoint(again)(h, *arrays)


def _attention(
    block: Any,
    x: mx.array,
    where: Layout,
    is_global: bool,
    cache: Any,
    factors: dict[str, Factors],
    gates: Gates | None,
) -> mx.array:
    layer = block.self_attn

    def heads(name: str, count: int) -> mx.array:
        return lora.project(layer[name], x, factors.get(name), gates).reshape(*x.shape[:2], count, -1)

    queries, keys, values = (
        heads("q_proj", layer.n_heads),
        heads("k_proj", layer.n_kv_heads),
        heads("v_proj", layer.n_kv_heads),
    )
    out = attention.attend(layer, queries, keys, values, where, is_global, cache)
    return lora.project(layer.o_proj, out, factors.get("o_proj"), gates)


def _mlp(block: Any, x: mx.array, factors: dict[str, Factors], gates: Gates | None) -> mx.array:
    mlp = block.mlp
    gate = lora.project(mlp.gate_proj, x, factors.get("gate_proj"), gates)
    up = lora.project(mlp.up_proj, x, factors.get("up_proj"), gates)
    return lora.project(mlp.down_proj, numerics.geglu(gate, up), factors.get("down_proj"), gates)
