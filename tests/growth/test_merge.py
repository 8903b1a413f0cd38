"""Merging experts, checked against dense matrices and their NumPy SVD."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx.growth import merge
from dylora_mlx.model.experts.lora import Expert
from tests.tiny import close, flat

SHAPES = {1: {"q_proj": (14, 20), "v_proj": (14, 6)}, 2: {"q_proj": (14, 20), "v_proj": (14, 6)}}
PROJECTIONS = [(layer, name) for layer, named in SHAPES.items() for name in named]


def make_expert(rank: int, alpha: float, seed: int, filled: bool = True) -> Expert:
    """Return an expert on all projections. Unless `filled` is False, every B is random, not zero."""
    expert, rng = Expert(SHAPES, rank, alpha, mx.random.key(seed)), np.random.default_rng(seed)
    for layer, name in PROJECTIONS if filled else []:
        factors = expert.layers[layer][name]
        factors.lora_b = mx.array(rng.normal(size=factors.lora_b.shape).astype(np.float32))
    return expert


def dense_updates(expert: Expert) -> dict[tuple[int, str], np.ndarray]:
    """Return the dense update of every projection, float64 [inputs, outputs]."""
    return {
        (layer, name): expert.scale
        * np.array(expert.layers[layer][name].lora_a, np.float64)
        @ np.array(expert.layers[layer][name].lora_b, np.float64)
        for layer, name in PROJECTIONS
    }


def flat_update(expert: Expert) -> np.ndarray:
    """Return all updates of an expert as one vector."""
    return np.concatenate([update.ravel() for update in dense_updates(expert).values()])


def update_of(merged: merge.MergedFactors, place: tuple[int, str]) -> np.ndarray:
    """Return the merged update of one projection, float64 [inputs, outputs]."""
    a, b = (part.astype(np.float64) for part in merged.factors[place[0]][place[1]])
    assert a.shape[1] == b.shape[0] == merged.rank
    return merged.alpha / merged.rank * a @ b


def refactored(expert: Expert, seed: int) -> Expert:
    """Return an expert with the same update in other factors: A M and M^-1 B."""
    equivalent, rng = make_expert(expert.rank, expert.alpha, seed), np.random.default_rng(seed)
    for layer, name in PROJECTIONS:
        mixing = np.eye(expert.rank) + 0.3 * rng.normal(size=(expert.rank, expert.rank))
        source, target = expert.layers[layer][name], equivalent.layers[layer][name]
        target.lora_a = mx.array((np.array(source.lora_a, np.float64) @ mixing).astype(np.float32))
        target.lora_b = mx.array(np.linalg.solve(mixing, np.array(source.lora_b, np.float64)).astype(np.float32))
    return equivalent


MIXED = [make_expert(2, 4.0, 1), make_expert(5, 3.0, 2), make_expert(1, 7.0, 3)]


def test_inner_products_equal_those_of_dense_updates():
    products = merge.gram_matrix(MIXED)
    for i, first in enumerate(MIXED):
        for j, second in enumerate(MIXED):
            expected = flat_update(first) @ flat_update(second)
            assert products[i, j] == pytest.approx(expected, rel=1e-12)
            assert merge.inner_product(first, second) == pytest.approx(expected, rel=1e-12)


def test_distances_equal_those_of_dense_updates():
    distances = merge.distances(MIXED)
    assert distances.dtype == np.float64
    for i, first in enumerate(MIXED):
        assert distances[i, i] == 0
        for j, second in enumerate(MIXED):
            if i != j:
                u, v = flat_update(first), flat_update(second)
                expected = np.linalg.norm(u - v) / np.sqrt(u @ u + v @ v)
                assert distances[i, j] == pytest.approx(expected, rel=1e-12)
                assert 0.8 < distances[i, j] < 1.2, "random updates are nearly orthogonal"


def test_distance_depends_on_the_update_not_on_its_factors():
    expert = MIXED[1]
    opposite = refactored(expert, 9)
    for layer, name in PROJECTIONS:
        opposite.layers[layer][name].lora_b = -opposite.layers[layer][name].lora_b
    distances = merge.distances([expert, refactored(expert, 8), opposite])
    assert distances[0, 1] < 1e-6
    assert distances[0, 2] == pytest.approx(np.sqrt(2), abs=1e-6)


def test_distances_of_zero_updates():
    zero_update, another_zero_update, nonzero_update = (
        make_expert(2, 4.0, 0, filled=False),
        make_expert(3, 4.0, 1, filled=False),
        MIXED[0],
    )
    distances = merge.distances([zero_update, another_zero_update, nonzero_update])
    assert distances.tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 0]]
    assert merge.distances([]).shape == (0, 0)


def points(*coordinates: float) -> np.ndarray:
    """Return the distance matrix of points on a line."""
    return np.abs(np.subtract.outer(coordinates, coordinates)).astype(np.float64)


def test_clusters_of_well_separated_points():
    distance = points(0.0, 5.0, 0.1, 9.0, 5.2, 0.2)
    assert merge.clusters(distance, range(6), 1.0) == [[0, 2, 5], [1, 4], [3]]
    assert merge.clusters(distance, [5, 4, 2], 1.0) == [[2, 5], [4]], (
        "only the candidates, by their index in the matrix"
    )
    assert merge.clusters(distance, [], 1.0) == []
    assert merge.clusters(distance, [3], 1.0) == [[3]]


def test_clusters_join_by_mean_distance_up_to_the_limit():
    """Points 0 and 1 join first.

    Point 3 is 3 and 2 away from them, 2.5 on average: neither single nor complete linkage.
    """
    distance = points(0.0, 1.0, 3.0)
    assert merge.clusters(distance, range(3), 0.9) == [[0], [1], [2]]
    assert merge.clusters(distance, range(3), 1.0) == [[0, 1], [2]], "a distance of exactly the limit joins"
    assert merge.clusters(distance, range(3), 2.4) == [[0, 1], [2]]
    assert merge.clusters(distance, range(3), 2.5) == [[0, 1, 2]]


def test_average_linkage_weighs_every_member():
    """Three points near 0, joined one by one, are 3.883 from 4 on average.

    The mean of the two halves' means would be 3.85.
    """
    distance = points(0.0, 0.1, 0.25, 4.0)
    assert merge.clusters(distance, range(4), 3.88) == [[0, 1, 2], [3]]
    assert merge.clusters(distance, range(4), 3.89) == [[0, 1, 2, 3]]


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_merged_factors_are_the_best_low_rank_approximation(rank):
    weights = [0.5, -0.3, 1.2]
    merged, rng, residual, total = merge.merge_factors(MIXED, weights, rank, 6.0), np.random.default_rng(0), 0.0, 0.0
    for place in PROJECTIONS:
        target = sum(w * dense_updates(e)[place] for w, e in zip(weights, MIXED, strict=True))
        u, s, v = np.linalg.svd(target)
        truncated_svd = (u[:, :rank] * s[:rank]) @ v[:rank]
        error = np.linalg.norm(target - update_of(merged, place))
        assert np.abs(update_of(merged, place) - truncated_svd).max() < 1e-6
        assert error == pytest.approx(np.sqrt(np.square(s[rank:]).sum()), abs=1e-5)
        for _ in range(20):  # the best fit in random column spaces, near the merged one and anywhere
            a = merged.factors[place[0]][place[1]][0] + rng.choice([0.02, 5.0]) * rng.normal(size=(14, rank))
            other = a @ np.linalg.lstsq(a, target, rcond=None)[0]
            assert np.linalg.norm(target - other) > error - 1e-6
        residual, total = residual + np.square(s[rank:]).sum(), total + np.square(s).sum()
    assert merged.error == pytest.approx(np.sqrt(residual / total), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("rank", [8, 12])
def test_merge_is_exact_when_the_rank_suffices(rank):
    """The ranks sum to 2 + 5 + 1, on v_proj more than its 6 outputs. The unused rank components are zero."""
    merged = merge.merge_factors(MIXED, [0.2, 0.3, 0.5], rank, 5.0)
    assert merged.error == 0
    for place in PROJECTIONS:
        target = sum(w * dense_updates(e)[place] for w, e in zip([0.2, 0.3, 0.5], MIXED, strict=True))
        assert close(update_of(merged, place), target, 1e-6)
        a, b = merged.factors[place[0]][place[1]]
        target_rank = np.linalg.matrix_rank(target)
        assert target_rank < rank or place[1] == "q_proj"
        assert not a[:, target_rank:].any()
        assert not b[target_rank:].any()
        assert a[:, :target_rank].any(axis=0).all()


def test_factors_share_the_singular_values():
    a, b = merge.merge_factors(MIXED, [1, 1, 1], 4, 2.0).factors[1]["q_proj"]
    assert a.dtype == b.dtype == np.float32
    assert np.allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1), rtol=1e-5)


def test_merging_equal_updates_needs_no_extra_rank():
    expert = MIXED[0]
    merged = merge.merge_factors(
        [expert, refactored(expert, 5), make_expert(3, 1.0, 0, filled=False)], [0.25, 0.75, 4.0], 2, 8.0
    )
    assert merged.error < 1e-6
    for place in PROJECTIONS:
        assert close(update_of(merged, place), dense_updates(expert)[place], 1e-5)


def test_merging_to_a_zero_update():
    merged_zero = merge.merge_factors([make_expert(2, 4.0, 0, filled=False)], [1.0], 3, 6.0)
    assert merged_zero.error == 0
    assert not any(part.any() for named in merged_zero.factors.values() for pair in named.values() for part in pair)
    cancelled = merge.merge_factors([MIXED[0], MIXED[0]], [1.0, -1.0], 3, 6.0)
    assert cancelled.error == 0
    assert not cancelled.factors[1]["q_proj"][0].any()


def test_a_missing_weight_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        merge.merge_factors(MIXED, [1.0, 1.0], 2, 2.0)


def test_expert_from_merged_factors():
    merged = merge.merge_factors(MIXED, [0.2, 0.3, 0.5], 10, 5.0)
    expert = merge.expert_from_factors(merged, SHAPES, mx.random.key(3))
    fresh = flat(Expert(SHAPES, 10, 5.0, mx.random.key(3)).parameters())
    assert (expert.rank, expert.alpha) == (10, 5.0)
    assert {n: (w.shape, w.dtype) for n, w in flat(expert.parameters()).items()} == {
        n: (w.shape, w.dtype) for n, w in fresh.items()
    }
    for place in PROJECTIONS:
        assert close(dense_updates(expert)[place], update_of(merged, place), 1e-6)
    spare = np.array(expert.layers[1]["q_proj"].lora_a)[:, 8:]
    assert np.array_equal(spare, fresh["layers.1.q_proj.lora_a"][:, 8:]), "an unused rank component can still learn"
    assert not np.array(expert.layers[1]["q_proj"].lora_b)[8:].any()


def test_mean_expert_has_the_mean_update():
    """The mean is exact where the rank holds it. Otherwise the expert is the best approximation of that rank."""
    mean = {place: sum(dense_updates(expert)[place] for expert in MIXED) / 3 for place in PROJECTIONS}
    full_rank, low_rank = (merge.mean_expert(MIXED, rank, 6.0, SHAPES, mx.random.key(4)) for rank in (8, 2))
    assert (full_rank.rank, full_rank.alpha, low_rank.rank) == (8, 6.0, 2)
    for place in PROJECTIONS:
        assert close(mx.array(dense_updates(full_rank)[place]), mean[place], 1e-5)
        residual = np.linalg.norm(dense_updates(low_rank)[place] - mean[place])
        assert residual == pytest.approx(
            np.sqrt((np.linalg.svd(mean[place], compute_uv=False)[2:] ** 2).sum()), rel=1e-4
        )


def test_mean_expert_keeps_the_shared_part_and_shrinks_the_rest():
    shared = make_expert(2, 4.0, 5)
    others = [make_expert(2, 4.0, seed) for seed in (6, 7, 8, 9)]
    experts = [
        merge.expert_from_factors(merge.merge_factors([shared, other], [1, 1], 4, 8.0), SHAPES, mx.random.key(0))
        for other in others
    ]
    mean_update = flat_update(merge.mean_expert(experts, 16, 16.0, SHAPES, mx.random.key(1)))
    assert mean_update @ flat_update(shared) / (flat_update(shared) @ flat_update(shared)) == pytest.approx(1, abs=0.15)
    assert all(
        abs(mean_update @ flat_update(other) / (flat_update(other) @ flat_update(other))) < 0.5 for other in others
    )


def test_mean_of_zero_updates_can_still_be_trained():
    mean_of_zero = merge.mean_expert([make_expert(2, 4.0, 1, filled=False)], 3, 6.0, SHAPES, mx.random.key(2))
    fresh = Expert(SHAPES, 3, 6.0, mx.random.key(2))
    assert not flat_update(mean_of_zero).any()
    assert all(
        np.array_equal(flat(mean_of_zero.parameters())[name], value) for name, value in flat(fresh.parameters()).items()
    )
