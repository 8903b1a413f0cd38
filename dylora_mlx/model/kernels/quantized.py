"""Matmuls with quantised projections, dequantised on the fly on a CPU.

MLX's quantised matmul is designed for GPUs. On its CPU backend, a product with 512 rows takes thirty times as long as
dequantising the matrix and calling BLAS. On a CPU the matrix is therefore dequantised for the forward pass, and again
for the backward pass instead of being kept, so that a quantised base still saves its memory.
"""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from dylora_mlx.model.kernels import numerics


def weight_rows(layer: Any, rows: slice | mx.array | None = None) -> mx.array:
    """Return rows [n, inputs] of a layer's weight, all of them or those selected, dequantised if needed."""
    all_rows = rows is None
    if not isinstance(layer, (nn.QuantizedEmbedding, nn.QuantizedLinear)):
        return layer.weight if all_rows else layer.weight[rows]
    biases = layer.get("biases")
    parts = [layer.weight, layer.scales, *([] if biases is None else [biases])]
    return mx.dequantize(
        *(parts if all_rows else [part[rows] for part in parts]),
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
    )


class _DequantizedLinear(nn.Module):
    """A quantised linear layer that dequantises its matrix at every use."""

    def __init__(self, layer: Any):
        super().__init__()
        self.layer = layer

    def __call__(self, x: mx.array) -> mx.array:
        layer = self.layer
        y = _dequantized_matmul(layer, x)
        return y + layer["bias"] if "bias" in layer else y


def for_batch(layer: nn.Module) -> nn.Module:
    """Return the form of a projection that is fastest for a batch of rows [B, L, inputs].

    On a CPU a quantised projection is wrapped to be dequantised. Any other layer is returned unchanged.
    """
    return _DequantizedLinear(layer) if isinstance(layer, nn.QuantizedLinear) and numerics.on_cpu() else layer


def _dequantized_matmul(layer: Any, x: mx.array) -> mx.array:
    # A hand-written VJP: autodiff would keep the dequantised matrix from the forward to the backward pass.
    @mx.custom_function
    def run(x: mx.array) -> mx.array:
        return x @ weight_rows(layer).T.astype(x.dtype)

    @run.vjp
    def backward(_primals, cotangent, _output):
        return cotangent @ weight_rows(layer).astype(cotangent.dtype)

    return cast(mx.array, run(x))
