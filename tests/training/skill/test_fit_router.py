"""Fitting the router to remembered features: gates that hold on unseen documents, whatever sizes and order of the skills."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx.growth.feature_statistics import FeatureStatistics, PooledStatistics
from dylora_mlx.growth.library import Library, LibraryEntry
from dylora_mlx.model.routing.router import Gate, GateRow, Router
from dylora_mlx.training.skill import fit_router, router_tokens
from dylora_mlx.training.skill.fit_router import RouterFit
from dylora_mlx.training.skill.router_tokens import SkillFeatures

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


def document_features(skill: int, documents: int = 24, tokens: int = 20, seed: int = 0) -> np.ndarray:
    """Return features of a skill whose tokens depend on their document, document after document."""
    rng = np.random.default_rng([skill, seed])
    centre = np.random.default_rng(skill).normal(size=DIMS)
    shifts = 0.9 * rng.normal(size=(documents, 1, DIMS))
    return (centre + shifts + 0.5 * rng.normal(size=(documents, tokens, DIMS))).reshape(-1, DIMS).astype(np.float32)


def fit(router: Router, library: Library, steps: int = 60) -> RouterFit:
    return fit_router.fit(router, [*remembered(library), newcomer(features(9), 2)], steps, 4096)


def remembered(library: Library) -> list[SkillFeatures]:
    return [SkillFeatures(entry.statistics, entry.memory, entry.expert) for entry in library.entries]


def newcomer(memory: np.ndarray, expert: int) -> SkillFeatures:
    return SkillFeatures(FeatureStatistics.from_features(memory), memory, expert)


def share_right(router: Router, library: Library) -> float:
    right = [np.array(router(mx.array(e.memory))).argmax(-1) == e.expert for e in library.entries]
    right.append(np.array(router(mx.array(features(9)))).argmax(-1) == 2)
    return float(np.mean([r.mean() for r in right]))


def cross_entropy(router: Router, texts: list[tuple[np.ndarray, int]]) -> float:
    """Return the router's mean cross-entropy on features of experts, computed in NumPy; every text counts the same."""
    parts = []
    for x, expert_id in texts:
        logits = np.array(router(mx.array(x)), np.float64)
        parts.append((np.logaddexp.reduce(logits, axis=-1) - logits[:, expert_id]).mean())
    return float(np.mean(parts))


def test_tokens_reach_their_expert():
    router, library = make_router(3), make_library((0, 0), (1, 1))
    fitted = fit(router, library)
    assert fitted.cross_entropy < 0.2
    assert fitted.accuracy > 0.95
    assert share_right(router, library) > 0.97


@pytest.mark.parametrize("steps", [0, 60])
def test_the_reported_cross_entropy_is_that_of_new_documents(steps):
    """The reported cross-entropy is about that of new documents."""
    skills = [newcomer(document_features(skill, 80), skill) for skill in range(3)]
    unseen = [(document_features(skill, 80, seed=1), skill) for skill in range(3)]
    router = make_router(3)
    fitted = fit_router.fit(router, skills, steps, 4096)
    actual = cross_entropy(router, unseen)
    assert fitted.cross_entropy == pytest.approx(actual, rel=0.5)


@pytest.mark.parametrize("sharpness", [1.0, 3.0, 0.7])
def test_logits_that_are_too_sharp_are_divided_by_just_that(sharpness):
    """The true log densities are calibrated; multiplied by a factor, the best temperature is that factor."""
    rng, experts = np.random.default_rng(0), np.arange(6000, dtype=np.int32) % 3
    centres = rng.normal(size=(3, DIMS)) * 0.5
    x = (centres[experts] + rng.normal(size=(6000, DIMS))).astype(np.float32)
    true_rows = Gate(
        mx.array((sharpness * centres).astype(np.float32)),
        mx.array((-0.5 * sharpness * (centres**2).sum(1)).astype(np.float32)),
    )
    tokens = router_tokens.Tokens(x, experts, np.full(6000, 1 / 6000, np.float32), 3)
    assert fit_router.best_temperature([(true_rows, tokens, 1.0)]) == pytest.approx(sharpness, rel=0.1)


def test_confidence_is_calibrated_on_new_documents():
    skills = [newcomer(document_features(skill, 60), skill) for skill in range(3)]
    router = make_router(3)
    fit_router.fit(router, skills, 60, 4096)
    confidences, right = [], []
    for skill in range(3):
        gates = np.array(mx.softmax(router(mx.array(document_features(skill, 200, seed=2))), axis=-1))
        confidences.append(gates.max(-1))
        right.append(gates.argmax(-1) == skill)
    confidence, correct = np.concatenate(confidences), np.concatenate(right)
    bins = np.digitize(confidence, np.linspace(0, 1, 16)[1:-1])
    error = sum(abs((confidence - correct)[bins == b].sum()) for b in range(15)) / len(confidence)
    assert error < 0.05


