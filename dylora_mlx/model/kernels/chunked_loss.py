"""Compute cross-entropy over a large frozen vocabulary without materialising the [tokens, vocabulary] logits.

The vocabulary is processed in tiles with a running maximum and a running sum per position, as in Dao et al. 2022,
"FlashAttention", section 3.1. The exponentials of a tile serve the loss. Multiplied by the tile's rows of the head,
they also give the gradient with respect to the hidden state, d loss / d h = p W - W[target]. Therefore each (position,
token) pair costs one exponential, each weight is read once, and the largest array is [tile, positions].

Each tile depends explicitly on the previous one. Without that dependency, MLX's lazy evaluation could run independent
tiles concurrently and hold all of them in memory.
"""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from dylora_mlx.model.kernels import numerics, quantized


def output_layer(model: Any) -> nn.Module:
    """Return the output layer of an mlx-lm model: the separate `lm_head`, or the embedding if they are tied."""
    return model.lm_head if "lm_head" in model else model.model.embed_tokens


def output_logits(layer: nn.Module, hidden: mx.array) -> mx.array:
    """Return logits [..., V] of states [..., D] for a head that is tied or separate, full precision or quantised."""
    return layer.as_linear(hidden) if isinstance(layer, (nn.Embedding, nn.QuantizedEmbedding)) else layer(hidden)


def token_losses(layer: nn.Module, hidden: mx.array, targets: mx.array, tile: int, differentiable: bool) -> mx.array:
    """Return the cross-entropy of each token in nats, float32 [N].

    Args:
        layer: The frozen head, tied or separate, possibly quantised.
        hidden: States [N, D].
        targets: Target token ids, int32 [N].
        tile: Rows of the head (vocabulary entries) to process at a time.
        differentiable: Give the result a gradient with respect to `hidden` (the head is frozen). If false, no work is
            spent on gradients.
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
    """Return log sum_v exp(logit_v), float32 [N], of states [N, D], differentiable with respect to `hidden`.

    Use it for losses over the whole vocabulary: the cross-entropy against a fixed distribution q is this value minus
    the product of `hidden` and the mean row of the head under q.
    """

    @mx.custom_function
    def run(hidden: mx.array) -> tuple[mx.array, mx.array]:
        return partition_and_mean_row(layer, hidden, tile, gradient=True)

    @run.vjp
    def backward(primals, cotangents, outputs):
        return (outputs[1] * cotangents[0][:, None]).astype(hidden.dtype)

    return cast(tuple[mx.array, mx.array], run(hidden))[0]


def _forward(layer: Any, hidden: mx.array, targets: mx.array, tile: int, gradient: bool) -> tuple[mx.array, mx.array]:
    """Return the losses [N] and their gradients [N, D] with respect to the states (meaningless unless `gradient`)."""
    partition, mean = partition_and_mean_row(layer, hidden, tile, gradient)
    target_rows = quantized.weight_rows(layer, targets)
    # Round to the head's dtype, as the tiles' logits are: otherwise the loss of a confident token could be negative.
    target_logits = (hidden.astype(mx.float32) * target_rows.astype(mx.float32)).sum(-1).astype(target_rows.dtype)
    return partition - target_logits.astype(mx.float32), mean - target_rows


def partition_and_mean_row(layer: Any, hidden: mx.array, tile: int, gradient: bool) -> tuple[mx.array, mx.array]:
    """Return the log partition of each position and, on request, its expected row of the head.

    Args:
        layer: The head, tied or separate, possibly quantised.
        hidden: States [N, D].
        tile: Rows of the head to process at a time.
        gradient: Compute the expected rows. If false they are zeros.

    Returns:
        log sum_v exp(logit_v), float32 [N], and the mean of the head's rows under softmax(logits), float32 [N, D].
    """
    count, vocabulary = hidden.shape[0], layer.weight.shape[0]
    running_max, total = mx.full((1, count), -mx.inf), mx.zeros((count, 1))
    expected = mx.zeros(hidden.shape, mx.float32)
    for begin in range(0, vocabulary, tile):
        weight = quantized.weight_rows(layer, slice(begin, begin + tile))
        # Chain the tiles: lazy evaluation would otherwise be free to hold the logits of several tiles at once.
        h = mx.depends(hidden, [total, expected]) if begin else hidden
        # Layout [tile, N]: on a CPU a maximum along the first axis is several times as fast as along the last.
        logits = (weight @ h.T).astype(mx.float32)
        new_max = mx.maximum(running_max, mx.max(logits, axis=0, keepdims=True))
        rescale = mx.exp(running_max - new_max).T
        # numerics.exp has no gradient on a CPU; callers that need one write out the VJP from the mean row.
        exponentials = numerics.exp(logits - new_max).T
        total = total * rescale + exponentials @ mx.ones((weight.shape[0], 1))
        if gradient:
            expected = expected * rescale + (exponentials.astype(weight.dtype) @ weight).astype(mx.float32)
        running_max = new_max
    return running_max[0] + mx.log(total[:, 0]), expected / total


def tile_size(positions: int) -> int:
    """Return the number of rows of the head (vocabulary entries) per tile.

    The float32 logits of a tile should fit a CPU's cache (4 MB), or 256 MB on a GPU, where large matmuls are faster.
    """
    budget = (4 if numerics.on_cpu() else 256) << 20
    return max(512, budget // (4 * positions) // 256 * 256)
