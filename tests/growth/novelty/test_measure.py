"""Novelty of a skill against a library of synthetic skills: scores, bootstrap intervals and thresholds."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from dylora_mlx.config import GrowthConfig
from dylora_mlx.growth.feature_statistics import FeatureStatistics
from dylora_mlx.growth.library import Library, LibraryEntry
from dylora_mlx.growth.novelty import measure as novelty
from dylora_mlx.growth.novelty import similarity
from dylora_mlx.growth.novelty.embedding import EmbeddingSpace, Reference

DIMS, DOCUMENTS = 24, 64
COMMON = np.random.default_rng(99).normal(size=DIMS) * 20
REFERENCE = Reference(COMMON, np.eye(DIMS) * 2.0)
SPACE = EmbeddingSpace(REFERENCE, 0.1)
GROWTH = GrowthConfig(bootstrap=200)


def documents(skill: int, seed: int, noise: float = 1.0, n: int = DOCUMENTS) -> np.ndarray:
    """Return document means of a synthetic skill: a common offset, the skill's direction, and document noise."""
    direction = np.random.default_rng(1000 + skill).normal(size=DIMS)
    return COMMON + direction + noise * np.random.default_rng([skill, seed]).normal(size=(n, DIMS))


def library(*skills: np.ndarray) -> Library:
    library_of_skills = Library("base")
    for i, means in enumerate(skills):
        statistics = FeatureStatistics.from_features(np.eye(DIMS))
        library_of_skills.add(
            LibraryEntry(f"skill_{i}", i, means.astype(np.float32), statistics, np.zeros((1, DIMS), np.float32))
        )
    return library_of_skills


def test_another_sample_of_a_skill_is_known_and_another_skill_is_novel():
    known = novelty.measure_novelty(documents(0, 1), library(documents(0, 0), documents(1, 0)), SPACE, GROWTH, 0)
    assert known.similarities["skill_0"] > 0.95
    assert abs(known.similarities["skill_1"]) < 0.5
    assert known.nearest == "skill_0"
    assert known.samples == DOCUMENTS
    assert not known.is_novel
    novel = novelty.measure_novelty(documents(5, 0), library(documents(0, 0), documents(1, 0)), SPACE, GROWTH, 0)
    assert novel.is_novel
    assert novel.score is not None
    assert novel.score < 0.5


def test_a_large_library_resamples_only_the_nearest_skills(monkeypatch):
    """Only the nearest skills are resampled.

    The score and the nearest skill stay exact, the interval nearly so; a median resamples all.
    """
    known = library(*(documents(skill, 0) for skill in range(novelty.MAX_RESAMPLED + 30)))
    means, resamplings, bootstrap_means = documents(7, 1), [], novelty.embedding.bootstrap_means
    monkeypatch.setattr(
        novelty.embedding, "bootstrap_means", lambda *args: resamplings.append(1) or bootstrap_means(*args)
    )
    limited = novelty.measure_novelty(means, known, SPACE, GROWTH, 0)
    assert len(resamplings) == 1 + novelty.MAX_RESAMPLED
    novelty.measure_novelty(means, known, SPACE, replace(GROWTH, similarity="median", threshold=0.5), 0)
    assert len(resamplings) == 2 + novelty.MAX_RESAMPLED + len(known)
    monkeypatch.setattr(novelty, "MAX_RESAMPLED", 1000)
    unlimited = novelty.measure_novelty(means, known, SPACE, GROWTH, 0)
    assert limited.nearest == unlimited.nearest == "skill_7"
    assert limited.similarities == unlimited.similarities
    assert limited.score == unlimited.score == max(unlimited.similarities.values())
    assert limited.interval == pytest.approx(unlimited.interval, abs=5e-3)


def test_a_large_library_lists_only_the_nearest_skills(monkeypatch):
    """The decision must not grow with the library; score, interval and limits are those of all entries."""
    known = library(*(documents(skill, 0) for skill in range(12)))
    arrival = documents(7, 1)
    whole = novelty.measure_novelty(arrival, known, SPACE, GROWTH, 0)
    monkeypatch.setattr(novelty, "MAX_LISTED", 4)
    listed = novelty.measure_novelty(arrival, known, SPACE, GROWTH, 0)
    largest = sorted(whole.similarities, key=lambda name: -whole.similarities[name])[:4]
    assert listed.similarities == {name: whole.similarities[name] for name in whole.similarities if name in largest}
    assert listed._replace(similarities={}) == whole._replace(similarities={})