def test_the_reported_cross_entropy_is_of_held_out_documents():
    """Labels of the held-out quarter are wrong in one memory, so the reported loss must be large."""
    memory = features(0, 80)
    memory[60:] = features(1, 20)
    skills = [newcomer(memory, 0), newcomer(features(1), 1), newcomer(features(9), 2)]
    honest = fit_router.fit(make_router(3), [newcomer(features(0), 0), *skills[1:]], 60, 4096)
    wrong = fit_router.fit(make_router(3), skills, 60, 4096)
    assert wrong.cross_entropy > honest.cross_entropy + 0.2
    assert wrong.accuracy == pytest.approx(2 / 3, abs=0.05)


def skewed_features(skill: int, seed: int = 0) -> np.ndarray:
    """Return features of 60 documents that no Gaussian describes, document after document."""
    rng = np.random.default_rng([skill, seed])
    shift = rng.normal(size=(60, 1, DIMS)) * np.where(np.arange(DIMS) % 3 == skill, 3.0, 0.3)
    centre = np.random.default_rng(skill).normal(size=DIMS)
    return (centre + np.exp(0.5 * shift) + 0.4 * rng.normal(size=(60, 10, DIMS))).reshape(-1, DIMS).astype(np.float32)


def test_a_correction_is_made_only_where_it_helps():
    gaussian = [newcomer(document_features(skill, 60, 4), skill) for skill in range(3)]
    assert fit_router.fit(make_router(3), gaussian, 60, 4096).penalty == np.inf
    skewed, unseen = [newcomer(skewed_features(s), s) for s in range(3)], [(skewed_features(s, 1), s) for s in range(3)]
    plain, corrected = make_router(3), make_router(3)
    assert fit_router.fit(plain, skewed, 0, 4096).penalty == np.inf
    assert fit_router.fit(corrected, skewed, 60, 4096).penalty in fit_router.PENALTIES
    assert cross_entropy(corrected, unseen) < cross_entropy(plain, unseen) - 0.02


def test_order_of_entries_does_not_matter():
    entries = [(0, 0), (1, 1), (2, 1), (3, 0)]
    one, other = make_router(3), make_router(3)
    first, second = fit(one, make_library(*entries)), fit(other, make_library(*reversed(entries)))
    assert first.cross_entropy == pytest.approx(second.cross_entropy, rel=1e-2)
    for skill in (0, 1, 2, 3, 9):
        x = mx.array(features(skill))
        gates = [np.array(mx.softmax(router(x), axis=-1)) for router in (one, other)]
        assert np.abs(gates[0] - gates[1]).max() < 1e-2


def test_every_skill_has_the_same_weight_whatever_its_memory_size():
    skills = [newcomer(features(skill), skill) for skill in range(3)]
    memory = np.tile(features(1)[:60], (5, 1))
    repeated = SkillFeatures(skills[1].statistics, np.concatenate([memory, np.tile(features(1)[60:], (5, 1))]), 1)
    cross_entropies = [
        fit_router.fit(make_router(3), each, 60, 4096).cross_entropy
        for each in (skills, [skills[0], repeated, skills[2]])
    ]
    assert cross_entropies[0] == pytest.approx(cross_entropies[1], rel=1e-2)


def test_a_long_memory_is_thinned_evenly():
    memory = np.arange(100, dtype=np.float32)[:, None]
    assert router_tokens.spread(memory, 4)[:, 0].tolist() == [0, 25, 50, 75]
    assert router_tokens.spread(memory, 200) is memory


def test_the_rows_read_are_bounded_over_all_skills(monkeypatch):
    """With a bound of 40 rows each of two skills may give 20, and the fit is that of these rows."""
    skills = [newcomer(features(skill), skill) for skill in range(2)]
    monkeypatch.setattr(router_tokens, "MAX_ROWS", 40)
    bounded, thinned = make_router(2), make_router(2)
    fit_router.fit(bounded, skills, 20, 4096)
    fit_router.fit(thinned, skills, 20, 20)
    for one, other in zip(bounded.rows, thinned.rows, strict=True):
        assert np.array_equal(np.array(one.weight), np.array(other.weight))


def test_a_memory_of_a_few_tokens_is_enough():
    skills = [newcomer(features(skill, 2), skill) for skill in range(3)]
    router = make_router(3)
    fitted = fit_router.fit(router, skills, 20, 4096)
    assert np.isfinite(fitted.cross_entropy)
    assert all(mx.isfinite(row.weight).all().item() for row in router.rows)


