"""Merging experts, checked against dense matrices and NumPy's SVD of them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx.growth import merge
from dylora_mlx.model.experts.lora import Expert
from tests.tiny import close, flat

SHAPES = {1: {"q_proj": (14, 20), "v_proj": (14, 6)}, 2: {"q_proj": (14, 20), "v_proj": (14, 6)}}
PLACES = [(layer, name) for layer, named in SHAPES.items() for name in named]


def made(rank: int, alpha: float, seed: int, filled: bool = True) -> Expert:
    expert, rng = Expert(SHAPES, rank, alpha, mx.random.key(seed)), np.random.default_rng(seed)
    for layer, name in PLACES if filled else []:
        factors = expert.layers[layer][name]
        factors.lora_b = mx.array(rng.normal(size=factors.lora_b.shape).astype(np.float32))
    return expert


def dense(expert: Expert) -> dict[tuple[int, str], np.ndarray]:
    """The updates themselves, float64 [inputs, outputs]."""
    return {
        (layer, name): expert.scale
        * np.array(expert.layers[layer][name].lora_a, np.float64)
        @ np.array(expert.layers[layer][name].lora_b, np.float64)
        for layer, name in PLACES
    }


def whole(expert: Expert) -> np.ndarray:
    """All updates as one vector."""
    return np.concatenate([update.ravel() for update in dense(expert).values()])


def update_of(found: merge.MergedFactors, place: tuple[int, str]) -> np.ndarray:
    a, b = (part.astype(np.float64) for part in found.factors[place[0]][place[1]])
    assert a.shape[1] == b.shape[0] == found.rank
    return found.alpha / found.rank * a @ b


def refactored(expert: Expert, seed: int) -> Expert:
    """The same update in other factors: A M and M^-1 B."""
    same, rng = made(expert.rank, expert.alpha, seed), np.random.default_rng(seed)
    for layer, name in PLACES:
        m = np.eye(expert.rank) + 0.3 * rng.normal(size=(expert.rank, expert.rank))
        theirs, own = expert.layers[layer][name], same.layers[layer][name]
        own.lora_a = mx.array((np.array(theirs.lora_a, np.float64) @ m).astype(np.float32))
        own.lora_b = mx.array(np.linalg.solve(m, np.array(theirs.lora_b, np.float64)).astype(np.float32))
    return same


MIXED = [made(2, 4.0, 1), made(5, 3.0, 2), made(1, 7.0, 3)]


def test_inner_products_are_those_of_the_updates():
    products = merge.gram_matrix(MIXED)
    for i, first in enumerate(MIXED):
        for j, second in enumerate(MIXED):
            expected = whole(first) @ whole(second)
            assert products[i, j] == pytest.approx(expected, rel=1e-12)
            assert merge.inner_product(first, second) == pytest.approx(expected, rel=1e-12)


def test_distances_are_those_of_the_updates():
    found = merge.distances(MIXED)
    assert found.dtype == np.float64
    for i, first in enumerate(MIXED):
        assert found[i, i] == 0
        for j, second in enumerate(MIXED):
            if i != j:
                u, v = whole(first), whole(second)
                expected = np.linalg.norm(u - v) / np.sqrt(u @ u + v @ v)
                assert found[i, j] == pytest.approx(expected, rel=1e-12)
                assert 0.8 < found[i, j] < 1.2, "random updates are nearly orthogonal"


def test_distance_belongs_to_the_update_and_not_to_its_factors():
    expert = MIXED[1]
    opposite = refactored(expert, 9)
    for layer, name in PLACES:
        opposite.layers[layer][name].lora_b = -opposite.layers[layer][name].lora_b
    found = merge.distances([expert, refactored(expert, 8), opposite])
    assert found[0, 1] < 1e-6
    assert found[0, 2] == pytest.approx(np.sqrt(2), abs=1e-6)


def test_distances_of_zero_updates():
    nothing, other, something = made(2, 4.0, 0, filled=False), made(3, 4.0, 1, filled=False), MIXED[0]
    found = merge.distances([nothing, other, something])
    assert found.tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 0]]
    assert merge.distances([]).shape == (0, 0)


def points(*places: float) -> np.ndarray:
    """Distances of points on a line."""
    return np.abs(np.subtract.outer(places, places)).astype(np.float64)


def test_clusters_of_an_obvious_case():
    distance = points(0.0, 5.0, 0.1, 9.0, 5.2, 0.2)
    assert merge.clusters(distance, range(6), 1.0) == [[0, 2, 5], [1, 4], [3]]
    assert merge.clusters(distance, [5, 4, 2], 1.0) == [[2, 5], [4]], "only candidates, by their own numbers"
    assert merge.clusters(distance, [], 1.0) == []
    assert merge.clusters(distance, [3], 1.0) == [[3]]


def test_the_limit_separates_by_the_mean_distance():
    """0 and 1 join first; from 3 they are 3 and 2 away, 2.5 on average: neither single nor complete linkage."""
    distance = points(0.0, 1.0, 3.0)
    assert merge.clusters(distance, range(3), 0.9) == [[0], [1], [2]]
    assert merge.clusters(distance, range(3), 1.0) == [[0, 1], [2]], "a distance of exactly the limit joins"
    assert merge.clusters(distance, range(3), 2.4) == [[0, 1], [2]]
    assert merge.clusters(distance, range(3), 2.5) == [[0, 1, 2]]


def test_linkage_counts_every_member():
    """Three points near 0, joined one by one, are 3.883 from 4 on average; the two halves' means would give 3.85."""
    distance = points(0.0, 0.1, 0.25, 4.0)
    assert merge.clusters(distance, range(4), 3.88) == [[0, 1, 2], [3]]
    assert merge.clusters(distance, range(4), 3.89) == [[0, 1, 2, 3]]


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_merged_is_the_best_approximation(rank):
    weights = [0.5, -0.3, 1.2]
    found, rng, lost, total = merge.merge_factors(MIXED, weights, rank, 6.0), np.random.default_rng(0), 0.0, 0.0
    for place in PLACES:
        target = sum(w * dense(e)[place] for w, e in zip(weights, MIXED, strict=True))
        u, s, v = np.linalg.svd(target)
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        error = np.linalg.norm(target - update_of(found, place))
        assert np.abs(update_of(found, place) - best).max() < 1e-6
        assert error == pytest.approx(np.sqrt(np.square(s[rank:]).sum()), abs=1e-5)
        for _ in range(20):  # the best fit in random column spaces, near the found one and anywhere
            a = found.factors[place[0]][place[1]][0] + rng.choice([0.02, 5.0]) * rng.normal(size=(14, rank))
            other = a @ np.linalg.lstsq(a, target, rcond=None)[0]
            assert np.linalg.norm(target - other) > error - 1e-6
        lost, total = lost + np.square(s[rank:]).sum(), total + np.square(s).sum()
    assert found.error == pytest.approx(np.sqrt(lost / total), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("rank", [8, 12])
def test_exact_when_the_rank_fits(rank):
    """2 + 5 + 1 ranks, on v_proj even more than its 6 outputs; what is left over is zero."""
    found = merge.merge_factors(MIXED, [0.2, 0.3, 0.5], rank, 5.0)
    assert found.error == 0
    for place in PLACES:
        target = sum(w * dense(e)[place] for w, e in zip([0.2, 0.3, 0.5], MIXED, strict=True))
        assert close(update_of(found, place), target, 1e-6)
        a, b = found.factors[place[0]][place[1]]
        own = np.linalg.matrix_rank(target)
        assert own < rank or place[1] == "q_proj"
        assert not a[:, own:].any()
        assert not b[own:].any()
        assert a[:, :own].any(axis=0).all()


def test_factors_share_the_singular_values():
    a, b = merge.merge_factors(MIXED, [1, 1, 1], 4, 2.0).factors[1]["q_proj"]
    assert a.dtype == b.dtype == np.float32
    assert np.allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1), rtol=1e-5)


