"""The power law: exact on exact data, least squares on noisy data, intervals that cover, and doubt where there is doubt."""

from __future__ import annotations

import numpy as np
import pytest

from dylora_mlx.errors import UserError
from dylora_mlx.growth.rank import power_law

RANKS = [1, 2, 4, 8, 16, 32]


def curve(a: float, b: float, c: float, ranks=RANKS) -> np.ndarray:
    return a + b * np.array(ranks, np.float64) ** -c


def noisy(seeds: int, seed: int = 0, noise: float = 0.01, common: float = 0.0, b: float = 0.5) -> np.ndarray:
    """Losses [ranks, seeds] around 3 + b r^-0.7; `common` is the spread of what a seed does to all ranks alike."""
    rng = np.random.default_rng(seed)
    own, shared = rng.normal(0, noise, (len(RANKS), seeds)), rng.normal(0, common, (1, seeds))
    return curve(3.0, b, 0.7)[:, None] + own + shared


@pytest.mark.parametrize(("a", "b", "c"), [(3.0, 0.5, 0.7), (0.2, 4.0, 0.12), (1.0, 0.05, 2.5), (-1.0, 2.0, 1.0)])
def test_an_exact_law_is_found(a, b, c):
    law = power_law.fit(RANKS, curve(a, b, c))
    assert (law.a, law.b, law.c) == pytest.approx((a, b, c), rel=1e-5)
    assert np.allclose(law.losses([64, 3]), curve(a, b, c, [64, 3]), atol=1e-6)
    assert law.improvement(4, 8).value == pytest.approx(b * (4**-c - 8**-c), abs=1e-7)
    assert not law.lack_of_fit


def test_the_order_of_ranks_does_not_matter():
    losses, order = noisy(3), [3, 0, 5, 1, 4, 2]
    first, again = (power_law.fit([RANKS[i] for i in o], losses[o]) for o in (range(6), order))
    assert first.ranks == again.ranks == tuple(RANKS)
    assert (first.a, first.b, first.c) == (again.a, again.b, again.c)
    assert np.array_equal(first.draws, again.draws)


def test_least_squares():
    """No exponent of a dense grid, with a and b by NumPy's own least squares, is nearer to noisy losses."""
    exponents = np.geomspace(*power_law.EXPONENTS, 500)
    for seed in range(3):
        losses = noisy(1, seed, noise=0.03)[:, 0]
        law = power_law.fit(RANKS, losses)
        found, best = np.square(losses - law.losses(RANKS)).sum(), np.inf
        for c in exponents:
            x = np.stack([np.ones(6), np.array(RANKS) ** -c], axis=1)
            best = min(best, np.square(losses - x @ np.linalg.lstsq(x, losses, rcond=None)[0]).sum())
        assert found <= best * (1 + 1e-9)
        assert found > 1e-5


def test_means_of_seeds_are_fitted():
    losses = noisy(4)
    many, one = power_law.fit(RANKS, losses), power_law.fit(RANKS, losses.mean(axis=1))
    assert (many.a, many.b, many.c) == (one.a, one.b, one.c)


def test_a_loss_that_rises_is_flat():
    law = power_law.fit(RANKS, 7 - curve(3, 0.5, 0.7))
    assert law.b == 0
    assert law.a == pytest.approx((7 - curve(3, 0.5, 0.7)).mean())
    assert np.allclose(law.losses(RANKS), law.a)
    assert law.improvement(1, 32).value == 0


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_intervals_cover(monkeypatch, seeds):
    monkeypatch.setattr(power_law, "DRAWS", 200)
    held = np.zeros(3)
    for seed in range(40):
        law = power_law.fit(RANKS, noisy(seeds, seed, common=0.02 * (seeds > 1)), seed)
        for i, (found, true) in enumerate(
            [
                (law.improvement(1, 2), 0.5 * (1 - 2**-0.7)),
                (law.improvement(32, 64), 0.5 * (32**-0.7 - 64**-0.7)),
                (law.parameters()["a"], 3.0),
            ]
        ):
            assert found.interval is not None
            held[i] += found.interval[0] <= true <= found.interval[1]
    assert (held / 40 >= 0.85).all(), held
    assert held.sum() < 120, "an interval that always covers says nothing"


