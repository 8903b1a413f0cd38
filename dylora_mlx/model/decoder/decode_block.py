"""Run one token of every sequence through a block, in fewer operations than block.py needs for rows.

The arrays of a single token are so small that on a CPU an operation costs a few microseconds of overhead, and a block
has two hundred operations. Therefore layers of the same kind share the rotary tables, as do both passes of a router
that reads the final states. Heads are split by a reshape, which for rows needs a transpose. The MLP activations are
mlx-lm's compiled ones, not the polynomials used for rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from dylora_mlx.model.base.families import Family, apply_norm
from dylora_mlx.model.decoder.attention import AttentionMasks, recent
from dylora_mlx.model.experts import lora
from dylora_mlx.model.experts.lora import ExpertGates, ProjectionFactors
from dylora_mlx.model.kernels import numerics


class RotaryTables(NamedTuple):
    """Cosines and signed sines of one rotary position, or of one for each row."""

    cosine: mx.array
    """float32 [1 or B, 1, 1, head_dim]."""
    sine: mx.array
    """float32 [1 or B, 1, 1, head_dim]."""


class DecodePosition(NamedTuple):
    """Position of the next token of every row: the masks of its keys and the rotary tables of global and sliding layers.

    The tables are None if each layer's own RoPE is used, as on a GPU, where it is a single kernel.
    """

    masks: AttentionMasks
    """Masks of the keys."""
    full: RotaryTables | None
    """Tables of layers with global attention."""
    sliding: RotaryTables | None
    """Tables of sliding-window layers."""


def rotary_tables(family: Family, attention: Any, offset: int | mx.array) -> RotaryTables | None:
    """Return the rotary tables of a position, or of one for each row, int32 [B]; None to use mlx-lm's RoPE directly.

    They are read off `rope` itself by rotating the unit vector (1, 0), so any frequency scaling is included.
    """
    if not numerics.on_cpu() or not family.rope_half:
        return None
    half = family.head_dim // 2
    unit = (mx.arange(2 * half) < half).astype(mx.float32).reshape(1, 1, 1, -1)
    if isinstance(offset, mx.array):
        unit = mx.broadcast_to(unit, (offset.size, 1, 1, 2 * half))
    cosine, sine = mx.split(attention.rope(unit, offset=offset), 2, axis=-1)
    return RotaryTables(mx.concatenate([cosine, cosine], axis=-1), mx.concatenate([-sine, sine], axis=-1))


def run_decode_block(
    family: Family,
    block: Any,
    x: mx.array,
    position: DecodePosition,
    is_global: bool,
    cache: Any,
    factors: dict[str, ProjectionFactors],
    gates: ExpertGates | None,
) -> mx.array:
    """Return hidden states [B, 1, D] after the block. The other arguments are those of `block.run_block`."""

    def project(linear: nn.Module, name: str, x: mx.array) -> mx.array:
        return lora.project(linear, x, factors.get(name), gates)

    norms, mlp = family.norms, block.mlp
    y = apply_norm(block, norms.before_attention, x)
    y = _attention(family, block.self_attn, y, position, is_global, cache, project)
    x = x + apply_norm(block, norms.after_attention, y)
    y = apply_norm(block, norms.before_mlp, x)
    y = family.gating.token(project(mlp.gate_proj, "gate_proj", y), project(mlp.up_proj, "up_proj", y))
    return x + apply_norm(block, norms.after_mlp, project(mlp.down_proj, "down_proj", y))


def _attention(
    family: Family, attention: Any, x: mx.array, position: DecodePosition, is_global: bool, cache: Any, project: Any
) -> mx.array:
    batch, tables = x.shape[0], position.full if is_global else position.sliding

    def heads(name: str, count: int) -> mx.array:
        return project(attention[name], name, x).reshape(batch, count, 1, -1)

    queries, keys = heads("q_proj", attention.n_heads), heads("k_proj", attention.n_kv_heads)
    if family.qk_norm:
        queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    if tables is None:
        queries, keys = (attention.rope(states, offset=cache.offset) for states in (queries, keys))
    else:
        queries, keys = _rotate(queries, tables), _rotate(keys, tables)
    keys, values = cache.update_and_fetch(keys, heads("v_proj", attention.n_kv_heads))
    if not is_global:
        keys, values = (recent(states, 1, family.window) for states in (keys, values))
    mask = position.masks.full if is_global else position.masks.sliding
    out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=attention.scale, mask=mask)
    return project(attention.o_proj, "o_proj", out.reshape(batch, 1, -1))


def _rotate(x: mx.array, tables: RotaryTables) -> mx.array:
    """Rotate x [B, heads, 1, head_dim] in float32, as mlx-lm does, and round back to its dtype."""
    first, second = mx.split(x, 2, axis=-1)
    return (x * tables.cosine + mx.concatenate([second, first], axis=-1) * tables.sine).astype(x.dtype)
