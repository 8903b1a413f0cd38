"""The corrected cosine on synthetic skills with known means, and limits at stated error rates."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dylora_mlx import assets
from dylora_mlx.growth.novelty import similarity
from dylora_mlx.growth.novelty.embedding import EmbeddingSpace, Reference, normalize
from dylora_mlx.growth.novelty.similarity import MeanState, Scale, mean_state

DIMS = 40
OFFSET = np.random.default_rng(9).normal(size=DIMS) * 20
SPACE = EmbeddingSpace(Reference(OFFSET, np.eye(DIMS)), 0.1)


def skill(direction: np.ndarray, count: int, seed: int, noise: float = 1.0) -> np.ndarray:
    return OFFSET + direction + noise * np.random.default_rng(seed).normal(size=(count, DIMS))


def directions(cosine: float) -> tuple[np.ndarray, np.ndarray]:
    """Two directions of length 4 with this cosine."""
    first, second = np.zeros(DIMS), np.zeros(DIMS)
    first[0], second[:2] = 4, (4 * cosine, 4 * math.sqrt(1 - cosine**2))
    return first, second


@pytest.mark.parametrize("count", [8, 32, 128])
@pytest.mark.parametrize("cosine", [1.0, 0.6, 0.0])
def test_the_estimate_does_not_depend_on_the_number_of_documents(count, cosine):
    first, second = directions(cosine)
    draws = [
        (mean_state(skill(first, count, 2 * seed), SPACE), mean_state(skill(second, count, 2 * seed + 1), SPACE))
        for seed in range(300)
    ]
    corrected = np.mean([similarity.corrected_cosine(*pair) for pair in draws])
    plain = np.mean([normalize(a.mean) @ normalize(b.mean) for a, b in draws])
    assert corrected == pytest.approx(cosine, abs=0.03)
    if cosine and count == 8:
        assert plain < 0.85 * cosine, "without the correction, few documents look dissimilar"


def test_values_by_hand():
    first, second = MeanState(np.array([3.0, 0.0]), 5.0), MeanState(np.array([3.0, 4.0]), 9.0)
    assert first.squared_length == 4
    assert similarity.corrected_cosine(first, second) == pytest.approx(9 / math.sqrt(4 * 16))
    drowned = MeanState(np.array([1.0, 0.0]), 7.0)
    assert drowned.squared_length == similarity.LEAST_RELIABILITY
    nothing = MeanState(np.zeros(2), 0.0)
    assert similarity.corrected_cosine(nothing, second) == 0


def test_a_matrix_holds_the_cosine_of_every_pair():
    states = [mean_state(skill(direction, 8, seed), SPACE) for seed, direction in enumerate(directions(0.6) * 2)]
    states.append(MeanState(np.zeros(DIMS), 0.0))
    pairs = [[similarity.corrected_cosine(first, second) for second in states] for first in states]
    assert similarity.corrected_cosines(states) == pytest.approx(np.array(pairs))


def test_a_mean_state_is_centred_and_whitened_and_knows_its_noise():
    space = EmbeddingSpace(Reference(np.array([1.0, 2.0]), np.diag([4.0, 1.0])), 1e-9)
    documents = np.array([[2.0, 2.0], [4.0, 4.0]])
    state = mean_state(documents, space)
    assert state.mean == pytest.approx([2.0 / 2, 1.0])
    assert state.noise == pytest.approx((2.0 / 4 + 2.0) / 2)
    moved = mean_state(documents, space, np.array([5.0, 2.0]))
    assert moved.mean == pytest.approx([4.0 / 2, 0.0])
    assert moved.noise == state.noise, "later arrivals move the mean, the documents tell its noise"
    assert mean_state(documents[:1], space).noise == 0
    assert similarity.mean_and_halves(documents[:1], space)[1] is None


def test_halves_are_compared_as_two_skills_are():
    means = skill(directions(0.5)[0], 9, 1)
    halves = [mean_state(half, SPACE) for half in (means[:5], means[5:])]
    state, cosine = similarity.mean_and_halves(means, SPACE, means[0])
    assert cosine == pytest.approx(similarity.corrected_cosine(*halves))
    assert state.mean == pytest.approx(SPACE.whiten(means[0]))


def test_behind_a_projection_head_no_noise_is_known():
    space = EmbeddingSpace(Reference(np.zeros(2), np.eye(2)), 0.0, lambda unit: unit[..., ::-1])
    state = mean_state(np.array([[3.0, 0.0], [3.0, 8.0]]), space)
    assert state.mean == pytest.approx([0.8, 0.6])
    assert state.noise == 0


def test_halves_are_in_the_order_of_the_source():
    first, second = directions(0.0)
    drifting = np.concatenate([skill(first, 40, 0), skill(second, 40, 1)])
    assert similarity.mean_and_halves(drifting, SPACE)[1] < 0.3
    shuffled = drifting[np.random.default_rng(0).permutation(80)]
    assert similarity.mean_and_halves(shuffled, SPACE)[1] > 0.85


def test_a_scale_weighs_observations_by_their_number():
    prior = Scale(2.0, 0.5, 3)
    assert prior.updated([]) == prior
    updated = prior.updated([math.tanh(1.0)])
    assert updated.mean == pytest.approx((3 * 2 + 1) / 4)
    assert updated.std == pytest.approx(math.sqrt((3 * (0.25 + 4) + 1) / 4 - 1.75**2))
    assert updated.weight == 4
    assert prior.updated([1.2]).mean == pytest.approx((6 + math.atanh(similarity.CEILING)) / 4)


def test_quantiles_are_logistic():
    scale = Scale(1.0, 0.5, 1)
    assert scale.quantile(0.5) == pytest.approx(math.tanh(1))
    draws = np.random.default_rng(0).logistic(1.0, 0.5 * math.sqrt(3) / math.pi, 200_000)
    assert np.mean(np.tanh(draws) < scale.quantile(0.02)) == pytest.approx(0.02, abs=0.002)


def test_one_limit_where_the_distributions_are_apart_and_two_where_they_overlap():
    apart = similarity.thresholds(Scale(3.0, 0.2, 9), Scale(0.0, 0.4, 9), 0.01, 0.01)
    assert apart.new == apart.known == pytest.approx(math.tanh(2.0))
    close = similarity.thresholds(Scale(1.5, 0.3, 9), Scale(0.8, 0.3, 9), 0.01, 0.02)
    assert close[:2] == (Scale(1.5, 0.3, 9).quantile(0.01), Scale(0.8, 0.3, 9).quantile(0.98))
    assert close.new < close.equal < close.known
    assert close.equal == pytest.approx(math.tanh(1.15))


def test_limits_move_with_the_library():
    without = similarity.library_thresholds([], [], 0.01, 0.01)
    assert without.new == pytest.approx(0.672, abs=0.002)
    assert without.known == pytest.approx(0.825, abs=0.002)
    alike = similarity.library_thresholds([0.99] * 8, [0.8] * 8, 0.01, 0.01)
    assert alike.known > without.known, "known skills that resemble each other raise the limit"
    drifting = similarity.library_thresholds([0.8] * 8, [], 0.01, 0.01)
    assert drifting.new < without.new, "sources whose parts differ lower the limit"


def test_the_reference_text_has_no_copies_and_no_long_document():
    texts = assets.reference_text()
    assert len(texts) == len(set(texts)) == 144
    assert all(60 <= len(text) <= 700 and text.endswith("\n") for text in texts)