def test_repeated_updates_need_no_further_rank():
    expert = MIXED[0]
    found = merge.merge_factors(
        [expert, refactored(expert, 5), made(3, 1.0, 0, filled=False)], [0.25, 0.75, 4.0], 2, 8.0
    )
    assert found.error < 1e-6
    for place in PLACES:
        assert close(update_of(found, place), dense(expert)[place], 1e-5)


def test_a_zero_sum():
    nothing = merge.merge_factors([made(2, 4.0, 0, filled=False)], [1.0], 3, 6.0)
    assert nothing.error == 0
    assert not any(part.any() for named in nothing.factors.values() for pair in named.values() for part in pair)
    cancelled = merge.merge_factors([MIXED[0], MIXED[0]], [1.0, -1.0], 3, 6.0)
    assert cancelled.error == 0
    assert not cancelled.factors[1]["q_proj"][0].any()


def test_every_expert_has_a_weight():
    with pytest.raises(ValueError, match="zip"):
        merge.merge_factors(MIXED, [1.0, 1.0], 2, 2.0)


def test_an_expert_of_merged_factors():
    found = merge.merge_factors(MIXED, [0.2, 0.3, 0.5], 10, 5.0)
    expert = merge.expert_from_factors(found, SHAPES, mx.random.key(3))
    fresh = flat(Expert(SHAPES, 10, 5.0, mx.random.key(3)).parameters())
    assert (expert.rank, expert.alpha) == (10, 5.0)
    assert {n: (w.shape, w.dtype) for n, w in flat(expert.parameters()).items()} == {
        n: (w.shape, w.dtype) for n, w in fresh.items()
    }
    for place in PLACES:
        assert close(dense(expert)[place], update_of(found, place), 1e-6)
    spare = np.array(expert.layers[1]["q_proj"].lora_a)[:, 8:]
    assert np.array_equal(spare, fresh["layers.1.q_proj.lora_a"][:, 8:]), "an empty rank can still learn"
    assert not np.array(expert.layers[1]["q_proj"].lora_b)[8:].any()


