"""Fast exponentials, gated activations (GeGLU, SwiGLU) and top-k selection for MLX's CPU backend.

MLX's CPU exponential takes 15 ns per element, twenty times as long as a multiplication. `exp` below is a short chain of
products and sums that the backend vectorises. It is about four times as fast, with a relative error below
3e-7 + 1e-7 |x|. On a GPU, `exp` and `exp2` call MLX's `exp`, and the activations are differentiated by MLX.
"""

from __future__ import annotations

import math
from typing import cast

import mlx.core as mx

LOG2_E = 1.4426950408889634
"""log2(e): multiply a natural exponent by it to get an exponent of 2."""
_ROUND = 12582912.0
"""1.5 * 2^23: adding it to a float32 of moderate size leaves the nearest integer in the lowest mantissa bits."""
# Coefficients of 2^r on [-1/2, 1/2], highest power first: exactly 1 at r = 0, relative error 9.2e-8. Fitted by least
# squares, iteratively reweighted towards equal errors (Lawson 1961).
_POLYNOMIAL = (1.326472715e-3, 9.671512643e-3, 5.550733743e-2, 2.402224209e-1, 6.931469776e-1, 1.0)
_TANH = (1.5957691216057308, 0.07135481282149961)
"""Coefficients of GELU's tanh approximation: 2 sqrt(2 / pi), and 0.044715 times it."""
_GELU = (-LOG2_E * _TANH[0], -LOG2_E * _TANH[1])
"""The same coefficients, negated and in base 2, for sigmoid(v) = 1 / (1 + 2^(-v log2(e)))."""


def on_cpu() -> bool:
    """Return whether MLX's default device is the CPU."""
    return mx.default_device() == mx.Device(mx.cpu)


def top_k_indices(x: mx.array, k: int) -> mx.array:
    """Return the indices, int32 [..., k], of the k largest entries of x [..., n], without a gradient.

    The largest comes first, and ties go to the lower index. On a CPU with small k this makes k argmax passes, which for
    n = 1,000 take a tenth of the time of a sort.
    """
    x = mx.stop_gradient(x)
    if not on_cpu() or 4 * k > x.shape[-1]:
        return mx.argsort(-x, axis=-1)[..., :k].astype(mx.int32)
    indices, positions = [], mx.arange(x.shape[-1])
    for _ in range(k):
        indices.append(mx.argmax(x, axis=-1, keepdims=True))
        x = mx.where(positions == indices[-1], -mx.inf, x)
    return mx.concatenate(indices, axis=-1).astype(mx.int32)


def exp(x: mx.array) -> mx.array:
    """Return exp(x) for float32 x below 88; arguments below -87 are clamped to -87.

    The fast CPU path defines no gradient: use it inside a custom VJP.
    """
    return exp2(x * LOG2_E) if on_cpu() and x.dtype == mx.float32 else mx.exp(x)


def exp2(x: mx.array) -> mx.array:
    """Return 2^x for float32 x below 128; arguments below -126 are clamped to -126.

    The fast CPU path defines no gradient: use it inside a custom VJP.
    """
    if not on_cpu() or x.dtype != mx.float32:
        return mx.exp(x * math.log(2))
    x = mx.maximum(x, -126.0)
    # Split x = n + r with n = round(x): after adding _ROUND, the low mantissa bits hold n.
    shifted = x + _ROUND
    r = x - (shifted - _ROUND)
    p = r * _POLYNOMIAL[0] + _POLYNOMIAL[1]
    for c in _POLYNOMIAL[2:]:
        p = p * r + c
    # Multiply by 2^n: shift n, the lowest bits of `shifted`, to the float32 exponent field and add it there.
    return (p.view(mx.int32) + (shifted.view(mx.int32) << 23)).view(mx.float32)


@mx.custom_function
def _fast_geglu(x: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
    # sigmoid = 1 / (1 + 2^u); the _GELU coefficients already include -log2(e). The clamp keeps 2^u finite.
    u = mx.minimum(x * (_GELU[0] + _GELU[1] * (x * x)), 120.0)
    s = mx.reciprocal(1.0 + exp2(u))
    return (x * s) * y, s


@_fast_geglu.vjp
def _geglu_vjp(
    primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]
) -> tuple[mx.array, mx.array]:
    # The second output, the sigmoid, exists only to be reused here; callers drop it, so its cotangent is ignored.
    (x, y), s, cotangent = primals, outputs[1], cotangents[0]
    gelu = x * s
    # d gelu / dx = s + x s (1 - s) d(-u ln 2) / dx
    slope = s - (gelu - gelu * s) * ((_GELU[0] + 3.0 * _GELU[1] * (x * x)) * math.log(2))
    return cotangent * y * slope, cotangent * gelu


def geglu(x: mx.array, y: mx.array) -> mx.array:
    """Return gelu(x) * y. For the backward pass only x, y and one sigmoid are kept.

    This is GELU's tanh approximation, written with a sigmoid: 0.5 (1 + tanh u) = sigmoid(2 u).
    """
    if on_cpu() and x.dtype == mx.float32:
        return cast(tuple[mx.array, mx.array], _fast_geglu(x, y))[0]
    return x * mx.sigmoid(x * (_TANH[0] + _TANH[1] * (x * x))) * y


@mx.custom_function
def _fast_swiglu(x: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
    s = mx.reciprocal(1.0 + exp2(mx.minimum(x * -LOG2_E, 120.0)))
    return (x * s) * y, s


@_fast_swiglu.vjp
def _swiglu_vjp(
    primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]
) -> tuple[mx.array, mx.array]:
    (x, y), s, cotangent = primals, outputs[1], cotangents[0]
    silu = x * s
    return cotangent * y * (s + (silu - silu * s)), cotangent * silu


def swiglu(x: mx.array, y: mx.array) -> mx.array:
    """Return silu(x) * y. For the backward pass only x, y and one sigmoid are kept."""
    if on_cpu() and x.dtype == mx.float32:
        return cast(tuple[mx.array, mx.array], _fast_swiglu(x, y))[0]
    return x * mx.sigmoid(x) * y
