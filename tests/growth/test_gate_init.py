"""Gate rows in closed form: the direct ridge solution, in any order, telling synthetic skills apart."""

from __future__ import annotations

import numpy as np
import pytest

from dylora_mlx.growth import gate_init
from dylora_mlx.growth.gate_init import RIDGE, SHARPNESS, FeatureStatistics

DIMS = 16
RNG = np.random.default_rng(0)
CENTRES = RNG.normal(size=(4, DIMS)) * 1.5


def features(skill: int, n: int = 300, seed: int = 0) -> np.ndarray:
    return (3 + CENTRES[skill] + np.random.default_rng([skill, seed]).normal(size=(n, DIMS))).astype(np.float32)


@pytest.mark.parametrize("own", [[0], [0, 2]])
def test_equals_a_direct_solution(own):
    """Weighted least squares with an unpenalised intercept, every skill weighing one."""
    skills = [features(s, 200 + 50 * s) for s in range(4)]
    order = [*own, *(s for s in range(4) if s not in own)]
    x = np.concatenate([skills[s] for s in order]).astype(np.float64)
    y = np.concatenate([np.full(len(skills[s]), float(s in own)) for s in order])
    w = np.concatenate([np.full(len(skills[s]), 1 / len(skills[s]) / 4) for s in order])
    centre, level = w @ x, w @ y
    covariance = (x - centre).T @ (w[:, None] * (x - centre))
    penalty = RIDGE * np.trace(covariance) / DIMS
    root = np.sqrt(w)[:, None]
    stacked = np.concatenate([root * (x - centre), np.sqrt(penalty) * np.eye(DIMS)])
    expected = np.linalg.lstsq(stacked, np.concatenate([root[:, 0] * (y - level), np.zeros(DIMS)]), rcond=None)[0]
    statistics = [FeatureStatistics.from_features(s) for s in skills]
    weight, bias = gate_init.ridge_gate_row(
        [statistics[s] for s in own], [statistics[s] for s in range(4) if s not in own]
    )
    assert np.allclose(weight, SHARPNESS * expected, atol=1e-4)
    assert bias == pytest.approx(SHARPNESS * (level - expected @ centre - 0.5), abs=1e-3)


def test_the_order_of_skills_does_not_matter():
    own, *others = (FeatureStatistics.from_features(features(s)) for s in range(4))
    weight, bias = gate_init.ridge_gate_row([own], others)
    for order in ([2, 0, 1], [1, 2, 0], [2, 1, 0]):
        again, bias_again = gate_init.ridge_gate_row([own], [others[i] for i in order])
        assert np.abs(again - weight).max() < 1e-5
        assert abs(bias_again - bias) < 1e-5


def test_it_tells_skills_apart():
    statistics = [FeatureStatistics.from_features(features(s)) for s in range(4)]
    rows = [gate_init.ridge_gate_row([statistics[s]], statistics[:s] + statistics[s + 1 :]) for s in range(4)]
    for skill in range(4):
        held_out = features(skill, seed=1)
        logits = np.stack([held_out @ weight + bias for weight, bias in rows], axis=1)
        assert (logits.argmax(1) == skill).mean() > 0.97
        assert logits[:, skill].mean() > 2 > -2 > np.delete(logits, skill, 1).mean()


def test_every_skill_weighs_the_same():
    few, many, other = features(0, 100), np.tile(features(0, 100), (5, 1)), features(1)
    row = gate_init.ridge_gate_row([FeatureStatistics.from_features(few)], [FeatureStatistics.from_features(other)])
    again = gate_init.ridge_gate_row([FeatureStatistics.from_features(many)], [FeatureStatistics.from_features(other)])
    assert np.allclose(row[0], again[0], atol=1e-4)
    assert row[1] == pytest.approx(again[1], abs=1e-3)


def test_a_row_against_nothing_is_zero():
    weight, bias = gate_init.ridge_gate_row([FeatureStatistics.from_features(features(0))], [])
    assert not weight.any()
    assert weight.shape == (DIMS,)
    assert bias == 0


def test_statistics():
    x = features(2, 7)
    found = FeatureStatistics.from_features(x)
    double = x.astype(np.float64)
    assert np.allclose(found.gram, double.T @ double, rtol=1e-6)
    assert np.allclose(found.total, double.sum(0), rtol=1e-6)
    assert found.num_rows == 7
    arrays = found.arrays()
    assert arrays["gram"].dtype == arrays["total"].dtype == np.float32, "as a checkpoint keeps them"
    assert arrays["count"].tolist() == [7]


def test_statistics_of_parts_are_those_of_the_whole():
    x = features(1, 90)
    sums = gate_init.StatisticsAccumulator(DIMS)
    for part in (x[:13], x[13:13], x[13:]):
        sums.add(part)
    for found, whole in zip(sums.statistics(), FeatureStatistics.from_features(x), strict=True):
        assert np.allclose(found, whole, rtol=1e-6)
