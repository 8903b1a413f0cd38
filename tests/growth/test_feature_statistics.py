"""Feature statistics: the discriminant's rows against a direct computation, and the scale of standardised features."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx.growth.feature_statistics import (
    SHRINKAGE,
    FeatureScale,
    FeatureStatistics,
    PooledStatistics,
    StatisticsAccumulator,
    discriminant_rows,
)
from dylora_mlx.model.routing import router
from dylora_mlx.model.routing.router import Gate

DIMS = 16
RNG = np.random.default_rng(0)
CENTRES = RNG.normal(size=(4, DIMS)) * 1.5


def features(skill: int, n: int = 300, seed: int = 0) -> np.ndarray:
    """Return router features of a synthetic skill, float32 [n, DIMS]."""
    return (3 + CENTRES[skill] + np.random.default_rng([skill, seed]).normal(size=(n, DIMS))).astype(np.float32)


def statistics_of(*skills: np.ndarray) -> list[FeatureStatistics]:
    return [FeatureStatistics.from_features(skill) for skill in skills]


def discriminant(skills: list[tuple[np.ndarray, int]], experts: int) -> tuple[np.ndarray, np.ndarray, FeatureScale]:
    """Return the rows for (features, expert_id) pairs, and the scale of their features."""
    statistics = [(FeatureStatistics.from_features(x), expert_id) for x, expert_id in skills]
    pooled = PooledStatistics.of([each for each, _ in statistics])
    scale = FeatureScale.pooled(pooled)
    return *discriminant_rows(pooled, [expert_id for _, expert_id in skills], experts, scale), scale


@pytest.mark.parametrize("owners", [[0, 1, 2, 3], [0, 1, 1, 2], [1, 0, 1, 1]])
def test_rows_are_those_of_the_direct_discriminant(owners):
    """The reference computes each skill's mean and the covariance around its expert's centre from the features."""
    skills = [features(skill, 200 + 50 * skill) for skill in range(4)]
    weight, bias, scale = discriminant(list(zip(skills, owners, strict=True)), 1 + max(owners))
    x = [((skill - scale.mean) / scale.std).astype(np.float64) for skill in skills]
    groups = [[x[i] for i in range(4) if owners[i] == expert] for expert in range(1 + max(owners))]
    centres = np.array([np.mean([skill.mean(0) for skill in group], axis=0) for group in groups])
    deviations = [x[i] - centres[owners[i]] for i in range(4)]
    covariance = np.mean([d.T @ d / len(d) for d in deviations], axis=0)
    covariance += SHRINKAGE * np.trace(covariance) / DIMS * np.eye(DIMS)
    # The log density of a Gaussian, without the terms that all experts share.
    z = x[2]
    inverse = np.linalg.inv(covariance)
    densities = [
        -0.5 * np.einsum("nd,de,ne->n", z - centre, inverse, z - centre) + np.log(len(group) / 4)
        for centre, group in zip(centres, groups, strict=True)
    ]
    expected = np.array(densities).T
    logits = z @ weight.T + bias
    assert np.allclose(logits - logits[:, :1], expected - expected[:, :1], atol=2e-2)


def test_the_order_of_skills_does_not_matter():
    skills = [(features(s), s) for s in range(4)]
    weight, bias, _ = discriminant(skills, 4)
    for order in ([2, 0, 1, 3], [3, 2, 1, 0]):
        permuted_weight, permuted_bias, _ = discriminant([skills[i] for i in order], 4)
        assert np.abs(permuted_weight - weight).max() < 1e-4
        assert np.abs(permuted_bias - bias).max() < 1e-4


def test_rows_separate_skills():
    weight, bias, scale = discriminant([(features(s), s) for s in range(4)], 4)
    for skill in range(4):
        logits = scale.standardised(features(skill, seed=1)) @ weight.T + bias
        assert (logits.argmax(1) == skill).mean() > 0.97


def test_skills_have_equal_weight_whatever_their_size():
    few, many, other = features(0, 100), np.tile(features(0, 100), (5, 1)), features(1)
    for of_few, of_many in zip(
        discriminant([(few, 0), (other, 1)], 2)[:2], discriminant([(many, 0), (other, 1)], 2)[:2], strict=True
    ):
        assert np.allclose(of_few, of_many, atol=1e-3)


def test_an_expert_without_a_skill_is_unlikely_everywhere():
    weight, bias, scale = discriminant([(features(1), 1), (features(2), 2)], 3)
    assert np.isfinite(weight).all()
    assert np.isfinite(bias).all()
    for skill in (1, 2):
        logits = scale.standardised(features(skill, seed=1)) @ weight.T + bias
        gates = np.exp(logits - logits.max(1, keepdims=True))
        gates /= gates.sum(1, keepdims=True)
        assert gates[:, 0].mean() < 0.02


def test_a_constant_feature_does_no_harm():
    skills = [features(s) for s in range(2)]
    for skill in skills:
        skill[:, 3] = 7.0
    weight, bias, scale = discriminant([(skills[0], 0), (skills[1], 1)], 2)
    assert np.isfinite(weight).all()
    logits = scale.standardised(skills[1]) @ weight.T + bias
    assert (logits.argmax(1) == 1).mean() > 0.97


def test_the_scale_standardises_and_folds_exactly():
    x = (features(0) * np.linspace(0.1, 20, DIMS)).astype(np.float32)
    scale = FeatureScale.pooled(PooledStatistics.of(statistics_of(x)))
    standard = scale.standardised(x)
    assert np.abs(standard.mean(0)).max() < 1e-3
    assert np.allclose(standard.std(0), 1, atol=1e-2)
    gate = Gate(mx.random.normal((3, DIMS), key=mx.random.key(0)), mx.random.normal((3,), key=mx.random.key(1)))
    rows = scale.for_standardised(gate)
    raw_logits, logits = (np.array(router.logits(mx.array(v), g)) for v, g in ((x, gate), (standard, rows)))
    assert np.allclose(logits, raw_logits, rtol=1e-3, atol=1e-2)
    for back, original in zip(scale.for_raw(rows), gate, strict=True):
        assert np.allclose(np.array(back), np.array(original), rtol=1e-4, atol=1e-3)


def test_the_gradient_is_that_of_the_standardised_rows():
    x, scale = features(1, 40), FeatureScale.pooled(PooledStatistics.of(statistics_of(features(0), features(1))))
    gate = Gate(0.1 * mx.random.normal((3, DIMS), key=mx.random.key(0)), mx.zeros((3,)))
    targets = mx.array(np.arange(40) % 3)

    def raw_loss(weight: mx.array, bias: mx.array) -> mx.array:
        return router.cross_entropy(router.logits(mx.array(x), Gate(weight, bias)), targets).mean()

    def standard_loss(weight: mx.array, bias: mx.array) -> mx.array:
        return raw_loss(*scale.for_raw(Gate(weight, bias)))

    converted = scale.gradient_for_standardised(Gate(*mx.grad(raw_loss, (0, 1))(*gate)))
    direct = mx.grad(standard_loss, (0, 1))(*scale.for_standardised(gate))
    for ours, reference in zip(converted, direct, strict=True):
        assert np.allclose(np.array(ours), np.array(reference), rtol=1e-3, atol=1e-4)


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
    accumulator = StatisticsAccumulator(DIMS)
    for part in (x[:13], x[13:13], x[13:]):
        accumulator.add(part)
    for accumulated, direct in zip(accumulator.statistics(), FeatureStatistics.from_features(x), strict=True):
        assert np.allclose(accumulated, direct, rtol=1e-6)