def test_what_experts_have_in_common_is_the_mean_of_their_updates():
    """Exactly where the rank holds it, and as near as any of that rank where it does not."""
    mean = {place: sum(dense(expert)[place] for expert in MIXED) / 3 for place in PLACES}
    whole_rank, narrow = (merge.mean_expert(MIXED, rank, 6.0, SHAPES, mx.random.key(4)) for rank in (8, 2))
    assert (whole_rank.rank, whole_rank.alpha, narrow.rank) == (8, 6.0, 2)
    for place in PLACES:
        assert close(mx.array(dense(whole_rank)[place]), mean[place], 1e-5)
        lost = np.linalg.norm(dense(narrow)[place] - mean[place])
        assert lost == pytest.approx(np.sqrt((np.linalg.svd(mean[place], compute_uv=False)[2:] ** 2).sum()), rel=1e-4)


def test_what_is_shared_adds_up_and_the_rest_fades():
    shared = made(2, 4.0, 5)
    apart = [made(2, 4.0, seed) for seed in (6, 7, 8, 9)]
    both = [
        merge.expert_from_factors(merge.merge_factors([shared, own], [1, 1], 4, 8.0), SHAPES, mx.random.key(0))
        for own in apart
    ]
    found = whole(merge.mean_expert(both, 16, 16.0, SHAPES, mx.random.key(1)))
    assert found @ whole(shared) / (whole(shared) @ whole(shared)) == pytest.approx(1, abs=0.15)
    assert all(abs(found @ whole(own) / (whole(own) @ whole(own))) < 0.5 for own in apart)


def test_a_start_from_experts_that_do_nothing_still_learns():
    found = merge.mean_expert([made(2, 4.0, 1, filled=False)], 3, 6.0, SHAPES, mx.random.key(2))
    fresh = Expert(SHAPES, 3, 6.0, mx.random.key(2))
    assert not whole(found).any()
    assert all(
        np.array_equal(flat(found.parameters())[name], value) for name, value in flat(fresh.parameters()).items()
    )
