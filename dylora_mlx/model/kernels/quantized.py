"""Products of rows with quantised projections.

MLX's quantised product is made for GPUs; on its CPU backend one of 512 rows takes thirty times as long as dequantising the
matrix and a BLAS product. So there the matrix is dequantised, and again in the backward pass instead of kept: what the base
saves in memory stays saved.
"""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from dylora_mlx.model.kernels import numerics


def weight_rows(layer: Any, which: slice | mx.array | None = None) -> mx.array:
    """Rows [n, inputs] of a layer's weight, all of them or some, dequantised if need be."""
    whole = which is None
    if not isinstance(layer, (nn.QuantizedEmbedding, nn.QuantizedLinear)):
        return layer.weight if whole else layer.weight[which]
    biases = layer.get("biases")
    parts = [layer.weight, layer.scales, *([] if biases is None else [biases])]
    return mx.dequantize(
        *(parts if whole else [part[which] for part in parts]),
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
    )


class _DequantizedLinear(nn.Module):
    """A quantised projection, its matrix dequantised whenever it is needed."""

    def __init__(self, layer: Any):
        super().__init__()
        self.layer = layer

    def __call__(self, x: mx.array) -> mx.array:
        layer = self.layer
        y = _product(layer, x)
        return y + layer["bias"] if "bias" in layer else y


def for_batch(layer: nn.Module) -> nn.Module:
    """The projection as it is best for rows [B, L, inputs]: itself, or on a CPU a quantised one dequantised."""
    return _DequantizedLinear(layer) if isinstance(layer, nn.QuantizedLinear) and numerics.on_cpu() else layer


def _product(layer: Any, x: mx.array) -> mx.array:
    @mx.custom_function
    def run(x: mx.array) -> mx.array:
        return x @ weight_rows(layer).T.astype(x.dtype)

    @run.vjp
    def backward(_primals, cotangent, _output):
        return cotangent @ weight_rows(layer).astype(cotangent.dtype)

    return cast(mx.array, run(x))
