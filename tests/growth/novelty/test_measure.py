"""Similarity to the library on synthetic skills: halves of one skill are alike, other skills are not."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from dylora_mlx.config import GrowthConfig
from dylora_mlx.growth.gate_init import FeatureStatistics
from dylora_mlx.growth.library import Library, LibraryEntry
from dylora_mlx.growth.novelty import measure as novelty
from dylora_mlx.growth.novelty.embedding import EmbeddingSpace, Reference

DIMS, DOCUMENTS = 24, 64
COMMON = np.random.default_rng(99).normal(size=DIMS) * 20
REFERENCE = Reference(COMMON, np.eye(DIMS) * 2.0)
SPACE = EmbeddingSpace(REFERENCE, 0.1)
GROWTH = GrowthConfig(bootstrap=200)


def documents(skill: int, seed: int, noise: float = 1.0, n: int = DOCUMENTS) -> np.ndarray:
    """Document means of a synthetic skill: what all texts share, the skill's direction, and each document's noise."""
    direction = np.random.default_rng(1000 + skill).normal(size=DIMS)
    return COMMON + direction + noise * np.random.default_rng([skill, seed]).normal(size=(n, DIMS))


def library(*skills: np.ndarray) -> Library:
    made = Library("base")
    for i, means in enumerate(skills):
        statistics = FeatureStatistics.from_features(np.eye(DIMS))
        made.add(LibraryEntry(f"skill_{i}", i, means.astype(np.float32), statistics, np.zeros((1, DIMS), np.float32)))
    return made


def test_split_halves_are_alike_and_other_skills_are_not():
    found = novelty.measure_novelty(documents(0, 1), library(documents(0, 0), documents(1, 0)), SPACE, GROWTH, 0)
    assert found.similarities["skill_0"] > 0.95
    assert abs(found.similarities["skill_1"]) < 0.5
    assert found.nearest == "skill_0"
    assert found.samples == DOCUMENTS
    assert not found.is_novel
    other = novelty.measure_novelty(documents(5, 0), library(documents(0, 0), documents(1, 0)), SPACE, GROWTH, 0)
    assert other.is_novel
    assert other.score is not None
    assert other.score < 0.5


def test_a_large_library_draws_intervals_of_the_nearest(monkeypatch):
    """The score and the nearest are exact, the interval nearly so; a median draws all."""
    known = library(*(documents(skill, 0) for skill in range(novelty.MAX_RESAMPLED + 30)))
    own, drawn, real = documents(7, 1), [], novelty.embedding.bootstrap_means
    monkeypatch.setattr(novelty.embedding, "bootstrap_means", lambda *given: drawn.append(1) or real(*given))
    few = novelty.measure_novelty(own, known, SPACE, GROWTH, 0)
    assert len(drawn) == 1 + novelty.MAX_RESAMPLED
    novelty.measure_novelty(own, known, SPACE, replace(GROWTH, similarity="median"), 0)
    assert len(drawn) == 2 + novelty.MAX_RESAMPLED + len(known)
    monkeypatch.setattr(novelty, "MAX_RESAMPLED", 1000)
    every = novelty.measure_novelty(own, known, SPACE, GROWTH, 0)
    assert few.nearest == every.nearest == "skill_7"
    assert few.similarities == every.similarities
    assert few.score == every.score == max(every.similarities.values())
    assert few.interval == pytest.approx(every.interval, abs=5e-3)


def test_what_all_texts_share_does_not_count():
    """Without the reference every skill looks known."""
    none = Reference(np.zeros(DIMS), np.eye(DIMS))
    blind = novelty.measure_novelty(documents(5, 0), library(documents(0, 0)), EmbeddingSpace(none, 0.1), GROWTH, 0)
    assert blind.score is not None
    assert blind.score > 0.9


def test_the_score_is_a_plain_cosine():
    growth = GrowthConfig(bootstrap=50, whitening=0)
    own, theirs = documents(0, 1), documents(1, 0).astype(np.float32)
    found = novelty.measure_novelty(own, library(theirs), SPACE, growth, 0)
    a, b = own.mean(0) - COMMON, theirs.astype(np.float64).mean(0) - COMMON
    assert found.score == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-9)


@pytest.mark.parametrize("noise", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("similarity", ["max", "median"])
def test_the_interval_holds_the_score(noise, similarity):
    growth = GrowthConfig(bootstrap=200, similarity=similarity)
    for seed in range(10):
        known = library(documents(0, 100 + seed, noise), documents(1, seed, noise))
        found = novelty.measure_novelty(documents(0, seed, noise), known, SPACE, growth, seed)
        assert found.interval is not None
        assert -1 <= found.interval[0] <= found.score <= found.interval[1] <= 1


def test_the_interval_covers_a_second_sample():
    """A 95 % interval around one noisy score holds another noisy score 83 % of the time."""
    growth, held = GrowthConfig(bootstrap=200), 0
    for seed in range(100):
        first, second = (
            novelty.measure_novelty(documents(0, s, 2.0), library(documents(0, 1000 + s, 2.0)), SPACE, growth, seed)
            for s in (seed, 500 + seed)
        )
        assert first.interval is not None
        held += first.interval[0] <= second.score <= first.interval[1]
    assert 65 <= held <= 97


def test_more_documents_narrow_the_interval():
    def width(n: int) -> float:
        found = novelty.measure_novelty(documents(0, 1, 1.0, n), library(documents(1, 0, 1.0, n)), SPACE, GROWTH, 0)
        assert found.interval is not None
        return found.interval[1] - found.interval[0]

    assert width(400) < 0.6 * width(40)


def test_confidence_widens_the_interval():
    known = library(documents(1, 0))
    narrow, wide = (
        novelty.measure_novelty(documents(0, 1), known, SPACE, GrowthConfig(bootstrap=400, confidence=c), 0).interval
        for c in (0.5, 0.99)
    )
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_the_seed_decides_the_interval():
    known = library(documents(1, 0))
    first, same, other = (novelty.measure_novelty(documents(0, 1), known, SPACE, GROWTH, s) for s in (4, 4, 5))
    assert first == same
    assert first.interval != other.interval
    assert first.score == other.score


def test_median_against_max():
    known = library(documents(0, 0), documents(1, 0), documents(2, 0))
    by_max, by_median = (
        novelty.measure_novelty(documents(0, 1), known, SPACE, GrowthConfig(bootstrap=100, similarity=s), 0)
        for s in ("max", "median")
    )
    assert by_max.similarities == by_median.similarities
    assert by_max.score == max(by_max.similarities.values())
    assert by_median.score == pytest.approx(sorted(by_max.similarities.values())[1])
    assert by_median.is_novel
    assert not by_max.is_novel
    assert by_median.nearest == by_max.nearest == "skill_0"


def test_an_empty_library():
    found = novelty.measure_novelty(documents(0, 0), Library("base"), SPACE, GROWTH, 0)
    assert found.is_novel
    assert not found.is_undecided
    assert (found.score, found.interval, found.nearest, found.similarities) == (None, None, None, {})
    assert found.threshold == GROWTH.threshold


def test_the_threshold_falls_with_the_library():
    growth, rng = GrowthConfig(threshold=0.8, adaptive_delta=0.1), np.random.default_rng(0)
    known = [library(*(documents(skill, 0) for skill in range(k))) for k in range(4)]
    assert [novelty.novelty_threshold(growth, k, SPACE, rng) for k in known] == pytest.approx(
        [0.8, 0.8 - 0.1 * math.log(2), 0.8 - 0.1 * math.log(3), 0.8 - 0.1 * math.log(4)]
    )
    assert novelty.novelty_threshold(GrowthConfig(threshold=0.8), known[3], SPACE, rng) == 0.8
    found = novelty.measure_novelty(documents(0, 0), library(documents(1, 0), documents(2, 0)), SPACE, growth, 0)
    assert found.threshold == pytest.approx(0.8 - 0.1 * math.log(3))


@pytest.mark.parametrize("false_alarm", [0.05, 0.2])
def test_the_calibrated_threshold_has_the_false_alarms_it_was_asked_for(false_alarm):
    """New parts of known skills, as large as the halves it was calibrated on, against parts of that size."""
    known = library(*(documents(skill, 0, 3.0) for skill in range(6)))
    tau = novelty.calibrated_threshold(known, SPACE, false_alarm, np.random.default_rng(0))
    half = DOCUMENTS // 2
    cosines = [
        SPACE(documents(skill, 100 + seed, 3.0, half).mean(0)) @ SPACE(documents(skill, 500 + seed, 3.0, half).mean(0))
        for skill in range(6)
        for seed in range(60)
    ]
    assert false_alarm / 4 < np.mean(np.array(cosines) < tau) < false_alarm + 0.04


def test_calibration_replaces_the_threshold_once_something_is_known():
    growth = GrowthConfig(threshold=0.3, false_alarm=0.1, bootstrap=50)
    assert novelty.measure_novelty(documents(0, 0), Library("base"), SPACE, growth, 0).threshold == 0.3
    found = novelty.measure_novelty(documents(0, 1), library(documents(0, 0)), SPACE, growth, 0)
    assert found.threshold > 0.8
    assert not found.is_novel


def test_a_projection_head_is_what_is_compared():
    """A head that keeps one direction only sees no difference but in that one."""
    direction = np.ones(DIMS) / math.sqrt(DIMS)

    def head(unit: np.ndarray) -> np.ndarray:
        return np.stack([unit @ direction, 1e-3 * np.ones(unit.shape[:-1])], axis=-1)

    space = EmbeddingSpace(REFERENCE, 0.0, head)
    known, same = library(COMMON + direction + 1e-3 * documents(1, 0)), COMMON + 2 * direction + 1e-3 * documents(2, 0)
    assert novelty.measure_novelty(same, known, space, GROWTH, 0).score == pytest.approx(1.0, abs=1e-2)
    assert novelty.measure_novelty(2 * COMMON - same, known, space, GROWTH, 0).score == pytest.approx(-1.0, abs=1e-2)


def test_undecided_when_the_interval_holds_the_threshold():
    known, own = library(documents(0, 0)), documents(0, 1)
    score = novelty.measure_novelty(own, known, SPACE, GROWTH, 0).score
    assert score is not None
    for offset, novel, undecided in ((1e-4, True, True), (-1e-4, False, True), (-0.5, False, False)):
        found = novelty.measure_novelty(own, known, SPACE, GrowthConfig(bootstrap=200, threshold=score + offset), 0)
        assert (found.is_novel, found.is_undecided) == (novel, undecided)
    exact = novelty.measure_novelty(own, known, SPACE, GrowthConfig(bootstrap=200, threshold=score), 0)
    assert not exact.is_novel, "at the threshold a skill counts as known"
