"""What tells one family of decoders from another.

All families share what mlx-lm calls the same in each: `model.embed_tokens`, `model.layers`, `model.norm`, a block's
`self_attn` (with its projections, `scale` and `rope`) and `mlp`, and `lm_head` unless the embedding is the head too.
Logits are never capped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from dylora_mlx.model.kernels import numerics

EVERYTHING = 1 << 30
"""A window that no row fills: of a family without sliding layers."""


@dataclass(frozen=True)
class Norms:
    """Names of a block's norms; None where a family has none."""

    before_attention: str
    after_attention: str | None
    before_mlp: str
    after_mlp: str | None


TWO = Norms("input_layernorm", None, "post_attention_layernorm", None)
"""Before attention and before the MLP, as in most families."""


@dataclass(frozen=True)
class Gating:
    """How an MLP's gate and up projections [B, L, inner] are put together: in rows, and for one token, where few operations
    count."""

    rows: Callable[[mx.array, mx.array], mx.array]
    token: Callable[[mx.array, mx.array], mx.array]


GELU = Gating(numerics.geglu, lambda gate, up: nn.gelu_approx(gate) * up)
SILU = Gating(numerics.swiglu, lambda gate, up: nn.silu(gate) * up)


@dataclass(frozen=True)
class Family:
    """One model's family.

    title: for messages; is_global: of each layer, whether it attends to everything before, not to `window` tokens;
    heads_normed: whether queries and keys have norms of their own (q_norm, k_norm); halves: whether rotary positions turn a
    head's first half against its second, not neighbours; embedding_scale: of the embeddings, None for none.
    """

    title: str
    norms: Norms
    gating: Gating
    head_dim: int
    is_global: tuple[bool, ...]
    window: int = EVERYTHING
    heads_normed: bool = False
    halves: bool = True
    embedding_scale: float | None = None

    def embed(self, model: Any, tokens: mx.array) -> mx.array:
        """Embeddings [B, L, D] of tokens int32 [B, L]; the scale is rounded through bfloat16, as Gemma's is."""
        h = model.model.embed_tokens(tokens)
        if self.embedding_scale is None:
            return h
        return h * mx.array(self.embedding_scale, mx.bfloat16).astype(h.dtype)

    def first(self, is_global: bool) -> int | None:
        """The first layer of a kind, None if there is none."""
        return self.is_global.index(is_global) if is_global in self.is_global else None


def normed(block: Any, name: str | None, x: mx.array) -> mx.array:
    """x [B, L, D] after the block's norm of this name, as it is where there is none."""
    return x if name is None else block[name](x)
