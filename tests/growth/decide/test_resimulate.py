"""Re-simulating the decisions of a stream from document means alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dylora_mlx.config import GrowthConfig
from dylora_mlx.growth.decide.policy import ExistingLosses, TrialResult
from dylora_mlx.growth.decide.resimulate import PastArrival, resimulate, skill_similarities
from dylora_mlx.growth.feature_statistics import FeatureStatistics
from dylora_mlx.growth.library import LibraryEntry
from dylora_mlx.growth.novelty.embedding import EmbeddingSpace, Reference

DIMS = 24
SPACE = EmbeddingSpace(Reference(np.zeros(DIMS), np.eye(DIMS)), 0.0)
GROWTH = GrowthConfig(bootstrap=100)


def means(skill: int, seed: int = 0, noise: float = 0.3) -> np.ndarray:
    """Return document means of a synthetic skill."""
    direction = np.random.default_rng(1000 + skill).normal(size=DIMS)
    return direction + noise * np.random.default_rng([skill, seed]).normal(size=(40, DIMS))


def base() -> LibraryEntry:
    """Return the library entry of the base."""
    return LibraryEntry("base", 0, means(9), FeatureStatistics.from_features(np.eye(DIMS)), np.zeros((0, DIMS)))


def stream(*skills: int) -> list[PastArrival]:
    return [PastArrival(f"{skill}.{i}", means(skill, i), 5000, 10 * i) for i, skill in enumerate(skills)]


def decided(arrivals: list[PastArrival], growth: GrowthConfig = GROWTH) -> list[tuple[str, int]]:
    """Return action and expert id of every re-simulated decision."""
    return [(p.decision.action, p.decision.expert) for p in resimulate(arrivals, [base()], SPACE, growth, 0)]


def test_a_stream_is_decided_in_order():
    assert decided(stream(0, 1, 0, 9, 1, 2)) == [
        ("create", 1), ("create", 2), ("refine", 1), ("skip", 0), ("refine", 2), ("create", 3),
    ]  # fmt: skip


def test_options_change_the_decisions():
    assert decided(stream(0, 1, 0), GrowthConfig(bootstrap=100, threshold=-1.0, base_skill=None)) == [("skip", 0)] * 3
    full = GrowthConfig(bootstrap=100, max_experts=1)
    assert [action for action, _ in decided(stream(0, 1, 0), full)] == ["create", "skip", "refine"]
    slow = GrowthConfig(bootstrap=100, cooldown_steps=15)
    assert [action for action, _ in decided(stream(0, 1, 2), slow)] == ["create", "skip", "create"]


def close_call(**more) -> list[PastArrival]:
    """Return the arrival of a skill, then of another whose similarity to it is near the threshold."""
    close = means(0, 1) + 0.3 * means(1, 1)
    return [PastArrival("first", means(0), 5000, 0), PastArrival("close", close, 5000, 10, **more)]


def threshold_of(arrivals: list[PastArrival]) -> GrowthConfig:
    """Return options whose threshold is just above the score of the second arrival."""
    score = resimulate(arrivals, [], SPACE, GROWTH, 0)[1].decision.score
    assert score is not None
    return GrowthConfig(bootstrap=100, threshold=score + 1e-5)


def test_a_decision_without_its_measurement_is_marked():
    arrivals = close_call()
    replayed = resimulate(arrivals, [], SPACE, threshold_of(arrivals), 0)
    assert [p.needs_measurement for p in replayed] == [False, True]
    assert replayed[1].decision.policy == "threshold"
    assert replayed[1].decision.creates


def test_a_recorded_measurement_decides_for_the_same_pool():
    trial = TrialResult(2.0, -0.1, (-0.2, 0.0), 8)
    existing = ExistingLosses({0: 3.0, 1: 1.9}, 0.1, 12)
    arrivals = close_call(existing=existing, trial=trial, experts=1)
    growth = threshold_of(arrivals)
    replayed = resimulate(arrivals, [], SPACE, growth, 0)[1]
    assert not replayed.needs_measurement
    assert (replayed.decision.action, replayed.decision.expert, replayed.decision.policy) == ("refine", 1, "probe")
    other = close_call(existing=existing, trial=trial, experts=2)
    assert resimulate(other, [], SPACE, growth, 0)[1].needs_measurement, "measured with another pool"


@pytest.mark.parametrize(("best", "moves"), [(1, True), (0, False)])
def test_the_nearest_skill_moves_if_its_expert_was_chosen(best, moves):
    """The probe finds that the base or the nearest skill's expert is best for a second arrival; a third compares with that skill."""
    existing = ExistingLosses({0: 1.8 if best == 0 else 3.0, 1: 1.9}, 0.1, 12)
    arrivals = close_call(existing=existing, trial=TrialResult(2.0, -0.1, (-0.2, 0.0), 8), experts=1)
    third = PastArrival("third", means(0, 2) + 0.3 * means(2, 1), 5000, 20)
    growth = threshold_of(arrivals)
    still = replace(growth, moving_average=0.0)
    similarities = [resimulate([*arrivals, third], [], SPACE, g, 0)[2].decision.similarities for g in (growth, still)]
    assert (similarities[0]["first"] != similarities[1]["first"]) == moves


def test_similarities_are_a_matrix_of_cosines():
    cosines = skill_similarities([means(0), means(0, 1), means(1)], SPACE)
    assert np.allclose(np.diag(cosines), 1)
    assert np.allclose(cosines, cosines.T)
    assert cosines[0, 1] > 0.9 > cosines[0, 2]
