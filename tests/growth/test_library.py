"""What is remembered of skills: round trip and rehearsal draws."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dylora_mlx.growth.gate_init import FeatureStatistics
from dylora_mlx.growth.library import Library, LibraryEntry
from dylora_mlx.training.checkpoint import checkpoint

DIMS = 5


def entry(skill: str, expert: int, n: int, seed: int) -> LibraryEntry:
    """Features of a skill carry its number in every place, so that a draw can be traced."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(n, DIMS)).astype(np.float32)
    memory = np.full((n, DIMS), seed, np.float32) + np.arange(n, dtype=np.float32)[:, None] / 1000
    return LibraryEntry(skill, expert, noise[:3], FeatureStatistics.from_features(noise), memory)


@pytest.fixture
def library() -> Library:
    made = Library("fingerprint")
    for number, (skill, expert, n) in enumerate((("python", 0, 40), ("requests", 1, 300), ("more", 1, 7))):
        made.add(entry(skill, expert, n, number))
    return made


def test_round_trip_through_a_checkpoint(library, tmp_path):
    checkpoint.write(tmp_path / "c", {"library.safetensors": library.arrays(), "pool.json": library.describe()})
    files = checkpoint.read(tmp_path / "c")
    again = Library.restore(files["pool.json"], checkpoint.numpy_arrays(files["library.safetensors"]))
    assert again.base == "fingerprint"
    assert [(e.skill, e.expert) for e in again.entries] == [(e.skill, e.expert) for e in library.entries]
    for ours, theirs in zip(again.entries, library.entries, strict=True):
        for name in ("means", "memory"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name))
            assert getattr(ours, name).dtype == np.float32
        assert np.array_equal(ours.statistics.gram, theirs.statistics.gram), "bitwise, for an exact resume"
        assert np.array_equal(ours.statistics.total, theirs.statistics.total)
        assert ours.statistics.num_rows == theirs.statistics.num_rows


def test_an_empty_library_round_trips(tmp_path):
    empty = Library("x")
    checkpoint.write(tmp_path / "c", {"library.safetensors": empty.arrays(), "pool.json": empty.describe()})
    files = checkpoint.read(tmp_path / "c")
    assert len(Library.restore(files["pool.json"], checkpoint.numpy_arrays(files["library.safetensors"]))) == 0


def test_more_of_a_skill_moves_its_average(library):
    entry = library.find("requests")
    own = entry.means.astype(np.float64).mean(0)
    assert np.array_equal(entry.centre, own)
    entry.record_arrival(np.tile(own + 1.0, (7, 1)), 0.9, 0.25)
    assert np.allclose(entry.centre, own + 0.25)
    entry.record_arrival(np.tile(own + 1.0, (7, 1)), 0.5, 0.25)
    assert np.allclose(entry.centre, own + 0.25 + 0.25 * 0.75)
    assert (entry.arrivals, entry.similarity) == (3, pytest.approx(0.8))
    still = library.find("python")
    still.record_arrival(np.ones((3, 5)), 0.9, 0.0)
    assert (still.drift, still.similarity, still.arrivals) == (None, None, 2)


def test_a_moved_average_survives_a_checkpoint(library):
    library.find("requests").record_arrival(np.ones((3, 5)), 0.9, 0.5)
    again = Library.restore(json.loads(json.dumps(library.describe())), library.arrays())
    assert np.array_equal(again.find("requests").centre, library.find("requests").centre)
    assert again.find("requests").similarity == 0.9


def test_experts_move(library):
    library.renumber_experts({1: 4, 7: 9})
    assert library.experts_of == {"python": 0, "requests": 4, "more": 4}


def test_the_description_is_plain_json(library):
    assert json.loads(json.dumps(library.describe()))["entries"][1] == {
        "skill": "requests", "expert": 1, "arrivals": 1, "similarity": None,
    }  # fmt: skip


@pytest.mark.parametrize("tokens", [30, 31, 300])
def test_rehearsal_draws_every_skill_alike(library, tokens):
    features, experts, weights = library.sample_memory(tokens, np.random.default_rng(0))
    each = tokens // 3
    assert len(features) == len(experts) == len(weights) == 3 * each
    assert (features.dtype, experts.dtype, weights.dtype) == (np.float32, np.int32, np.float32)
    skills = np.floor(features[:, 0]).astype(int)
    assert np.bincount(skills).tolist() == [each] * 3
    assert np.array_equal(experts, np.array([0, 1, 1])[skills])
    assert weights.sum() == pytest.approx(3)
    assert np.allclose([weights[skills == s].sum() for s in range(3)], 1)


def test_rehearsal_follows_its_generator(library):
    first, same, other = (library.sample_memory(60, np.random.default_rng(s))[0] for s in (1, 1, 2))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_rehearsal_reaches_the_whole_memory(library):
    features = library.sample_memory(9000, np.random.default_rng(0))[0]
    assert len(np.unique(features[:, 0])) > 340


def test_fewer_tokens_than_skills(library):
    assert len(library.sample_memory(1, np.random.default_rng(0))[0]) == 3


def test_nothing_to_rehearse():
    features, experts, weights = Library("x").sample_memory(100, np.random.default_rng(0))
    assert features.size == len(experts) == len(weights) == 0


def test_the_nearest_experts_come_first():
    held = Library("f" * 64, [entry(name, expert, 4, i) for i, (name, expert) in enumerate(
        [("text", 0), ("a", 1), ("b", 2), ("a_more", 1), ("c", 3)])])  # fmt: skip
    similarities = {"text": 0.99, "a": 0.1, "b": 0.5, "a_more": 0.7, "c": 0.3}
    assert held.nearest_experts(similarities, 9) == [1, 2, 3], "an expert once, by its likest skill; the base is none"
    assert held.nearest_experts(similarities, 2) == [1, 2]
    assert held.nearest_experts({}, 9) == [1, 2, 3]
    assert Library("f" * 64).nearest_experts({}, 3) == []
