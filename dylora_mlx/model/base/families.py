"""Model families that can serve as a base: Gemma 3, Llama, Qwen3.

To add a family, write a function from mlx-lm's model arguments to a `Family`, and add it to FAMILIES.

In every family, mlx-lm uses the same names for these parts: `model.embed_tokens`, `model.layers`, `model.norm`, a
block's `self_attn` (with its projections, `scale` and `rope`) and `mlp`, and `lm_head` unless the embedding is also the
head. Logits are never soft-capped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from dylora_mlx.model.kernels import numerics

NO_WINDOW = 1 << 30
"""Window of a family without sliding-window layers: longer than any row."""


@dataclass(frozen=True)
class Norms:
    """Attribute names of a block's norms; None if the family has no norm in that place."""

    before_attention: str
    after_attention: str | None
    before_mlp: str
    after_mlp: str | None


PRE_NORMS = Norms("input_layernorm", None, "post_attention_layernorm", None)
"""Norms before attention and before the MLP, as in most families."""
SANDWICH_NORMS = Norms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
"""Norms before and after both attention and the MLP, as in Gemma 3."""


@dataclass(frozen=True)
class Gating:
    """The function that combines an MLP's gate and up projections, [B, L, inner] each."""

    rows: Callable[[mx.array, mx.array], mx.array]
    """For rows of many tokens."""
    token: Callable[[mx.array, mx.array], mx.array]
    """For decoding one token, where the number of operations dominates."""


GELU = Gating(numerics.geglu, lambda gate, up: nn.gelu_approx(gate) * up)
SILU = Gating(numerics.swiglu, lambda gate, up: nn.silu(gate) * up)


@dataclass(frozen=True)
class Family:
    """Properties of a model's architecture that the forward pass needs."""

    title: str
    """Name for messages."""
    norms: Norms
    """Attribute names of a block's norms."""
    gating: Gating
    """Activation of the gated MLP."""
    head_dim: int
    """Size of one attention head."""
    is_global: tuple[bool, ...]
    """For each layer, whether it attends to all previous tokens (True) or to a sliding window (False)."""
    window: int = NO_WINDOW
    """Tokens in the window of a sliding layer."""
    qk_norm: bool = False
    """Whether queries and keys have norms (q_norm, k_norm)."""
    rope_half: bool = True
    """Whether RoPE rotates the first half of a head against its second half, not neighbouring elements."""
    embedding_scale: float | None = None
    """Factor of the embeddings; None for no scaling."""

    def embed(self, model: Any, tokens: mx.array) -> mx.array:
        """Return embeddings [B, L, D] of tokens int32 [B, L]. The scale is rounded through bfloat16, as in Gemma."""
        h = model.model.embed_tokens(tokens)
        if self.embedding_scale is None:
            return h
        return h * mx.array(self.embedding_scale, mx.bfloat16).astype(h.dtype)

    def first_layer(self, is_global: bool) -> int | None:
        """Return the first layer with global attention, or with a sliding window; None if there is none."""
        return self.is_global.index(is_global) if is_global in self.is_global else None


def apply_norm(block: Any, name: str | None, x: mx.array) -> mx.array:
    """Apply the block's norm of this name to x [B, L, D]. Return x unchanged if `name` is None."""
    return x if name is None else block[name](x)


def gemma3(args: Any) -> Family:
    """Return the Gemma 3 family: four norms per block, every n-th layer global.

    See Gemma team 2025, "Gemma 3 technical report".

    Args:
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
    """Return the Llama family, for Llama and models built like it, some of which have sliding layers.

    See Touvron et al. 2023, section 2.2.

    Args:
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
    """Return the Qwen3 family (Qwen team 2025): Llama's block with norms on queries and keys. Dense models only.

    Args:
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
"""Constructors of families by the model_type of config.json."""


def family_of(args: Any) -> Family:
    """Return the family of a model from mlx-lm's model arguments."""
    return FAMILIES[args.model_type](args)


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the RoPE options that config.json states in a place that mlx-lm does not read.

    transformers 5 stores them under rope_parameters, by layer type if there are two types. Raises AttributeError or
    TypeError for a config that is damaged there.
    """
    stated = config.get("rope_parameters") or {}
    full, sliding = stated.get("full_attention", stated), stated.get("sliding_attention", {})
    settings = {
        "rope_theta": full.get("rope_theta"),
        "rope_local_base_freq": sliding.get("rope_theta"),
        "rope_scaling": full if full.get("rope_type", "default") != "default" else None,
    }
    return {name: value for name, value in settings.items() if value is not None and config.get(name) is None}
