"""Fitting the router to remembered features: better, convex, and blind to the order of entries."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx.growth.gate_init import FeatureStatistics
from dylora_mlx.growth.library import Library, LibraryEntry
from dylora_mlx.model.routing.router import GateRow, Router
from dylora_mlx.training.skill import fit_router

DIMS = 12


def features(skill: int, count: int = 80) -> np.ndarray:
    """Features of one skill about a centre of its own, of uneven scale and far from zero."""
    rng = np.random.default_rng(skill)
    scale = np.linspace(0.1, 10, DIMS)
    return ((rng.normal(size=DIMS) + 0.8 * rng.normal(size=(count, DIMS)) + 3) * scale).astype(np.float32)


def library(*entries: tuple[int, int]) -> Library:
    """Entries of (skill, expert)."""
    found = Library("base")
    for skill, expert in entries:
        memory = features(skill)
        found.add(LibraryEntry(f"skill_{skill}", expert, memory[:2], FeatureStatistics.from_features(memory), memory))
    return found


def router(expert_ids: int) -> Router:
    made = Router(DIMS)
    made.rows += [GateRow(DIMS) for _ in range(expert_ids - 1)]
    return made


def fit(made: Router, known: Library, steps: int = 60) -> tuple[float, float]:
    return fit_router.fit(made, [*fit_router.remembered_features(known), (features(9), 2)], steps, 4096)


def share_right(made: Router, known: Library) -> float:
    right = [np.array(made(mx.array(e.memory))).argmax(-1) == e.expert for e in known.entries]
    right.append(np.array(made(mx.array(features(9)))).argmax(-1) == 2)
    return float(np.mean([r.mean() for r in right]))


def test_cross_entropy_falls_and_tokens_find_their_expert():
    made, known = router(3), library((0, 0), (1, 1))
    before, after = fit(made, known)
    assert before == pytest.approx(np.log(3), abs=1e-5)
    assert after < 0.2
    assert share_right(made, known) > 0.97


def test_returned_losses_are_the_routers_own():
    """In the features' own units, every skill counting alike."""

    def cross_entropy(made: Router) -> float:
        parts = []
        for memory, expert_id in [(features(0), 0), (features(1), 1), (features(9), 2)]:
            logits = np.array(made(mx.array(memory)), np.float64)
            parts.append((np.log(np.exp(logits).sum(-1)) - logits[:, expert_id]).mean())
        return float(np.mean(parts))

    made, known = router(3), library((0, 0), (1, 1))
    rng = np.random.default_rng(5)
    for row in made.rows:
        row.weight = mx.array(rng.normal(0, 0.05, DIMS).astype(np.float32))
        row.bias = mx.array(rng.normal(size=1).astype(np.float32))
    start = cross_entropy(made)
    before, after = fit(made, known, 20)
    assert before == pytest.approx(start, rel=1e-4)
    assert after == pytest.approx(cross_entropy(made), rel=1e-3)


def test_order_of_entries_does_not_matter():
    entries = [(0, 0), (1, 1), (2, 1), (3, 0)]
    one, other = router(3), router(3)
    first, second = fit(one, library(*entries)), fit(other, library(*reversed(entries)))
    assert first == pytest.approx(second, rel=1e-4)
    for skill in (0, 1, 2, 3, 9):
        x = mx.array(features(skill))
        gates = [np.array(mx.softmax(made(x), axis=-1)) for made in (one, other)]
        assert np.abs(gates[0] - gates[1]).max() < 1e-3


def test_every_skill_counts_alike_whatever_it_left():
    known = library((0, 0), (1, 1))
    entry = known.entries[1]
    repeated = library((0, 0), (1, 1))
    repeated.entries[1].memory = np.tile(entry.memory, (5, 1))
    cross_entropies = [fit(router(3), which, 1)[0] for which in (known, repeated)]
    assert cross_entropies[0] == pytest.approx(cross_entropies[1], rel=1e-5)


def test_only_the_first_tokens_of_a_memory_are_used():
    known, other = library((0, 0), (1, 1)), library((0, 0), (1, 1))
    other.entries[0].memory = np.concatenate([other.entries[0].memory[:20], np.full((60, DIMS), 1e3, np.float32)])
    made = [router(3), router(3)]
    losses = [
        fit_router.fit(m, [*fit_router.remembered_features(k), (features(9), 2)], 10, 20)
        for m, k in zip(made, (known, other), strict=True)
    ]
    assert losses[0] == losses[1]


def test_without_steps_the_router_stays():
    made = router(3)
    before, after = fit(made, library((0, 0), (1, 1)), 0)
    assert before == after
    assert not any(mx.abs(row.weight).max() for row in made.rows)


def test_rows_stay_parameters_of_their_own():
    made = router(3)
    fit(made, library((0, 0), (1, 1)), 5)
    assert [row.weight.shape for row in made.rows] == [(DIMS,)] * 3
    assert [row.bias.shape for row in made.rows] == [(1,)] * 3
    assert all(row.weight.dtype == row.bias.dtype == mx.float32 for row in made.rows)