def test_the_reference_removes_the_common_offset():
    """Without the mean of the reference every skill looks known."""
    uncentred = Reference(np.zeros(DIMS), np.eye(DIMS))
    measured = novelty.measure_novelty(
        documents(5, 0), library(documents(0, 0)), EmbeddingSpace(uncentred, 0.1), GROWTH, 0
    )
    assert measured.score is not None
    assert measured.score > 0.9


def test_the_score_is_the_cosine_of_centred_means():
    """It is divided by the length of the means without their noise."""
    means, known_means = documents(0, 1), documents(1, 0).astype(np.float32)
    measured = novelty.measure_novelty(means, library(known_means), SPACE, GROWTH, 0)
    a, b = means.mean(0) - COMMON, known_means.astype(np.float64).mean(0) - COMMON
    noise_a, noise_b = (
        means.var(0, ddof=1).sum() / DOCUMENTS,
        known_means.astype(np.float64).var(0, ddof=1).sum() / DOCUMENTS,
    )
    assert measured.score == pytest.approx(a @ b / math.sqrt((a @ a - noise_a) * (b @ b - noise_b)), abs=1e-9)


@pytest.mark.parametrize("noise", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("similarity", ["max", "median"])
def test_the_interval_holds_the_score(noise, similarity):
    growth = GrowthConfig(bootstrap=200, similarity=similarity, threshold=0.75)
    for seed in range(10):
        known = library(documents(0, 100 + seed, noise), documents(1, seed, noise))
        measured = novelty.measure_novelty(documents(0, seed, noise), known, SPACE, growth, seed)
        assert measured.interval is not None
        assert -1 <= measured.interval[0] <= measured.score <= measured.interval[1] <= 1


def test_the_interval_covers_a_second_sample():
    """A 95 % interval around one noisy score covers another noisy score 83 % of the time."""
    growth, covered = GrowthConfig(bootstrap=200), 0
    for seed in range(100):
        first, second = (
            novelty.measure_novelty(documents(0, s, 2.0), library(documents(0, 1000 + s, 2.0)), SPACE, growth, seed)
            for s in (seed, 500 + seed)
        )
        assert first.interval is not None
        covered += first.interval[0] <= second.score <= first.interval[1]
    assert 65 <= covered <= 97


def test_more_documents_narrow_the_interval():
    def width(n: int) -> float:
        measured = novelty.measure_novelty(documents(0, 1, 1.0, n), library(documents(1, 0, 1.0, n)), SPACE, GROWTH, 0)
        assert measured.interval is not None
        return measured.interval[1] - measured.interval[0]

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
        novelty.measure_novelty(
            documents(0, 1), known, SPACE, GrowthConfig(bootstrap=100, similarity=s, threshold=0.75), 0
        )
        for s in ("max", "median")
    )
    assert by_max.similarities == by_median.similarities
    assert by_max.score == max(by_max.similarities.values())
    assert by_median.score == pytest.approx(sorted(by_max.similarities.values())[1])
    assert by_median.is_novel
    assert not by_max.is_novel
    assert by_median.nearest == by_max.nearest == "skill_0"


def test_an_empty_library():
    measured = novelty.measure_novelty(documents(0, 0), Library("base"), SPACE, GROWTH, 0)
    assert measured.is_novel
    assert not measured.is_undecided
    assert (measured.score, measured.interval, measured.nearest, measured.similarities) == (None, None, None, {})
    limits = similarity.library_thresholds([], [], GROWTH.false_new, GROWTH.false_known)
    assert (*measured.limits, measured.threshold) == tuple(limits)
    fixed = novelty.measure_novelty(documents(0, 0), Library("base"), SPACE, replace(GROWTH, threshold=0.6), 0)
    assert (fixed.limits, fixed.threshold) == (None, 0.6)


def test_the_adaptive_threshold_falls_with_the_library_size():
    growth = GrowthConfig(threshold=0.8, adaptive_delta=0.1)
    assert [novelty.fixed_threshold(growth, size) for size in range(4)] == pytest.approx(
        [0.8, 0.8 - 0.1 * math.log(2), 0.8 - 0.1 * math.log(3), 0.8 - 0.1 * math.log(4)]
    )
    assert novelty.fixed_threshold(GrowthConfig(threshold=0.8), 3) == 0.8
    measured = novelty.measure_novelty(documents(0, 0), library(documents(1, 0), documents(2, 0)), SPACE, growth, 0)
    assert measured.threshold == pytest.approx(0.8 - 0.1 * math.log(3))


