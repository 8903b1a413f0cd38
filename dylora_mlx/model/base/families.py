"""Model families that can be a base: Gemma 3, Llama, Qwen3.

To add one, write a function from mlx-lm's model arguments to a `Family`, and give it a line in FAMILIES.

mlx-lm names these parts alike in every family: `model.embed_tokens`, `model.layers`, `model.norm`, a block's
`self_attn` (with its projections, `scale` and `rope`) and `mlp`, and `lm_head` unless the embedding is the head too.
Logits are never capped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from dylora_mlx.model.kernels import numerics

NO_WINDOW = 1 << 30
"""A window that no row fills: of a family without sliding layers."""


@dataclass(frozen=True)
class Norms:
    """Names of a block's norms; None where a family has none."""

    before_attention: str
    after_attention: str | None
    before_mlp: str
    after_mlp: str | None


PRE_NORMS = Norms("input_layernorm", None, "post_attention_layernorm", None)
"""Before attention and before the MLP, as in most families."""
SANDWICH_NORMS = Norms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
"""Before and after both, as in Gemma 3."""


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
    window: int = NO_WINDOW
    qk_norm: bool = False
    rope_half: bool = True
    embedding_scale: float | None = None

    def embed(self, model: Any, tokens: mx.array) -> mx.array:
        """Embeddings [B, L, D] of tokens int32 [B, L]; the scale is rounded through bfloat16, as Gemma's is."""
        h = model.model.embed_tokens(tokens)
        if self.embedding_scale is None:
            return h
        return h * mx.array(self.embedding_scale, mx.bfloat16).astype(h.dtype)

    def first_layer(self, is_global: bool) -> int | None:
        """The first layer of a kind, None if there is none."""
        return self.is_global.index(is_global) if is_global in self.is_global else None


def apply_norm(block: Any, name: str | None, x: mx.array) -> mx.array:
    """x [B, L, D] after the block's norm of this name, as it is where there is none."""
    return x if name is None else block[name](x)


def gemma3(args: Any) -> Family:
    """Gemma 3 (Gemma team 2025, "Gemma 3 technical report"): four norms a block, every n-th layer global.

    args: mlx-lm's arguments of a gemma3_text model.
    """
    pattern = args.sliding_window_pattern
    return Family(
        title="Gemma 3",
        norms=SANDWICH_NORMS,
        gating=GELU,
        head_dim=args.head_dim,
        is_global=tuple(layer % pattern == pattern - 1 for layer in range(args.num_hidden_layers)),
        window=args.sliding_window,
        qk_norm=True,
        embedding_scale=args.hidden_size**0.5,
    )


def llama(args: Any) -> Family:
    """Llama (Touvron et al. 2023, section 2.2) and models built like it. Some have sliding layers.

    args: mlx-lm's arguments of a llama model.
    """
    return Family(
        title="Llama",
        norms=PRE_NORMS,
        gating=SILU,
        head_dim=args.head_dim or args.hidden_size // args.num_attention_heads,
        is_global=tuple(kind != "sliding_attention" for kind in args.layer_types),
        window=args.sliding_window or NO_WINDOW,
        rope_half=not args.rope_traditional,
    )


def qwen3(args: Any) -> Family:
    """Qwen3 (Qwen team 2025): Llama's block with norms on queries and keys. Dense models only.

    args: mlx-lm's arguments of a qwen3 model.
    """
    return Family(
        title="Qwen3",
        norms=PRE_NORMS,
        gating=SILU,
        head_dim=args.head_dim,
        is_global=(True,) * args.num_hidden_layers,
        qk_norm=True,
    )


FAMILIES = {"gemma3_text": gemma3, "llama": llama, "qwen3": qwen3}
"""By the model_type of config.json."""


def family_of(args: Any) -> Family:
    """The family of a model, from mlx-lm's model arguments."""
    return FAMILIES[args.model_type](args)


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary options that config.json states where mlx-lm does not look.

    transformers 5 keeps them under rope_parameters, by layer kind if there are two kinds. Raises AttributeError or
    TypeError for a config that is damaged there.
    """
    stated = config.get("rope_parameters") or {}
    full, sliding = stated.get("full_attention", stated), stated.get("sliding_attention", {})
    found = {
        "rope_theta": full.get("rope_theta"),
        "rope_local_base_freq": sliding.get("rope_theta"),
        "rope_scaling": full if full.get("rope_type", "default") != "default" else None,
    }
    return {name: value for name, value in found.items() if value is not None and config.get(name) is None}
