"""exp and the gated activations against NumPy in double precision, and their gradients against autodiff."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from dylora_mlx.model.kernels import numerics
from tests.tiny import close


def relative_error(computed: mx.array, expected: np.ndarray) -> float:
    """Return the largest relative error."""
    return float(np.max(np.abs(np.array(computed, np.float64) - expected) / np.abs(expected)))


def test_exp_over_its_whole_range():
    x = np.concatenate([np.linspace(-87, 88, 200_001), np.linspace(-1e-3, 1e-3, 1001)]).astype(np.float32)
    expected = np.exp(x.astype(np.float64))
    error = np.abs(np.array(numerics.exp(mx.array(x)), np.float64) / expected - 1)
    assert np.all(error < 3e-7 + 1e-7 * np.abs(x))


def test_exp_at_the_edges():
    x = mx.array([0.0, -0.0, -87.0, -88.0, -1e4, -1e30, -mx.inf])
    values = np.array(numerics.exp(x))
    assert values[0] == values[1] == 1
    assert np.all((values[2:] > 0) if numerics.on_cpu() else (values[2:] >= 0))
    assert np.all(values[2:] < 1.7e-38)


def test_exp_of_bfloat16_is_mlx_exp():
    x = mx.array([-1.0, 0.0, 2.0], mx.bfloat16)
    assert numerics.exp(x).dtype == mx.bfloat16
    assert mx.array_equal(numerics.exp(x), mx.exp(x))


def test_exp2():
    x = np.linspace(-126, 127.9, 100_001).astype(np.float32)
    assert relative_error(numerics.exp2(mx.array(x)), np.exp2(x.astype(np.float64))) < (
        3e-7 if numerics.on_cpu() else 2e-5
    )


def test_geglu():
    x = np.concatenate([np.linspace(-12, 12, 10_001), [-1e4, -100, 100, 1e4]]).astype(np.float32)
    double = x.astype(np.float64)
    expected = 0.5 * double * (1 + np.tanh(np.sqrt(2 / np.pi) * (double + 0.044715 * double**3)))
    values = np.array(numerics.geglu(mx.array(x), mx.full(x.shape, -2.0))) / -2
    assert np.isfinite(values).all()
    assert np.abs(values - expected).max() < 1e-5 * 1e4 * 1e-3
    inside = np.abs(x) <= 12
    assert np.abs(values - expected)[inside].max() < 2e-6


def plain(x, y):
    """Return the gated GELU of mlx.nn."""
    return nn.gelu_approx(x) * y


def test_geglu_equals_mlx_gelu_approx():
    x, y = (mx.random.normal((500,), key=mx.random.key(k)) * 4 for k in (0, 1))
    assert close(numerics.geglu(x, y), plain(x, y), 4e-6)


def test_gradients_of_geglu():
    keys = mx.random.split(mx.random.key(1), 3)
    x, y, direction = (mx.random.normal((20, 31), key=key) * 3 for key in keys)
    x[0, 0], x[0, 1] = 50.0, -50.0
    expected = mx.grad(lambda x, y: (plain(x, y) * direction).sum(), argnums=(0, 1))(x, y)
    gradients = mx.grad(lambda x, y: (numerics.geglu(x, y) * direction).sum(), argnums=(0, 1))(x, y)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert close(ours, theirs, 1e-5)
        assert mx.abs(theirs).max() > 0.1


def test_gradient_of_geglu_at_extremes_is_finite():
    x = mx.array([-1e4, -60.0, 0.0, 60.0, 1e4])
    slopes = np.array(mx.grad(lambda x: numerics.geglu(x, mx.ones(5)).sum())(x))
    assert close(slopes, [0, 0, 0.5, 1, 1], 1e-6)


def test_swiglu():
    x = np.concatenate([np.linspace(-30, 30, 10_001), [-1e4, -200, 200, 1e4]]).astype(np.float32)
    expected = x.astype(np.float64) / (1 + np.exp(-np.clip(x.astype(np.float64), -700, None)))
    values = np.array(numerics.swiglu(mx.array(x), mx.full(x.shape, -2.0))) / -2
    assert np.isfinite(values).all()
    assert np.all(np.abs(values - expected) < 1e-6 * np.maximum(1, np.abs(x)))


def test_gradients_of_swiglu():
    x, y, direction = (mx.random.normal((500,), key=mx.random.key(k)) * 4 for k in (0, 1, 2))

    def slopes(f):
        return mx.grad(lambda x, y: (f(x, y) * direction).sum(), argnums=(0, 1))(x, y)

    for ours, theirs in zip(slopes(numerics.swiglu), slopes(lambda x, y: nn.silu(x) * y), strict=True):
        assert close(ours, theirs, 1e-5)
    assert np.isfinite(np.array(mx.grad(lambda x: numerics.swiglu(x, mx.ones(2)).sum())(mx.array([-1e4, 1e4])))).all()