def test_the_limits_come_from_the_library():
    """Halves of its skills tell how similar one source is to itself, skills of other experts how similar two are."""
    first, second, other = documents(0, 0), documents(0, 1), documents(1, 0)
    known = library(first, second, other)
    states = [novelty.entry_state(entry, SPACE) for entry in known.entries]
    means = [state.mean for state in states]
    halves = [similarity.mean_and_halves(entry.means, SPACE)[1] for entry in known.entries]
    cosine = similarity.corrected_cosine

    def limits() -> similarity.Thresholds:
        return novelty.library_limits(known, states, replace(GROWTH, false_new=0.02, false_known=0.03))

    apart = [cosine(means[0], means[1]), cosine(means[0], means[1]), max(cosine(means[2], s) for s in means[:2])]
    assert limits() == pytest.approx(similarity.library_thresholds(halves, apart, 0.02, 0.03))
    known.entries[1].expert = known.entries[0].expert
    together = [cosine(means[0], means[2]), cosine(means[1], means[2]), apart[2]]
    assert limits() == pytest.approx(similarity.library_thresholds(halves, together, 0.02, 0.03))
    assert limits().known < 0.9, "two batches of one skill do not count as two similar skills"


def test_the_state_of_an_entry_follows_its_arrivals():
    known = library(documents(0, 0), documents(1, 0))
    space = EmbeddingSpace(REFERENCE, 0.1)
    first = novelty.entry_state(known.entries[0], space)
    assert novelty.entry_state(known.entries[0], space) is first, "it is computed once"
    assert first.halves == similarity.mean_and_halves(known.entries[0].means, space)[1]
    known.entries[0].record_arrival(documents(0, 1), 0.5)
    moved = novelty.entry_state(known.entries[0], space)
    assert moved.mean.mean == pytest.approx(space.whiten(known.entries[0].centre))
    assert not np.allclose(moved.mean.mean, first.mean.mean)


def test_undecided_between_the_limits():
    known, means = library(documents(0, 0)), documents(0, 1)
    measured = novelty.measure_novelty(means, known, SPACE, GROWTH, 0)
    for score, novel, undecided in ((0.1, True, False), (0.7, True, True), (0.8, False, True), (0.95, False, False)):
        moved = measured._replace(score=score, limits=(0.6, 0.9), threshold=0.75)
        assert (moved.is_novel, moved.is_undecided) == (novel, undecided)


def test_skills_are_compared_in_the_output_of_the_projection_head():
    """With a head that keeps a single direction, only differences in that direction count."""
    direction = np.ones(DIMS) / math.sqrt(DIMS)

    def head(unit: np.ndarray) -> np.ndarray:
        return np.stack([unit @ direction, 1e-3 * np.ones(unit.shape[:-1])], axis=-1)

    space = EmbeddingSpace(REFERENCE, 0.0, head)
    known, same = library(COMMON + direction + 1e-3 * documents(1, 0)), COMMON + 2 * direction + 1e-3 * documents(2, 0)
    growth = replace(GROWTH, threshold=0.75)
    assert novelty.measure_novelty(same, known, space, growth, 0).score == pytest.approx(1.0, abs=1e-2)
    assert novelty.measure_novelty(2 * COMMON - same, known, space, growth, 0).score == pytest.approx(-1.0, abs=1e-2)


def test_undecided_when_the_interval_holds_the_threshold():
    known, means = library(documents(0, 0)), documents(0, 1) + 0.3 * (documents(1, 1) - COMMON)
    score = novelty.measure_novelty(means, known, SPACE, GROWTH, 0).score
    assert score is not None
    for offset, novel, undecided in ((1e-4, True, True), (-1e-4, False, True), (-0.5, False, False)):
        measured = novelty.measure_novelty(
            means, known, SPACE, GrowthConfig(bootstrap=200, threshold=score + offset), 0
        )
        assert (measured.is_novel, measured.is_undecided) == (novel, undecided)
    at_threshold = novelty.measure_novelty(means, known, SPACE, GrowthConfig(bootstrap=200, threshold=score), 0)
    assert not at_threshold.is_novel, "at the threshold a skill counts as known"
