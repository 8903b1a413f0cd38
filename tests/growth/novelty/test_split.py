"""Files of one skill and files that mix skills, on synthetic documents; and the novelty of single documents."""

from __future__ import annotations

import numpy as np
import pytest

from dylora_mlx.config import GrowthConfig
from dylora_mlx.growth.gate_init import FeatureStatistics
from dylora_mlx.growth.library import Library, LibraryEntry
from dylora_mlx.growth.novelty.embedding import EmbeddingSpace, Reference
from dylora_mlx.growth.novelty.split import (
    CUT,
    TEMPERATURE,
    Partition,
    document_scores,
    find_parts,
    normalised_cut,
    novel_fraction,
)

DIMS = 48
COMMON = np.random.default_rng(99).normal(size=DIMS) * 20
SPACE = EmbeddingSpace(Reference(COMMON, np.eye(DIMS)), 0.1)
GROWTH = GrowthConfig()


def documents(skill: int, count: int, seed: int = 0, wide: float = 0.0) -> np.ndarray:
    """Document means of a synthetic skill: what all share, the skill's direction, noise, and a direction in which its
    documents differ far more."""
    direction = np.random.default_rng(1000 + skill).normal(size=DIMS)
    rng = np.random.default_rng([skill, seed])
    axis = np.eye(DIMS)[skill % DIMS]
    return COMMON + direction + 0.7 * rng.normal(size=(count, DIMS)) + wide * rng.normal(size=(count, 1)) * axis


