"""Exponentials for MLX's CPU backend, whose own cost 15 ns an element, twenty times a product.

`exp` below is a handful of products and sums that the backend vectorises: three to four times as fast, within 3e-7
of the true value. On a GPU every function here is MLX's own.
"""

from __future__ import annotations

from typing import cast

import mlx.core as mx

_LOG2_E = 1.4426950408889634
# ln 2 in two parts, so that x - n ln 2 is exact in float32 (Cody and Waite 1980, chapter 6).
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
# Minimax polynomial of (exp(r) - 1 - r) / r^2 on [-ln 2 / 2, ln 2 / 2] (Cephes, expf).
_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_GELU = (1.5957691216057308, 0.07135481282149961)
"""2 sqrt(2 / pi), and 0.044715 times it."""


def on_cpu() -> bool:
    return mx.default_device() == mx.Device(mx.cpu)


def exp(x: mx.array) -> mx.array:
    """exp(x) for float32 x below 88, without a gradient of its own; arguments below -87 count as -87."""
    if not on_cpu() or x.dtype != mx.float32:
        return mx.exp(x)
    x = mx.maximum(x, -87.0)
    n = mx.round(x * _LOG2_E)
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = r * _POLYNOMIAL[0] + _POLYNOMIAL[1]
    for c in _POLYNOMIAL[2:]:
        p = p * r + c
    p = p * (r * r) + (r + 1.0)
    # Multiply by 2^n by adding n to the exponent's bits.
    return (p.view(mx.int32) + (n.astype(mx.int32) << 23)).view(mx.float32)


@mx.custom_function
def _fast_softmax(x: mx.array) -> mx.array:
    e = exp(x - mx.max(x, axis=-1, keepdims=True))
    return e * mx.reciprocal(mx.sum(e, axis=-1, keepdims=True))


@_fast_softmax.vjp
def _softmax_vjp(_primal: mx.array, cotangent: mx.array, p: mx.array) -> mx.array:
    weighted = p * cotangent
    return weighted - p * mx.sum(weighted, axis=-1, keepdims=True)


def softmax(x: mx.array) -> mx.array:
    """Softmax over the last axis, with a gradient."""
    if on_cpu() and x.dtype == mx.float32:
        return cast(mx.array, _fast_softmax(x))
    return mx.softmax(x, axis=-1, precise=True)


@mx.custom_function
def _fast_gelu(x: mx.array) -> tuple[mx.array, mx.array]:
    s = mx.reciprocal(1.0 + exp(mx.minimum(-x * (_GELU[0] + _GELU[1] * (x * x)), 80.0)))
    return x * s, s


@_fast_gelu.vjp
def _gelu_vjp(x: mx.array, cotangents: list[mx.array], outputs: list[mx.array]) -> mx.array:
    s = outputs[1]
    slope = s + x * s * (1.0 - s) * (_GELU[0] + 3.0 * _GELU[1] * (x * x))
    return cotangents[0] * slope


def gelu(x: mx.array) -> mx.array:
    """GELU's tanh approximation, written with a sigmoid: 0.5 (1 + tanh u) = sigmoid(2 u); with a gradient."""
    if on_cpu() and x.dtype == mx.float32:
        return cast(tuple[mx.array, mx.array], _fast_gelu(x))[0]
    return x * mx.sigmoid(x * (_GELU[0] + _GELU[1] * (x * x)))
