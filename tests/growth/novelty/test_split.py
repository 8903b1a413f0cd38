"""Splitting documents of one file into skills, and the novelty of single documents, on synthetic documents."""

from __future__ import annotations

import numpy as np
import pytest

from dylora_mlx.config import GrowthConfig
from dylora_mlx.growth.feature_statistics import FeatureStatistics
from dylora_mlx.growth.library import Library, LibraryEntry
from dylora_mlx.growth.novelty import split
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
    """Return document means of a synthetic skill.

    Each is a common offset, plus the skill's direction, plus noise. `wide` adds one direction of large variance.
    """
    direction = np.random.default_rng(1000 + skill).normal(size=DIMS)
    rng = np.random.default_rng([skill, seed])
    axis = np.eye(DIMS)[skill % DIMS]
    return COMMON + direction + 0.7 * rng.normal(size=(count, DIMS)) + wide * rng.normal(size=(count, 1)) * axis


def mixed(*parts: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the documents in random order, and the index of the part that each is from."""
    labels = np.concatenate([np.full(len(part), number) for number, part in enumerate(parts)])
    order = np.random.default_rng(seed).permutation(len(labels))
    return np.concatenate(parts)[order], labels[order]


def partition(means: np.ndarray, growth: GrowthConfig = GROWTH, seed: int = 0) -> Partition:
    return find_parts(means, SPACE, growth, np.random.default_rng(seed))


def token_documents(labels: np.ndarray, seed: int = 0) -> list[np.ndarray]:
    """Return token ids of documents.

    A third of each document's 60 tokens are from its skill's vocabulary, the rest from a common one.
    """
    rng = np.random.default_rng([7, seed])
    skill_tokens = [500 + 60 * label + rng.integers(0, 60, 60) for label in labels]
    return [np.where(rng.random(60) < 1 / 3, tokens, rng.integers(0, 500, 60)) for tokens in skill_tokens]


def cosine_matrix(points: np.ndarray) -> np.ndarray:
    return points @ points.T


def library(*skills: np.ndarray) -> Library:
    library_of_skills = Library("base")
    for i, means in enumerate(skills):
        entry = LibraryEntry(
            f"skill_{i}",
            i,
            means.astype(np.float32),
            FeatureStatistics.from_features(np.eye(DIMS)),
            np.zeros((1, DIMS), np.float32),
        )
        library_of_skills.add(entry)
    return library_of_skills


@pytest.mark.parametrize("wide", [0.0, 2.0])
@pytest.mark.parametrize("count", [64, 128, 600])
def test_one_skill_is_not_split(count, wide):
    for skill in range(10):
        means = documents(skill, count, wide=wide)
        split = partition(means, seed=skill)
        assert split.parts == 1
        assert not split.labels.any()
        assert np.allclose(split.centres[0], SPACE(means.mean(0)))
        assert not split.assign(documents(skill + 1, 5)).any()


@pytest.mark.parametrize("share", [0.3, 0.4, 0.5])
@pytest.mark.parametrize("count", [128, 600])
def test_two_skills_are_split(count, share):
    for pair in range(5):
        smaller = round(share * count)
        means, truth = mixed(documents(pair, count - smaller), documents(pair + 20, smaller), seed=pair)
        split = partition(means, seed=pair)
        assert split.parts == 2
        assert split.labels.shape == (count,)
        accuracy = np.mean(split.labels == truth)
        assert max(accuracy, 1 - accuracy if share == 0.5 else 0) >= 0.95, "part 0 is the larger"
        assert np.allclose(np.linalg.norm(split.centres, axis=1), 1)
        expected_centre = SPACE(means[split.labels == 0].mean(0))
        assert np.allclose(split.centres[0], expected_centre)


def test_further_documents_are_assigned_to_their_part():
    means, _ = mixed(documents(1, 80), documents(2, 50))
    split = partition(means)
    assert np.mean(split.assign(documents(1, 200, seed=1)) == 0) >= 0.95
    assert np.mean(split.assign(documents(2, 200, seed=1)) == 1) >= 0.95
    assert split.assign(documents(2, 0)).shape == (0,)


def faint(skill: int, count: int, seed: int = 0) -> np.ndarray:
    """Return documents of a skill whose noise exceeds the difference between skills."""
    return documents(skill, count, seed) + 3.5 * np.random.default_rng([3, skill, seed]).normal(size=(count, DIMS))


def test_tokens_split_skills_that_hidden_states_do_not():
    for pair in range(5):
        means, truth = mixed(faint(pair, 120), faint(pair + 20, 80), seed=pair)
        split = find_parts(means, SPACE, GROWTH, np.random.default_rng(0), token_documents(truth))
        assert split.parts == 2
        assert np.mean(split.labels == truth) >= 0.95
        without_tokens = partition(means)
        assert without_tokens.parts == 1 or np.mean(without_tokens.labels == truth) < 0.95
        further_truth = np.array([0] * 100 + [1] * 100)
        further_means = np.concatenate([faint(pair, 100, 1), faint(pair + 20, 100, 1)])
        assert np.mean(split.assign(further_means, token_documents(further_truth, 1)) == further_truth) >= 0.95


def test_tokens_do_not_split_one_skill():
    for skill in range(10):
        means = documents(skill, 128, wide=2.0)
        assert (
            find_parts(means, SPACE, GROWTH, np.random.default_rng(0), token_documents(np.full(128, skill))).parts == 1
        )


def test_two_vocabularies_of_one_skill_are_not_split():
    """The tokens differ but the states do not, so a second expert would learn the same as the first."""
    labels = np.array([0] * 70 + [1] * 60)
    assert find_parts(documents(1, 130), SPACE, GROWTH, np.random.default_rng(0), token_documents(labels)).parts == 1


def test_assigning_to_a_split_by_tokens_needs_tokens():
    means, truth = mixed(documents(1, 80), documents(2, 50))
    split = find_parts(means, SPACE, GROWTH, np.random.default_rng(0), token_documents(truth))
    with pytest.raises(ValueError, match="tokens"):
        split.assign(means)


def test_documents_without_common_tokens_are_split_by_their_states():
    means, truth = mixed(documents(1, 80), documents(2, 50))
    split = find_parts(means, SPACE, GROWTH, np.random.default_rng(0), [np.array([i]) for i in range(130)])
    assert np.mean(split.assign(means) == truth) >= 0.95


def test_parts_are_ordered_by_size():
    means, truth = mixed(documents(1, 100), documents(2, 70), documents(3, 45))
    split = partition(means)
    assert split.parts == 3
    assert np.mean(split.labels == truth) >= 0.95
    assert (np.diff(np.bincount(split.labels)) < 0).all()


def test_no_part_is_below_min_samples():
    means, _ = mixed(documents(1, 90), documents(2, 40))
    assert partition(means).parts == 2
    assert partition(means, GrowthConfig(min_samples=45, embedding_samples=128)).parts == 1
    assert partition(means[:40]).parts == 1
    assert partition(means[:1]).parts == 1


def test_parts_above_the_novelty_threshold_are_not_split():
    """The two clusters are well separated, but their embeddings are similar because of a shared direction."""
    shared = 3 * np.random.default_rng(5).normal(size=DIMS)
    means, _ = mixed(documents(1, 64) + shared, documents(2, 64) + shared)
    assert normalised_cut(cosine_matrix(SPACE(means)))[1] < CUT
    assert partition(means).parts == 1
    assert partition(mixed(documents(1, 64), documents(2, 64))[0]).parts == 2
    assert partition(mixed(documents(1, 64), documents(2, 64))[0], GrowthConfig(threshold=-0.9)).parts == 1


def test_the_seed_determines_the_split():
    means, _ = mixed(documents(1, 500), documents(2, 300))
    first, second = partition(means), partition(means)
    assert np.array_equal(first.labels, second.labels)
    assert np.array_equal(first.weights, second.weights)


def test_normalised_cut_equals_its_definition():
    """The reference is the definition on the nearest-neighbour graph of a few documents."""
    points = SPACE(mixed(documents(1, 12), documents(2, 8))[0])
    sides, value = normalised_cut(cosine_matrix(points))
    cosines = points @ points.T - 2 * np.eye(20)
    nearest = np.argsort(-cosines, axis=1)[:, :5]
    graph = np.zeros((20, 20))
    for i, row in enumerate(nearest):
        graph[i, row] += 0.5
        graph[row, i] += 0.5
    between = graph[sides][:, ~sides].sum()
    assert value == pytest.approx(between / graph[sides].sum() + between / graph[~sides].sum())
    assert sorted([sides.sum(), (~sides).sum()]) == [8, 12]


def test_a_cut_between_unconnected_clusters_is_zero():
    clusters = np.concatenate([np.tile(row, (20, 1)) for row in np.eye(DIMS)[:2]])
    points = clusters + 1e-3 * np.random.default_rng(0).normal(size=clusters.shape)
    sides, value = normalised_cut(cosine_matrix(points))
    assert value == pytest.approx(0, abs=1e-9)
    assert (sides[:20] != sides[20:]).all()


@pytest.mark.parametrize("scored", ["similarity", "energy"])
def test_each_document_is_novel_or_known(scored):
    growth = GrowthConfig(document_novelty=scored)
    known = library(documents(0, 80), documents(1, 80))
    assert novel_fraction(documents(0, 400, seed=1), known, SPACE, growth) < 0.15
    assert novel_fraction(documents(7, 400), known, SPACE, growth) > 0.85
    half = np.concatenate([documents(1, 200, seed=1), documents(7, 200)])
    assert 0.4 < novel_fraction(half, known, SPACE, growth) < 0.6
    assert novel_fraction(half, Library("base"), SPACE, growth) == 1


@pytest.mark.parametrize("scored", ["similarity", "energy"])
def test_usual_scores_are_of_documents_left_out_of_their_own_centre(scored, monkeypatch):
    """The reference compares one document at a time with the other entries and the rest of its own."""
    growth = GrowthConfig(document_novelty=scored)
    known, means = library(*(documents(skill, 12 + skill) for skill in range(4))), documents(7, 40)

    def by_hand(entries) -> float:
        usual = []
        for entry in entries:
            others = [other.means for other in known.entries if other is not entry]
            for number, document in enumerate(entry.means):
                rest = np.delete(entry.means, number, axis=0)
                usual += document_scores(document[None], library(rest, *others), SPACE, growth).tolist()
        return float(np.mean(document_scores(means, known, SPACE, growth) > np.quantile(usual, 1 - split.FALSE_ALARM)))

    assert novel_fraction(means, known, SPACE, growth) == pytest.approx(by_hand(known.entries))
    monkeypatch.setattr(split, "MAX_SCORED", 2)
    assert novel_fraction(means, known, SPACE, growth) == pytest.approx(by_hand(known.entries[::2]))


def test_scores_are_cosines_and_free_energies():
    entries, means = (documents(0, 30), documents(1, 30)), documents(2, 6)
    cosines = SPACE(means) @ SPACE(np.stack([e.astype(np.float32).astype(np.float64).mean(0) for e in entries])).T
    scores = {kind: document_scores(means, library(*entries), SPACE, GrowthConfig(document_novelty=kind))
          for kind in ("similarity", "energy")}  # fmt: skip
    assert np.allclose(scores["similarity"], -cosines.max(1))
    t = TEMPERATURE
    assert np.allclose(scores["energy"], -t * np.log(np.exp(cosines / t).sum(1)))
    single = document_scores(means, library(entries[0]), SPACE, GrowthConfig(document_novelty="energy"))
    assert np.allclose(single, -cosines[:, 0])


def test_a_library_of_single_documents_makes_everything_novel():
    assert novel_fraction(documents(0, 5), library(documents(0, 1)), SPACE, GROWTH) == 1