def width(found: power_law.IntervalEstimate) -> float:
    assert found.interval is not None
    return found.interval[1] - found.interval[0]


def test_noise_widens_intervals_and_seeds_narrow_them(monkeypatch):
    monkeypatch.setattr(power_law, "DRAWS", 200)

    def mean_width(seeds: int, noise: float) -> float:
        return float(np.mean([width(power_law.fit(RANKS, noisy(seeds, s, noise)).improvement(4, 8)) for s in range(6)]))

    few = mean_width(3, 0.01)
    assert mean_width(12, 0.01) < 0.7 * few
    assert mean_width(3, 0.04) > 2 * few


def test_what_a_seed_does_to_all_ranks_moves_the_floor_only():
    apart = power_law.fit(RANKS, noisy(3))
    together = power_law.fit(RANKS, noisy(3) + np.array([0.1, 0.0, -0.1]))
    assert width(together.improvement(4, 8)) == pytest.approx(width(apart.improvement(4, 8)), rel=1e-6)
    assert width(together.parameters()["a"]) > 3 * width(apart.parameters()["a"])


def test_the_band_holds_the_curve():
    law = power_law.fit(RANKS, noisy(3))
    band = law.band([1, 5, 64])
    assert band is not None
    assert band.shape == (2, 3)
    assert (band[0] < law.losses([1, 5, 64])).all()
    assert (law.losses([1, 5, 64]) < band[1]).all()


def test_the_seed_decides_the_draws():
    first, same, other = (power_law.fit(RANKS, noisy(3), seed).draws for seed in (1, 1, 2))
    assert first.shape == (power_law.DRAWS, 3)
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_nothing_is_left_over_to_judge_three_losses():
    law = power_law.fit([1, 4, 16], curve(3.0, 0.5, 0.7, [1, 4, 16]))
    assert law.c == pytest.approx(0.7, rel=1e-5)
    assert law.improvement(1, 4).interval is None
    assert law.parameters()["a"].interval is None
    assert law.band([2]) is None
    assert power_law.fit([1, 4, 16], noisy(2)[[0, 2, 4]]).improvement(1, 4).interval is not None, (
        "two seeds are something"
    )


def test_a_curve_that_misses_is_noticed():
    """A drop between two ranks is no power law; the intervals then follow the misses, not the seeds."""
    drop = np.array([4.0, 3.98, 3.96, 3.5, 3.49, 3.48])[:, None]
    noise = noisy(3, noise=0.003) - noisy(3, noise=0.0)
    law = power_law.fit(RANKS, drop + noise)
    assert law.lack_of_fit
    assert not power_law.fit(RANKS, noisy(3, noise=0.003)).lack_of_fit
    assert width(law.improvement(4, 8)) > 3 * width(power_law.fit(RANKS, noisy(3, noise=0.003)).improvement(4, 8))


def test_few_true_laws_count_as_missed(monkeypatch):
    monkeypatch.setattr(power_law, "DRAWS", 2)
    assert sum(power_law.fit(RANKS, noisy(3, seed)).lack_of_fit for seed in range(100)) <= 5


@pytest.mark.parametrize(
    ("ranks", "losses", "says"),
    [
        ([1, 2], [3.0, 2.9], "ranks 1, 2: a law needs at least three"),
        ([], [], "at least three"),
        ([1, 2, 2, 1], [3.0, 2.9, 2.9, 3.0], "each of them different"),
        ([1, 2, 4], [3.0, np.nan, 2.9], "rank 2: losses"),
        ([1, 2, 4], [[3.0, 3.0], [2.9, 2.9], [2.8, np.inf]], "rank 4: losses"),
        ([0, 2, 4], [3.0, 2.9, 2.8], "rank 0"),
    ],
)
def test_what_no_law_can_be_fitted_to(ranks, losses, says):
    with pytest.raises(UserError, match=says):
        power_law.fit(ranks, losses)
