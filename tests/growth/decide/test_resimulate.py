"""Decisions played through from document means alone."""

from __future__ import annotations

import numpy as np

from dylora_mlx.config import Growth
from dylora_mlx.growth.decide import resimulate as replay
from dylora_mlx.growth.decide.resimulate import Arrival
from dylora_mlx.growth.gate_init import Statistics
from dylora_mlx.growth.library import Entry
from dylora_mlx.growth.novelty.embedding import Reference, Space

DIMS = 24
SPACE = Space(Reference(np.zeros(DIMS), np.eye(DIMS)), 0.0)
GROWTH = Growth(bootstrap=100)


def means(skill: int, seed: int = 0, noise: float = 0.3) -> np.ndarray:
    direction = np.random.default_rng(1000 + skill).normal(size=DIMS)
    return direction + noise * np.random.default_rng([skill, seed]).normal(size=(40, DIMS))


def base() -> Entry:
    return Entry("base", 0, means(9), Statistics.of(np.eye(DIMS)), np.zeros((0, DIMS)))


def stream(*skills: int) -> list[Arrival]:
    return [Arrival(f"{skill}.{i}", means(skill, i), 5000, 10 * i) for i, skill in enumerate(skills)]


def decided(arrivals: list[Arrival], growth: Growth = GROWTH) -> list[tuple[str, int]]:
    return [(p.decision.action, p.decision.expert) for p in replay.play(arrivals, [base()], SPACE, growth, 0)]


def test_a_stream_is_decided_in_order():
    assert decided(stream(0, 1, 0, 9, 1, 2)) == [
        ("create", 1), ("create", 2), ("refine", 1), ("skip", 0), ("refine", 2), ("create", 3),
    ]  # fmt: skip


def test_other_options_change_what_follows():
    assert decided(stream(0, 1, 0), Growth(bootstrap=100, threshold=-1.0, base_skill=None)) == [("skip", 0)] * 3
    full = Growth(bootstrap=100, max_experts=1)
    assert [action for action, _ in decided(stream(0, 1, 0), full)] == ["create", "skip", "refine"]
    slow = Growth(bootstrap=100, cooldown_steps=15)
    assert [action for action, _ in decided(stream(0, 1, 2), slow)] == ["create", "skip", "create"]


def close_call(**more) -> list[Arrival]:
    """One skill, then another whose similarity to it is as good as the threshold."""
    return [Arrival("first", means(0), 5000, 0), Arrival("close", means(0, 1), 5000, 10, **more)]


def threshold_of(arrivals: list[Arrival]) -> Growth:
    score = replay.play(arrivals, [], SPACE, GROWTH, 0)[1].decision.score
    assert score is not None
    return Growth(bootstrap=100, threshold=score + 1e-5)


def test_what_was_not_measured_is_left_open():
    arrivals = close_call()
    played = replay.play(arrivals, [], SPACE, threshold_of(arrivals), 0)
    assert [p.open for p in played] == [False, True]
    assert played[1].decision.policy == "threshold"
    assert played[1].decision.creates


def test_what_was_measured_decides_if_the_pool_is_the_same():
    trial = {"loss": 2.0, "gain": -0.1, "interval": [-0.2, 0.0], "steps": 8}
    measured = {"losses": {"0": 3.0, "1": 1.9}, "entropy": 0.1, "documents": 12, "trial": trial}
    arrivals = close_call(measured=measured, experts=1)
    growth = threshold_of(arrivals)
    found = replay.play(arrivals, [], SPACE, growth, 0)[1]
    assert not found.open
    assert (found.decision.action, found.decision.expert, found.decision.policy) == ("refine", 1, "probe")
    other = close_call(measured=measured, experts=2)
    assert replay.play(other, [], SPACE, growth, 0)[1].open, "measured with another pool"


def test_similarities_are_a_matrix_of_cosines():
    found = replay.similarities([means(0), means(0, 1), means(1)], SPACE)
    assert np.allclose(np.diag(found), 1)
    assert np.allclose(found, found.T)
    assert found[0, 1] > 0.9 > found[0, 2]
