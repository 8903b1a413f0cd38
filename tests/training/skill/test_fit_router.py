"""Fitting the router to remembered features: the loss falls, and neither skill sizes nor the order of entries matter."""

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
    """Return features of one skill around its centre, of uneven scale and far from zero."""
    rng = np.random.default_rng(skill)
    scale = np.linspace(0.1, 10, DIMS)
    return ((rng.normal(size=DIMS) + 0.8 * rng.normal(size=(count, DIMS)) + 3) * scale).astype(np.float32)


def make_library(*entries: tuple[int, int]) -> Library:
    """Return a library with one entry per (skill, expert) pair."""
    library = Library("base")
    for skill, expert in entries:
        memory = features(skill)
        library.add(LibraryEntry(f"skill_{skill}", expert, memory[:2], FeatureStatistics.from_features(memory), memory))
    return library


def make_router(expert_ids: int) -> Router:
    router = Router(DIMS)
    router.rows += [GateRow(DIMS) for _ in range(expert_ids - 1)]
    return router


def fit(router: Router, library: Library, steps: int = 60) -> tuple[float, float]:
    return fit_router.fit(router, [*fit_router.remembered_features(library), (features(9), 2)], steps, 4096)


def share_right(router: Router, library: Library) -> float:
    right = [np.array(router(mx.array(e.memory))).argmax(-1) == e.expert for e in library.entries]
    right.append(np.array(router(mx.array(features(9)))).argmax(-1) == 2)
    return float(np.mean([r.mean() for r in right]))


def test_cross_entropy_falls_and_tokens_reach_their_expert():
    router, library = make_router(3), make_library((0, 0), (1, 1))
    before, after = fit(router, library)
    assert before == pytest.approx(np.log(3), abs=1e-5)
    assert after < 0.2
    assert share_right(router, library) > 0.97


def test_returned_losses_equal_the_routers_cross_entropy():
    """The losses are in the units of the raw features, and every skill has the same weight."""

    def cross_entropy(router: Router) -> float:
        parts = []
        for memory, expert_id in [(features(0), 0), (features(1), 1), (features(9), 2)]:
            logits = np.array(router(mx.array(memory)), np.float64)
            parts.append((np.log(np.exp(logits).sum(-1)) - logits[:, expert_id]).mean())
        return float(np.mean(parts))

    router, library = make_router(3), make_library((0, 0), (1, 1))
    rng = np.random.default_rng(5)
    for row in router.rows:
        row.weight = mx.array(rng.normal(0, 0.05, DIMS).astype(np.float32))
        row.bias = mx.array(rng.normal(size=1).astype(np.float32))
    start = cross_entropy(router)
    before, after = fit(router, library, 20)
    assert before == pytest.approx(start, rel=1e-4)
    assert after == pytest.approx(cross_entropy(router), rel=1e-3)


def test_order_of_entries_does_not_matter():
    entries = [(0, 0), (1, 1), (2, 1), (3, 0)]
    one, other = make_router(3), make_router(3)
    first, second = fit(one, make_library(*entries)), fit(other, make_library(*reversed(entries)))
    assert first == pytest.approx(second, rel=1e-4)
    for skill in (0, 1, 2, 3, 9):
        x = mx.array(features(skill))
        gates = [np.array(mx.softmax(router(x), axis=-1)) for router in (one, other)]
        assert np.abs(gates[0] - gates[1]).max() < 1e-3


def test_every_skill_has_the_same_weight_whatever_its_memory_size():
    library = make_library((0, 0), (1, 1))
    entry = library.entries[1]
    repeated = make_library((0, 0), (1, 1))
    repeated.entries[1].memory = np.tile(entry.memory, (5, 1))
    cross_entropies = [fit(make_router(3), fitted, 1)[0] for fitted in (library, repeated)]
    assert cross_entropies[0] == pytest.approx(cross_entropies[1], rel=1e-5)


def test_only_the_first_tokens_of_a_memory_are_used():
    library, other = make_library((0, 0), (1, 1)), make_library((0, 0), (1, 1))
    other.entries[0].memory = np.concatenate([other.entries[0].memory[:20], np.full((60, DIMS), 1e3, np.float32)])
    routers = [make_router(3), make_router(3)]
    losses = [
        fit_router.fit(m, [*fit_router.remembered_features(k), (features(9), 2)], 10, 20)
        for m, k in zip(routers, (library, other), strict=True)
    ]
    assert losses[0] == losses[1]


def test_without_steps_the_router_is_unchanged():
    router = make_router(3)
    before, after = fit(router, make_library((0, 0), (1, 1)), 0)
    assert before == after
    assert not any(mx.abs(row.weight).max() for row in router.rows)


def test_rows_stay_separate_parameters():
    router = make_router(3)
    fit(router, make_library((0, 0), (1, 1)), 5)
    assert [row.weight.shape for row in router.rows] == [(DIMS,)] * 3
    assert [row.bias.shape for row in router.rows] == [(1,)] * 3
    assert all(row.weight.dtype == row.bias.dtype == mx.float32 for row in router.rows)
