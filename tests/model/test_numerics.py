"""exp, softmax and GELU against NumPy in double precision, and their gradients against autodiff."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from dylora_mlx.model import numerics
from tests.tiny import close


def relative(found: mx.array, expected: np.ndarray) -> float:
    return float(np.max(np.abs(np.array(found, np.float64) - expected) / np.abs(expected)))


def test_exp_over_its_whole_range():
    x = np.concatenate([np.linspace(-87, 88, 200_001), np.linspace(-1e-3, 1e-3, 1001)]).astype(np.float32)
    assert relative(numerics.exp(mx.array(x)), np.exp(x.astype(np.float64))) < 3e-7


def test_exp_at_the_edges():
    x = mx.array([0.0, -0.0, -87.0, -88.0, -1e4, -1e30, -mx.inf])
    found = np.array(numerics.exp(x))
    assert found[0] == found[1] == 1
    assert np.all((found[2:] > 0) if numerics.on_cpu() else (found[2:] >= 0))
    assert np.all(found[2:] < 1.7e-38)


def test_exp_keeps_other_types():
    x = mx.array([-1.0, 0.0, 2.0], mx.bfloat16)
    assert numerics.exp(x).dtype == mx.bfloat16
    assert mx.array_equal(numerics.exp(x), mx.exp(x))


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_softmax(scale):
    x = (scale * np.random.default_rng(0).normal(size=(40, 33))).astype(np.float32)
    shifted = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    expected = shifted / shifted.sum(-1, keepdims=True)
    found = np.array(numerics.softmax(mx.array(x)))
    assert np.abs(found - expected).max() < 1e-6
    assert np.abs(found.sum(-1) - 1).max() < 1e-6


def test_softmax_of_masked_scores():
    x = mx.array([[1.0, 2.0, -1e30, -1e30], [-1e30, -1e30, -1e30, 5.0], [1e4, 1e4, -1e4, 0.0]])
    found = np.array(numerics.softmax(x))
    e = np.exp(1)
    assert close(found, [[1 / (1 + e), e / (1 + e), 0, 0], [0, 0, 0, 1], [0.5, 0.5, 0, 0]], 1e-6)


def test_gelu():
    x = np.concatenate([np.linspace(-12, 12, 10_001), [-1e4, -100, 100, 1e4]]).astype(np.float32)
    double = x.astype(np.float64)
    expected = 0.5 * double * (1 + np.tanh(np.sqrt(2 / np.pi) * (double + 0.044715 * double**3)))
    found = np.array(numerics.gelu(mx.array(x)))
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() < 1e-5 * 1e4 * 1e-3
    inside = np.abs(x) <= 12
    assert np.abs(found - expected)[inside].max() < 2e-6


def test_gelu_is_mlx_lms():
    x = mx.random.normal((500,), key=mx.random.key(0)) * 4
    assert close(numerics.gelu(x), nn.gelu_approx(x), 2e-6)


def plain_softmax(x):
    return mx.softmax(x, axis=-1, precise=True)


@pytest.mark.parametrize(
    ("ours", "plain"), [(numerics.softmax, plain_softmax), (numerics.gelu, nn.gelu_approx)], ids=["softmax", "gelu"]
)
def test_gradients(ours, plain):
    keys = mx.random.split(mx.random.key(1), 2)
    x, direction = mx.random.normal((20, 31), key=keys[0]) * 3, mx.random.normal((20, 31), key=keys[1])
    x[0, 0], x[0, 1] = 50.0, -50.0
    expected = mx.grad(lambda x: (plain(x) * direction).sum())(x)
    found = mx.grad(lambda x: (ours(x) * direction).sum())(x)
    assert close(found, expected, 3e-6)
    assert mx.abs(expected).max() > 0.1


def test_gradient_of_gelu_at_extremes_is_finite():
    slopes = np.array(mx.grad(lambda x: numerics.gelu(x).sum())(mx.array([-1e4, -60.0, 0.0, 60.0, 1e4])))
    assert close(slopes, [0, 0, 0.5, 1, 1], 1e-6)
