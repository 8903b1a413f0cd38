"""The loss head: cross-entropy over a wide frozen vocabulary without ever holding [tokens, vocabulary].

Positions are gathered first, then taken in chunks. The gradient of the hidden state is computed in the forward pass,
while a chunk's probabilities are at hand: d loss / d h = p W - W[target]. Each chunk is made to depend on the one
before it, since lazy evaluation would run independent chunks side by side and hold them all.
"""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from dylora_mlx.model import numerics


def weight_of(model: Any) -> nn.Module:
    """The layer that maps states to logits: the tied embedding or the separate head of an mlx-lm model."""
    return model.model.embed_tokens if model.tie_word_embeddings else model.lm_head


def logits_of(layer: nn.Module, hidden: mx.array) -> mx.array:
    """Logits [..., V] of states [..., D], for a tied or separate, full or quantised head."""
    return layer.as_linear(hidden) if isinstance(layer, (nn.Embedding, nn.QuantizedEmbedding)) else layer(hidden)


def _dense_weight(layer: Any) -> mx.array:
    """[V, D]; a quantised head is dequantised, lazily."""
    if isinstance(layer, (nn.QuantizedEmbedding, nn.QuantizedLinear)):
        return mx.dequantize(
            layer.weight,
            layer.scales,
            layer.get("biases"),
            group_size=layer.group_size,
            bits=layer.bits,
            mode=layer.mode,
        )
    return layer.weight


def token_losses(layer: nn.Module, hidden: mx.array, targets: mx.array, chunk: int, differentiable: bool) -> mx.array:
    """Cross-entropy in nats, float32 [N], of states [N, D] against targets int32 [N].

    With `differentiable`, the result has a gradient towards `hidden` (the head itself is frozen); without, no gradient
    work is done.
    """
    if not differentiable:
        return _forward(layer, hidden, targets, chunk, gradient=False)[0]

    @mx.custom_function
    def run(hidden: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        return _forward(layer, hidden, targets, chunk, gradient=True)

    @run.vjp
    def backward(primals, cotangents, outputs):
        hidden, targets = primals
        grad = outputs[1] * cotangents[0][:, None]
        return grad.astype(hidden.dtype), mx.zeros_like(targets)

    return cast(tuple[mx.array, mx.array], run(hidden, targets))[0]


def _forward(
    layer: nn.Module, hidden: mx.array, targets: mx.array, chunk: int, gradient: bool
) -> tuple[mx.array, mx.array]:
    losses, grads = [], []
    weight = _dense_weight(layer)
    for begin in range(0, hidden.shape[0], chunk):
        h, target = hidden[begin : begin + chunk], targets[begin : begin + chunk]
        if losses:  # wait for the chunk before
            h = mx.depends(h, [losses[-1], *grads[-1:]])
        logits = (h @ weight.T).astype(mx.float32)
        shifted = logits - mx.max(logits, axis=-1, keepdims=True)
        exponentials = numerics.exp(shifted)
        total = mx.sum(exponentials, axis=-1, keepdims=True)
        losses.append(mx.log(total[:, 0]) - mx.take_along_axis(shifted, target[:, None], axis=-1)[:, 0])
        if gradient:
            expected = (exponentials / total).astype(hidden.dtype) @ weight
            grads.append((expected - weight[target]).astype(mx.float32))
    zero = mx.zeros(hidden.shape, mx.float32) if not gradient else mx.concatenate(grads)
    return mx.concatenate(losses), zero


def chunk_size(vocabulary: int, budget_bytes: int = 128 << 20) -> int:
    """Positions per chunk so that a chunk's float32 logits take about `budget_bytes`."""
    return max(16, min(1024, budget_bytes // (4 * vocabulary)))