def test_only_one_row_is_fitted_beside_the_others():
    """The other rows stay bit for bit, even if they hold a vector that their own softmax does not see."""
    skills = [newcomer(features(skill), skill) for skill in range(2)]
    router, offset = make_router(2), mx.array(np.linspace(-3, 3, DIMS).astype(np.float32))
    fit_router.fit(router, skills, 60, 4096)
    for row in router.rows:
        row.weight = row.weight + offset
    router.rows.append(GateRow(DIMS))
    before = [(np.array(row.weight), np.array(row.bias)) for row in router.rows[:2]]
    fitted = fit_router.fit(router, [*skills, newcomer(features(9), 2)], 60, 4096, [2])
    for row, (weight, bias) in zip(router.rows[:2], before, strict=True):
        assert np.array_equal(np.array(row.weight), weight)
        assert np.array_equal(np.array(row.bias), bias)
    assert fitted.accuracy > 0.9
    for skill, expert in ((0, 0), (1, 1), (9, 2)):
        assert (np.array(router(mx.array(features(skill)))).argmax(-1) == expert).mean() > 0.9


def test_rows_stay_separate_parameters():
    router = make_router(3)
    fit(router, make_library((0, 0), (1, 1)), 5)
    assert [row.weight.shape for row in router.rows] == [(DIMS,)] * 3
    assert [row.bias.shape for row in router.rows] == [(1,)] * 3
    assert all(row.weight.dtype == row.bias.dtype == mx.float32 for row in router.rows)


def many(skills: int) -> list[SkillFeatures]:
    """Return documents of skills whose experts are their numbers."""
    return [newcomer(document_features(skill), skill) for skill in range(skills)]


def test_a_large_pool_corrects_the_rows_near_the_newcomer():
    """As right on new documents as the correction of all rows. The others are the discriminant's, divided by the temperature."""
    skills, bounded, whole, plain = many(14), make_router(14), make_router(14), make_router(14)
    pooled = PooledStatistics.of([skill.statistics for skill in skills])
    near = fit_router.nearest_rows(skills, pooled, 14, 5)
    assert len(near) == 5
    assert {0, 13} <= set(near)
    fitted = fit_router.fit(bounded, skills, 60, 4096, corrected=near)
    assert fitted.penalty in fit_router.PENALTIES
    fit_router.fit(whole, skills, 60, 4096)
    fit_router.fit(plain, skills, 0, 4096)
    ratios = [np.array(b.weight) / np.array(p.weight) for b, p in zip(bounded.rows, plain.rows, strict=True)]
    for expert_id, ratio in enumerate(ratios):
        assert bool(ratio.max() - ratio.min() < 1e-3) == (expert_id not in near)
    unseen = [document_features(skill, seed=1) for skill in range(14)]
    right = {
        name: np.mean([(np.array(r(mx.array(x))).argmax(-1) == skill).mean() for skill, x in enumerate(unseen)])
        for name, r in (("bounded", bounded), ("whole", whole))
    }
    assert right["whole"] > 0.7
    assert right["bounded"] > right["whole"] - 0.02


def test_a_temperature_is_chosen_by_some_tokens_of_a_large_pool(monkeypatch):
    skills, by_all, by_some = many(14), make_router(14), make_router(14)
    exact = fit_router.fit(by_all, skills, 0, 4096).temperature
    monkeypatch.setattr(fit_router, "JUDGED_BY_ALL", 8)
    monkeypatch.setattr(fit_router, "MAX_JUDGED", 700)
    thinned = fit_router.fit(by_some, skills, 0, 4096).temperature
    assert thinned != exact
    assert thinned == pytest.approx(exact, rel=0.1)
    tokens = router_tokens.Tokens(np.zeros((5, 2), np.float32), np.arange(5), np.full(5, 0.2, np.float32), 5)
    assert tokens.thinned(5) is tokens
    assert tokens.thinned(2).experts.tolist() == [0, 2]
    assert tokens.thinned(2).weights.sum() == pytest.approx(1)


def test_the_nearest_rows_have_the_largest_logits_at_the_newcomers_mean():
    rng = np.random.default_rng(0)
    centres = np.array([[10.0, 0], [0, 10], [0, 0], [4, 0], [5.2, 0.5]])
    skills = [newcomer((c + rng.normal(size=(200, 2))).astype(np.float32), i) for i, c in enumerate(centres)]
    pooled = PooledStatistics.of([skill.statistics for skill in skills])
    assert fit_router.nearest_rows(skills, pooled, 5, 3) == [0, 3, 4]
    assert fit_router.nearest_rows(skills, pooled, 5, 4) == [0, 2, 3, 4]
    assert fit_router.nearest_rows(skills, pooled, 5, 9) == [0, 1, 2, 3, 4]


def test_fitted_skills_have_half_of_the_tokens(monkeypatch):
    monkeypatch.setattr(router_tokens, "MAX_ROWS", 80)
    skills = many(10)
    assert router_tokens.token_limits(skills, 4096) == [8] * 10
    assert router_tokens.token_limits(skills, 4096, [8, 9]) == [5] * 8 + [20, 20]
    assert router_tokens.token_limits(skills, 6, [8, 9]) == [5] * 8 + [6, 6]
    assert router_tokens.token_limits(many(40), 4096) == [router_tokens.HELD_OUT] * 40
