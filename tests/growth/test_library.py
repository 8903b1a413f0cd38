"""The library of remembered skills: checkpoint round trip, drift of skill means, and rehearsal draws."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dylora_mlx.growth.feature_statistics import FeatureStatistics, PooledStatistics
from dylora_mlx.growth.library import Library, LibraryEntry
from dylora_mlx.training.checkpoint import checkpoint

DIMS = 5


def entry(skill: str, expert: int, memory_rows: int, seed: int) -> LibraryEntry:
    """Return a library entry.

    Every remembered feature carries the skill's number, so that a draw can be traced to it.
    """
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(memory_rows, DIMS)).astype(np.float32)
    memory = np.full((memory_rows, DIMS), seed, np.float32) + np.arange(memory_rows, dtype=np.float32)[:, None] / 1000
    return LibraryEntry(skill, expert, noise[:3], FeatureStatistics.from_features(noise), memory)


@pytest.fixture
def library() -> Library:
    filled_library = Library("fingerprint")
    for number, (skill, expert, memory_rows) in enumerate((("python", 0, 40), ("requests", 1, 300), ("more", 1, 7))):
        filled_library.add(entry(skill, expert, memory_rows, number))
    return filled_library


def test_round_trip_through_a_checkpoint(library, tmp_path):
    checkpoint.write(tmp_path / "c", library.files() | {"pool.json": library.describe()})
    files = checkpoint.read(tmp_path / "c")
    restored = Library.restore(files["pool.json"], files)
    assert restored.base == "fingerprint"
    assert [(e.skill, e.expert) for e in restored.entries] == [(e.skill, e.expert) for e in library.entries]
    for restored_entry, entry in zip(restored.entries, library.entries, strict=True):
        for name in ("means", "memory"):
            assert np.array_equal(getattr(restored_entry, name), getattr(entry, name))
            assert getattr(restored_entry, name).dtype == np.float32
        assert np.array_equal(restored_entry.statistics.gram, entry.statistics.gram), "bitwise, for an exact resume"
        assert np.array_equal(restored_entry.statistics.total, entry.statistics.total)
        assert restored_entry.statistics.num_rows == entry.statistics.num_rows


def test_an_empty_library_round_trips(tmp_path):
    empty = Library("x")
    checkpoint.write(tmp_path / "c", empty.files() | {"pool.json": empty.describe()})
    files = checkpoint.read(tmp_path / "c")
    assert len(Library.restore(files["pool.json"], files)) == 0


def test_further_arrivals_move_the_skill_centre(library):
    entry = library.find("requests")
    mean = entry.means.astype(np.float64).mean(0)
    assert np.array_equal(entry.centre, mean)
    entry.record_arrival(np.tile(mean + 1.0, (7, 1)), 0.25)
    assert np.allclose(entry.centre, mean + 0.25)
    entry.record_arrival(np.tile(mean + 1.0, (7, 1)), 0.25)
    assert np.allclose(entry.centre, mean + 0.25 + 0.25 * 0.75)
    assert entry.arrivals == 3
    unmoved = library.find("python")
    unmoved.record_arrival(np.ones((3, 5)), 0.0)
    assert (unmoved.drift, unmoved.arrivals) == (None, 2)


@pytest.mark.parametrize(("expert", "share"), [(1, 0.25), (0, 0.0), (2, 0.0)])
def test_the_centre_of_a_skill_moves_for_its_own_expert_alone(library, expert, share):
    """The base or another expert may be chosen by loss for text that is most like this skill."""
    entry = library.find("requests")
    before = entry.centre
    library.record_known("requests", expert, np.tile(before + 1.0, (7, 1)), 0.25)
    assert np.allclose(entry.centre, before + share)
    assert entry.arrivals == 1 + (share > 0)


def test_a_moved_centre_survives_a_checkpoint(library):
    library.find("requests").record_arrival(np.ones((3, 5)), 0.5)
    described = json.loads(json.dumps(library.describe()))
    described["entries"][0]["similarity"] = 0.9  # as an earlier version wrote it
    restored = Library.restore(described, library.files())
    assert np.array_equal(restored.find("requests").centre, library.find("requests").centre)


def test_renumbering_experts(library):
    library.renumber_experts({1: 4, 7: 9})
    assert library.experts_of == {"python": 0, "requests": 4, "more": 4}


def test_the_description_is_plain_json(library):
    assert json.loads(json.dumps(library.describe()))["entries"][1] == {
        "skill": "requests", "expert": 1, "arrivals": 1, "format": "",
    }  # fmt: skip


@pytest.mark.parametrize("tokens", [30, 31, 300])
def test_rehearsal_draws_the_same_number_from_every_skill(library, tokens):
    features, experts, weights = library.sample_memory(tokens, np.random.default_rng(0))
    tokens_per_skill = tokens // 3
    assert len(features) == len(experts) == len(weights) == 3 * tokens_per_skill
    assert (features.dtype, experts.dtype, weights.dtype) == (np.float32, np.int32, np.float32)
    skills = np.floor(features[:, 0]).astype(int)
    assert np.bincount(skills).tolist() == [tokens_per_skill] * 3
    assert np.array_equal(experts, np.array([0, 1, 1])[skills])
    assert weights.sum() == pytest.approx(3)
    assert np.allclose([weights[skills == s].sum() for s in range(3)], 1)


def test_rehearsal_is_reproducible_from_its_generator(library):
    first, same, other = (library.sample_memory(60, np.random.default_rng(s))[0] for s in (1, 1, 2))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_rehearsal_reaches_the_whole_memory(library):
    features = library.sample_memory(9000, np.random.default_rng(0))[0]
    assert len(np.unique(features[:, 0])) > 340


def test_rehearsal_draws_one_token_per_skill_at_least(library):
    assert len(library.sample_memory(1, np.random.default_rng(0))[0]) == 3


def test_rehearsal_of_an_empty_library_is_empty():
    features, experts, weights = Library("x").sample_memory(100, np.random.default_rng(0))
    assert features.size == len(experts) == len(weights) == 0


def test_the_nearest_experts_come_first():
    library = Library("f" * 64, [entry(name, expert, 4, i) for i, (name, expert) in enumerate(
        [("text", 0), ("a", 1), ("b", 2), ("a_more", 1), ("c", 3)])])  # fmt: skip
    similarities = {"text": 0.99, "a": 0.1, "b": 0.5, "a_more": 0.7, "c": 0.3}
    assert library.nearest_experts(similarities, 9) == [1, 2, 3], (
        "each expert once, by its most similar skill; never the base"
    )
    assert library.nearest_experts(similarities, 2) == [1, 2]
    assert library.nearest_experts({}, 9) == [1, 2, 3]
    assert Library("f" * 64).nearest_experts({}, 3) == []


def test_pooled_statistics_are_those_of_all_entries(library):
    """Only new entries are added to the sum, with the bits of one sum in the order of the entries; another order begins anew."""
    direct = PooledStatistics.of([e.statistics for e in library.entries])
    for pooled in (library.pooled_statistics(), library.pooled_statistics()):
        assert np.array_equal(pooled.means, direct.means)
        assert np.array_equal(pooled.second_moment, direct.second_moment)
    newcomer = entry("new", 2, 9, 3)
    with_newcomer = library.pooled_statistics().with_skill(newcomer.statistics)
    library.add(newcomer)
    grown, again = library.pooled_statistics(), Library("fingerprint", list(library.entries)).pooled_statistics()
    assert np.array_equal(grown.second_moment, again.second_moment)
    assert np.allclose(with_newcomer.second_moment, grown.second_moment, rtol=1e-12)
    assert np.array_equal(with_newcomer.means, grown.means)
    library.entries.reverse()
    turned = library.pooled_statistics()
    assert np.array_equal(turned.means, grown.means[::-1])
    assert np.allclose(turned.second_moment, grown.second_moment, rtol=1e-12)


def test_rehearsal_draws_from_some_skills_of_a_large_library(monkeypatch):
    monkeypatch.setattr("dylora_mlx.growth.library.MAX_REHEARSED", 8)
    large = Library("fingerprint", [entry(f"s{i}", i, 20, i) for i in range(40)])
    drawn, weight = np.zeros(40), []
    for seed in range(60):
        features, experts, weights = large.sample_memory(32, np.random.default_rng(seed))
        assert len(features) == 32
        assert len(set(experts.tolist())) == 8
        assert np.array_equal(features[:, 0].astype(int), experts)
        drawn[np.unique(experts)] += 1
        weight.append(weights.sum())
    assert np.allclose(weight, 40, rtol=1e-5), "as if every skill were there"
    assert drawn.min() >= 3
