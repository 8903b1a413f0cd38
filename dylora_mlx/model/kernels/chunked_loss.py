"""The loss head: cross-entropy over a wide frozen vocabulary without ever holding [tokens, vocabulary].

The vocabulary is taken a tile at a time, with a running maximum and a running sum for every position, as attention is
in Dao et al. 2022, "FlashAttention", section 3.1: a tile's exponentials serve the loss and, multiplied by the tile's
rows of the head, the gradient of the hidden state, d loss / d h = p W - W[target]. So there is one exponential for each
position and token, each weight is read once, and the largest array is [tile, positions]. Each tile is made to depend on
the one before it, since lazy evaluation would run independent tiles side by side and hold them all.
"""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from dylora_mlx.model.kernels import numerics, quantized


def output_layer(model: Any) -> nn.Module:
    """The layer that maps states to logits: the tied embedding or the separate head of an mlx-lm model."""
    return model.lm_head if "lm_head" in model else model.model.embed_tokens


def output_logits(layer: nn.Module, hidden: mx.array) -> mx.array:
    """Logits [..., V] of states [..., D], for a tied or separate, full or quantised head."""
    return layer.as_linear(hidden) if isinstance(layer, (nn.Embedding, nn.QuantizedEmbedding)) else layer(hidden)


def token_losses(layer: nn.Module, hidden: mx.array, targets: mx.array, tile: int, differentiable: bool) -> mx.array:
    """Cross-entropy in nats, float32 [N], of states [N, D] against targets int32 [N], `tile` rows of the head at a time.

    With `differentiable`, the result has a gradient towards `hidden` (the head itself is frozen); without, no gradient
    work is done.
    """
    if not differentiable:
        return _forward(layer, hidden, targets, tile, gradient=False)[0]

    @mx.custom_function
    def run(hidden: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        return _forward(layer, hidden, targets, tile, gradient=True)

    @run.vjp
    def backward(primals, cotangents, outputs):
        hidden, targets = primals
        grad = outputs[1] * cotangents[0][:, None]
        return grad.astype(hidden.dtype), mx.zeros_like(targets)

    return cast(tuple[mx.array, mx.array], run(hidden, targets))[0]


def log_partition(layer: nn.Module, hidden: mx.array, tile: int) -> mx.array:
    """log sum_v exp(logit_v), float32 [N], of states [N, D], with a gradient towards `hidden`.

    What losses over the whole vocabulary need: a cross-entropy against any fixed distribution q is this minus hidden
    times the head's mean row under q.
    """

    @mx.custom_function
    def run(hidden: mx.array) -> tuple[mx.array, mx.array]:
        return partition_and_mean_row(layer, hidden, tile, gradient=True)

    @run.vjp
    def backward(primals, cotangents, outputs):
        return (outputs[1] * cotangents[0][:, None]).astype(hidden.dtype)

    return cast(tuple[mx.array, mx.array], run(hidden))[0]


def _forward(layer: Any, hidden: mx.array, targets: mx.array, tile: int, gradient: bool) -> tuple[mx.array, mx.array]:
    """Losses [N], and their gradients [N, D] towards the states if asked for (else zeros)."""
    partition, mean = partition_and_mean_row(layer, hidden, tile, gradient)
    own = quantized.weight_rows(layer, targets)
    # Rounded as the tiles' logits are, so that a sure token's loss does not fall below zero.
    target_logits = (hidden.astype(mx.float32) * own.astype(mx.float32)).sum(-1).astype(own.dtype)
    return partition - target_logits.astype(mx.float32), mean - own


def partition_and_mean_row(layer: Any, hidden: mx.array, tile: int, gradient: bool) -> tuple[mx.array, mx.array]:
    """log sum_v exp(logit_v), float32 [N], and the mean of the head's rows under softmax(logits), float32 [N, D], if
    asked for (else zeros)."""
    count, vocabulary = hidden.shape[0], layer.weight.shape[0]
    highest, total = mx.full((1, count), -mx.inf), mx.zeros((count, 1))
    expected = mx.zeros(hidden.shape, mx.float32)
    for begin in range(0, vocabulary, tile):
        weight = quantized.weight_rows(layer, slice(begin, begin + tile))
        h = mx.depends(hidden, [total, expected]) if begin else hidden  # wait for the tile before
        # [tile, N]: maxima along the first axis are several times as fast as along the last on a CPU.
        logits = (weight @ h.T).astype(mx.float32)
        higher = mx.maximum(highest, mx.max(logits, axis=0, keepdims=True))
        shrink = mx.exp(highest - higher).T
        exponentials = numerics.exp(logits - higher).T
        total = total * shrink + exponentials @ mx.ones((weight.shape[0], 1))
        if gradient:
            expected = expected * shrink + (exponentials.astype(weight.dtype) @ weight).astype(mx.float32)
        highest = higher
    return highest[0] + mx.log(total[:, 0]), expected / total


def tile_size(positions: int) -> int:
    """Rows of the head in one tile: as many as keep the tile's float32 logits within a CPU's cache, or within 256 MB on
    a GPU, which wants large products."""
    budget = (4 if numerics.on_cpu() else 256) << 20
    return max(512, budget // (4 * positions) // 256 * 256)
