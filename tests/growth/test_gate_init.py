"""Closed-form gate rows: agreement with a direct ridge solution, independence of order, and separation of skills."""

from __future__ import annotations

import numpy as np
import pytest

from dylora_mlx.growth import gate_init
from dylora_mlx.growth.gate_init import RIDGE, SHARPNESS, FeatureStatistics

DIMS = 16
RNG = np.random.default_rng(0)
CENTRES = RNG.normal(size=(4, DIMS)) * 1.5


def features(skill: int, n: int = 300, seed: int = 0) -> np.ndarray:
    """Return router features of a synthetic skill, float32 [n, DIMS]."""
    return (3 + CENTRES[skill] + np.random.default_rng([skill, seed]).normal(size=(n, DIMS))).astype(np.float32)


@pytest.mark.parametrize("positives", [[0], [0, 2]])
def test_gate_row_equals_the_direct_ridge_solution(positives):
    """The reference is weighted least squares with an unpenalised intercept; every skill has total weight one."""
    skills = [features(skill, 200 + 50 * skill) for skill in range(4)]
    skill_order = [*positives, *(skill for skill in range(4) if skill not in positives)]
    stacked_features = np.concatenate([skills[skill] for skill in skill_order]).astype(np.float64)
    targets = np.concatenate([np.full(len(skills[skill]), float(skill in positives)) for skill in skill_order])
    weights = np.concatenate([np.full(len(skills[skill]), 1 / len(skills[skill]) / 4) for skill in skill_order])
    centre, level = weights @ stacked_features, weights @ targets
    covariance = (stacked_features - centre).T @ (weights[:, None] * (stacked_features - centre))
    penalty = RIDGE * np.trace(covariance) / DIMS
    root = np.sqrt(weights)[:, None]
    ridge_rows = np.concatenate([root * (stacked_features - centre), np.sqrt(penalty) * np.eye(DIMS)])
    expected = np.linalg.lstsq(
        ridge_rows, np.concatenate([root[:, 0] * (targets - level), np.zeros(DIMS)]), rcond=None
    )[0]
    statistics = [FeatureStatistics.from_features(skill) for skill in skills]
    weight, bias = gate_init.ridge_gate_row(
        [statistics[skill] for skill in positives], [statistics[skill] for skill in range(4) if skill not in positives]
    )
    assert np.allclose(weight, SHARPNESS * expected, atol=1e-4)
    assert bias == pytest.approx(SHARPNESS * (level - expected @ centre - 0.5), abs=1e-3)


def test_the_order_of_skills_does_not_matter():
    positive, *others = (FeatureStatistics.from_features(features(s)) for s in range(4))
    weight, bias = gate_init.ridge_gate_row([positive], others)
    for order in ([2, 0, 1], [1, 2, 0], [2, 1, 0]):
        permuted_weight, permuted_bias = gate_init.ridge_gate_row([positive], [others[i] for i in order])
        assert np.abs(permuted_weight - weight).max() < 1e-5
        assert abs(permuted_bias - bias) < 1e-5


def test_gate_rows_separate_skills():
    statistics = [FeatureStatistics.from_features(features(s)) for s in range(4)]
    rows = [gate_init.ridge_gate_row([statistics[s]], statistics[:s] + statistics[s + 1 :]) for s in range(4)]
    for skill in range(4):
        held_out = features(skill, seed=1)
        logits = np.stack([held_out @ weight + bias for weight, bias in rows], axis=1)
        assert (logits.argmax(1) == skill).mean() > 0.97
        assert logits[:, skill].mean() > 2 > -2 > np.delete(logits, skill, 1).mean()


def test_skills_have_equal_weight_whatever_their_size():
    few, many, other = features(0, 100), np.tile(features(0, 100), (5, 1)), features(1)
    row_of_few = gate_init.ridge_gate_row(
        [FeatureStatistics.from_features(few)], [FeatureStatistics.from_features(other)]
    )
    row_of_repeated = gate_init.ridge_gate_row(
        [FeatureStatistics.from_features(many)], [FeatureStatistics.from_features(other)]
    )
    assert np.allclose(row_of_few[0], row_of_repeated[0], atol=1e-4)
    assert row_of_few[1] == pytest.approx(row_of_repeated[1], abs=1e-3)


def test_gate_row_without_other_skills_is_zero():
    weight, bias = gate_init.ridge_gate_row([FeatureStatistics.from_features(features(0))], [])
    assert not weight.any()
    assert weight.shape == (DIMS,)
    assert bias == 0


def test_feature_statistics_are_the_gram_matrix_and_the_sum():
    x = features(2, 7)
    statistics = FeatureStatistics.from_features(x)
    double = x.astype(np.float64)
    assert np.allclose(statistics.gram, double.T @ double, rtol=1e-6)
    assert np.allclose(statistics.total, double.sum(0), rtol=1e-6)
    assert statistics.num_rows == 7
    arrays = statistics.arrays()
    assert arrays["gram"].dtype == arrays["total"].dtype == np.float32, "the dtype of the checkpoint"
    assert arrays["count"].tolist() == [7]


def test_accumulated_statistics_equal_those_of_all_features():
    x = features(1, 90)
    accumulator = gate_init.StatisticsAccumulator(DIMS)
    for part in (x[:13], x[13:13], x[13:]):
        accumulator.add(part)
    for accumulated, direct in zip(accumulator.statistics(), FeatureStatistics.from_features(x), strict=True):
        assert np.allclose(accumulated, direct, rtol=1e-6)
