"""One token of every sequence through a block, in fewer operations than block.py takes for rows.

A token's arrays are so small that on a CPU an operation costs what starting it costs, a few microseconds, and a block is
two hundred of them. So the layers of a kind, and both passes of a router that reads the final states, share one rotation;
heads are reshaped where those of rows must be transposed; and gates are mlx-lm's compiled ones, not the polynomials for
rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from dylora_mlx.model.base.families import Family, apply_norm
from dylora_mlx.model.decoder.attention import AttentionMasks
from dylora_mlx.model.experts import lora
from dylora_mlx.model.experts.lora import ExpertGates, ProjectionFactors
from dylora_mlx.model.kernels import numerics


class RotaryTables(NamedTuple):
    """Cosines and signed sines [1, 1, 1, head_dim], float32, of the rotary position at hand."""

    cosine: mx.array
    sine: mx.array


class DecodePosition(NamedTuple):
    """Where the next token stands: masks of its keys, and how global and sliding layers turn it.

    The turns are None where each layer's own rotation is used: on a GPU, where it is one kernel.
    """

    masks: AttentionMasks
    full: RotaryTables | None
    sliding: RotaryTables | None


def rotary_tables(family: Family, attention: Any, offset: int) -> RotaryTables | None:
    """The rotation of a position by mlx-lm's attention module: what its `rope` makes of (1, 0), whatever its scaling."""
    if not numerics.on_cpu() or not family.rope_half:
        return None
    half = family.head_dim // 2
    unit = (mx.arange(2 * half) < half).astype(mx.float32).reshape(1, 1, 1, -1)
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
    """Hidden states [B, 1, D] after the block; the arguments are those of `block.run`."""

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
    batch, turned = x.shape[0], position.full if is_global else position.sliding

    def heads(name: str, count: int) -> mx.array:
        return project(attention[name], name, x).reshape(batch, count, 1, -1)

    queries, keys = heads("q_proj", attention.n_heads), heads("k_proj", attention.n_kv_heads)
    if family.qk_norm:
        queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    if turned is None:
        queries, keys = (attention.rope(states, offset=cache.offset) for states in (queries, keys))
    else:
        queries, keys = _rotate(queries, turned), _rotate(keys, turned)
    keys, values = cache.update_and_fetch(keys, heads("v_proj", attention.n_kv_heads))
    mask = position.masks.full if is_global else position.masks.sliding
    out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=attention.scale, mask=mask)
    return project(attention.o_proj, "o_proj", out.reshape(batch, 1, -1))


def _rotate(x: mx.array, turned: RotaryTables) -> mx.array:
    """x [B, heads, 1, head_dim], turned in float32 as mlx-lm's is, and rounded back."""
    first, second = mx.split(x, 2, axis=-1)
    return (x * turned.cosine + mx.concatenate([second, first], axis=-1) * turned.sine).astype(x.dtype)
