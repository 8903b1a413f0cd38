"""Caches of decoding, made of mlx-lm's own classes: its generators can batch, trim, copy, save and load them.

There is one `CacheList` for each layer. It holds the key-value caches of the passes: base and adapted, or adapted alone
with an inner router layer, which needs no second pass. Sliding layers have a plain `KVCache` too, since a rotated one
can no longer be trimmed; attention then reads no more than the window.

The list of layer 0 ends with a third cache, the router's. It is a `KVCache` that holds arrays of ours: one slot in front
of the text, and one for each of its tokens.

- keys [B, 1, 1 + T, D]: decayed sums of the router's features over the tokens so far, float32. The document mean is their
  quotient with a function of the position, so a trimmed or merged text has the right one. D is 1 without a document mean.
- values [B, 1, 1 + T, 1 + E]: whether the gates are fixed for the whole row (1 or 0), and the gates of the token. The slot
  in front holds the fixed gates, so rows of one batch may be routed, or have one expert each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx.model.decoder.attention import AttentionMasks


class DecoderCache(NamedTuple):
    """The caches of a batch by their use."""

    base: list[Any]
    """Key-value caches of the base pass by layer; empty if the router reads an inner layer."""
    adapted: list[Any]
    """Key-value caches of the pass with experts by layer."""
    router: Any
    """Sums of features, and gates."""

    @classmethod
    def of(cls, layers: Sequence[Any]) -> DecoderCache:
        """Sort the caches of every layer, a list from `make_cache` or what mlx-lm made of it."""
        *first, router = layers[0].caches
        return cls(
            [layer[0] for layer in layers] if len(first) == 2 else [], [c[len(first) - 1] for c in layers], router
        )

    @property
    def position(self) -> int | mx.array:
        """Number of tokens of every row so far: an integer for a single row, int32 [B] for a batch."""
        # A new array: mlx-lm may add to the one of the cache in place.
        return self.adapted[0].offset + 0


class RouterState(NamedTuple):
    """What the router's cache holds of the last token of every row."""

    sums: mx.array
    """Decayed sum of the features so far, float32 [B, 1, D]."""
    is_fixed: mx.array
    """Whether the gates are fixed for the whole row, 1 or 0, float32 [B, 1, 1]."""
    gates: mx.array
    """Gates of the last token, float32 [B, 1, E]."""


def make_cache(
    num_layers: int, num_passes: int, dims: int, num_gates: int, fixed_gates: np.ndarray | None = None
) -> list[Any]:
    """Return empty caches of one row.

    Args:
        num_layers: Layers of the base.
        num_passes: 2 for a base pass and an adapted pass, 1 for the adapted pass alone.
        dims: Size of the features to sum; 1 if the router does not read the document mean.
        num_gates: Number of gates, E.
        fixed_gates: Gates [E] of every token of this row; None to route each token.
    """
    from mlx_lm.models.cache import CacheList, KVCache  # imports transformers, needed for decoding only

    router, values = KVCache(), np.zeros(1 + num_gates, np.float32)
    if fixed_gates is not None:
        values[0], values[1:] = 1.0, fixed_gates
    router.update_and_fetch(mx.zeros((1, 1, 1, dims)), mx.array(values)[None, None, None])
    layers = [[KVCache() for _ in range(num_passes)] for _ in range(num_layers)]
    return [CacheList(*caches, *([router] if layer == 0 else [])) for layer, caches in enumerate(layers)]


def router_state(router: Any) -> RouterState:
    """Return what a router's cache holds of the last token of every row."""
    last = slice(router.size() - 1, router.size())
    values = router.values[:, 0, last]
    return RouterState(router.keys[:, 0, last], values[..., :1], values[..., 1:])


def record(router: Any, state: RouterState, sums: mx.array, gates: mx.array) -> mx.array:
    """Add the next L tokens to a router's cache, and return the gates [B, L, E] that they use: their row's fixed ones, or `gates`.

    Args:
        router: The router's cache.
        state: Its state before these tokens.
        sums: Sums of the features, float32 [B, L, D].
        gates: The router's gates [B, L, E].
    """
    used = mx.where(state.is_fixed > 0, state.gates, gates)
    is_fixed = mx.broadcast_to(state.is_fixed, (*used.shape[:2], 1))
    router.update_and_fetch(sums[:, None], mx.concatenate([is_fixed, used], axis=-1)[:, None])
    return used


def token_gates(layers: Sequence[Any]) -> mx.array:
    """Return the gates of every token of a row so far, float32 [T, E], from its caches."""
    router = DecoderCache.of(layers).router
    return router.values[0, 0, 1 : router.size(), 1:]


def fixed_gates(layers: Sequence[Any]) -> np.ndarray | None:
    """Return the fixed gates of a row, float32 [E], or None if its tokens are routed."""
    first = np.array(DecoderCache.of(layers).router.values[0, 0, 0])
    return first[1:] if first[0] else None


def decode_masks(cache: DecoderCache, length: int, window: int) -> AttentionMasks:
    """Return the masks of the next `length` tokens over the keys that `attention.recent` leaves.

    Args:
        cache: Caches before these tokens.
        length: Number of tokens, the same in every row.
        window: Tokens that a sliding layer attends to.
    """
    from mlx_lm.models.base import create_causal_mask
    from mlx_lm.models.cache import BatchKVCache

    keys = cache.adapted[0]
    full = keys.make_mask(length, return_array=False, window_size=None)
    total = keys.size() + length
    if total <= window:
        return AttentionMasks(full, full)
    kept = min(total, window + length - 1)
    if isinstance(keys, BatchKVCache):
        # The texts of a batch end together, so the last keys are the window of every row.
        left_padding = keys.left_padding - (total - kept)
        return AttentionMasks(full, create_causal_mask(length, kept - length, window, left_padding=left_padding))
    return AttentionMasks(full, None if length == 1 else create_causal_mask(length, kept - length, window))