def mixed(*parts: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Documents in a random order, and which part each is from."""
    labels = np.concatenate([np.full(len(part), number) for number, part in enumerate(parts)])
    order = np.random.default_rng(seed).permutation(len(labels))
    return np.concatenate(parts)[order], labels[order]


def partition(means: np.ndarray, growth: GrowthConfig = GROWTH, seed: int = 0) -> Partition:
    return find_parts(means, SPACE, growth, np.random.default_rng(seed))


def words(labels: np.ndarray, seed: int = 0) -> list[np.ndarray]:
    """Token ids of documents: a third of each one's 60 tokens are its skill's own, the others could be any skill's."""
    rng = np.random.default_rng([7, seed])
    own = [500 + 60 * label + rng.integers(0, 60, 60) for label in labels]
    return [np.where(rng.random(60) < 1 / 3, mine, rng.integers(0, 500, 60)) for mine in own]


def likenesses(points: np.ndarray) -> np.ndarray:
    return points @ points.T


def library(*skills: np.ndarray) -> Library:
    made = Library("base")
    for i, means in enumerate(skills):
        entry = LibraryEntry(
            f"skill_{i}",
            i,
            means.astype(np.float32),
            FeatureStatistics.from_features(np.eye(DIMS)),
            np.zeros((1, DIMS), np.float32),
        )
        made.add(entry)
    return made


@pytest.mark.parametrize("wide", [0.0, 2.0])
@pytest.mark.parametrize("count", [64, 128, 600])
def test_one_skill_stays_whole(count, wide):
    for skill in range(10):
        means = documents(skill, count, wide=wide)
        found = partition(means, seed=skill)
        assert found.parts == 1
        assert not found.labels.any()
        assert np.allclose(found.centres[0], SPACE(means.mean(0)))
        assert not found.assign(documents(skill + 1, 5)).any()


@pytest.mark.parametrize("share", [0.3, 0.4, 0.5])
@pytest.mark.parametrize("count", [128, 600])
def test_two_skills_come_apart(count, share):
    for pair in range(5):
        smaller = round(share * count)
        means, truth = mixed(documents(pair, count - smaller), documents(pair + 20, smaller), seed=pair)
        found = partition(means, seed=pair)
        assert found.parts == 2
        assert found.labels.shape == (count,)
        right = np.mean(found.labels == truth)
        assert max(right, 1 - right if share == 0.5 else 0) >= 0.95, "part 0 is the larger"
        assert np.allclose(np.linalg.norm(found.centres, axis=1), 1)
        own = SPACE(means[found.labels == 0].mean(0))
        assert np.allclose(found.centres[0], own)


def test_further_documents_go_to_their_part():
    means, _ = mixed(documents(1, 80), documents(2, 50))
    found = partition(means)
    assert np.mean(found.assign(documents(1, 200, seed=1)) == 0) >= 0.95
    assert np.mean(found.assign(documents(2, 200, seed=1)) == 1) >= 0.95
    assert found.assign(documents(2, 0)).shape == (0,)


def faint(skill: int, count: int, seed: int = 0) -> np.ndarray:
    """Documents of a skill that differ from each other more than from other skills'."""
    return documents(skill, count, seed) + 3.5 * np.random.default_rng([3, skill, seed]).normal(size=(count, DIMS))


def test_tokens_tell_what_states_do_not():
    for pair in range(5):
        means, truth = mixed(faint(pair, 120), faint(pair + 20, 80), seed=pair)
        found = find_parts(means, SPACE, GROWTH, np.random.default_rng(0), words(truth))
        assert found.parts == 2
        assert np.mean(found.labels == truth) >= 0.95
        alone = partition(means)
        assert alone.parts == 1 or np.mean(alone.labels == truth) < 0.95
        further = np.array([0] * 100 + [1] * 100)
        others = np.concatenate([faint(pair, 100, 1), faint(pair + 20, 100, 1)])
        assert np.mean(found.assign(others, words(further, 1)) == further) >= 0.95


def test_tokens_do_not_divide_one_skill():
    for skill in range(10):
        means = documents(skill, 128, wide=2.0)
        assert find_parts(means, SPACE, GROWTH, np.random.default_rng(0), words(np.full(128, skill))).parts == 1


def test_two_vocabularies_of_one_skill_are_one():
    """The words differ and the states do not, so a second expert would learn what the first one knows."""
    labels = np.array([0] * 70 + [1] * 60)
    assert find_parts(documents(1, 130), SPACE, GROWTH, np.random.default_rng(0), words(labels)).parts == 1


def test_assigning_needs_the_tokens_that_the_parts_were_found_with():
    means, truth = mixed(documents(1, 80), documents(2, 50))
    found = find_parts(means, SPACE, GROWTH, np.random.default_rng(0), words(truth))
    with pytest.raises(ValueError, match="tokens"):
        found.assign(means)


def test_documents_without_a_common_token_are_told_by_their_states():
    means, truth = mixed(documents(1, 80), documents(2, 50))
    found = find_parts(means, SPACE, GROWTH, np.random.default_rng(0), [np.array([i]) for i in range(130)])
    assert np.mean(found.assign(means) == truth) >= 0.95


def test_three_skills_by_size():
    means, truth = mixed(documents(1, 100), documents(2, 70), documents(3, 45))
    found = partition(means)
    assert found.parts == 3
    assert np.mean(found.labels == truth) >= 0.95
    assert (np.diff(np.bincount(found.labels)) < 0).all()


def test_no_part_is_too_small():
    means, _ = mixed(documents(1, 90), documents(2, 40))
    assert partition(means).parts == 2
    assert partition(means, GrowthConfig(min_samples=45, embedding_samples=128)).parts == 1
    assert partition(means[:40]).parts == 1
    assert partition(means[:1]).parts == 1


def test_parts_that_would_count_as_one_skill_stay_together():
    """Two clusters, clearly apart, whose embeddings are alike because of what they share."""
    shared = 3 * np.random.default_rng(5).normal(size=DIMS)
    means, _ = mixed(documents(1, 64) + shared, documents(2, 64) + shared)
    assert normalised_cut(likenesses(SPACE(means)))[1] < CUT
    assert partition(means).parts == 1
    assert partition(mixed(documents(1, 64), documents(2, 64))[0]).parts == 2
    assert partition(mixed(documents(1, 64), documents(2, 64))[0], GrowthConfig(threshold=-0.9)).parts == 1


def test_the_seed_decides():
    means, _ = mixed(documents(1, 500), documents(2, 300))
    first, second = partition(means), partition(means)
    assert np.array_equal(first.labels, second.labels)
    assert np.array_equal(first.weights, second.weights)


def test_the_cut_is_the_graphs():
    """Against the definition, on the nearest neighbours of few documents."""
    points = SPACE(mixed(documents(1, 12), documents(2, 8))[0])
    sides, value = normalised_cut(likenesses(points))
    cosines = points @ points.T - 2 * np.eye(20)
    nearest = np.argsort(-cosines, axis=1)[:, :5]
    graph = np.zeros((20, 20))
    for i, row in enumerate(nearest):
        graph[i, row] += 0.5
        graph[row, i] += 0.5
    between = graph[sides][:, ~sides].sum()
    assert value == pytest.approx(between / graph[sides].sum() + between / graph[~sides].sum())
    assert sorted([sides.sum(), (~sides).sum()]) == [8, 12]


def test_a_cut_without_neighbours_across_is_free():
    apart = np.concatenate([np.tile(row, (20, 1)) for row in np.eye(DIMS)[:2]])
    points = apart + 1e-3 * np.random.default_rng(0).normal(size=apart.shape)
    sides, value = normalised_cut(likenesses(points))
    assert value == pytest.approx(0, abs=1e-9)
    assert (sides[:20] != sides[20:]).all()


@pytest.mark.parametrize("scored", ["similarity", "energy"])
def test_documents_are_new_or_known_by_themselves(scored):
    growth = GrowthConfig(document_novelty=scored)
    known = library(documents(0, 80), documents(1, 80))
    assert novel_fraction(documents(0, 400, seed=1), known, SPACE, growth) < 0.15
    assert novel_fraction(documents(7, 400), known, SPACE, growth) > 0.85
    half = np.concatenate([documents(1, 200, seed=1), documents(7, 200)])
    assert 0.4 < novel_fraction(half, known, SPACE, growth) < 0.6
    assert novel_fraction(half, Library("base"), SPACE, growth) == 1


def test_scores_are_cosines_and_free_energies():
    entries, means = (documents(0, 30), documents(1, 30)), documents(2, 6)
    cosines = SPACE(means) @ SPACE(np.stack([e.astype(np.float32).astype(np.float64).mean(0) for e in entries])).T
    by = {kind: document_scores(means, library(*entries), SPACE, GrowthConfig(document_novelty=kind))
          for kind in ("similarity", "energy")}  # fmt: skip
    assert np.allclose(by["similarity"], -cosines.max(1))
    t = TEMPERATURE
    assert np.allclose(by["energy"], -t * np.log(np.exp(cosines / t).sum(1)))
    alone = document_scores(means, library(entries[0]), SPACE, GrowthConfig(document_novelty="energy"))
    assert np.allclose(alone, -cosines[:, 0])


def test_a_library_of_single_documents_cannot_tell():
    assert novel_fraction(documents(0, 5), library(documents(0, 1)), SPACE, GROWTH) == 1
