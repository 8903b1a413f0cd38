"""The power law of loss over rank: exact fits, least squares on noisy data, interval coverage, and lack of fit."""

from __future__ import annotations

import numpy as np
import pytest

from dylora_mlx.errors import UserError
from dylora_mlx.growth.rank import power_law

RANKS = [1, 2, 4, 8, 16, 32]


def curve(a: float, b: float, c: float, ranks=RANKS) -> np.ndarray:
    """Return the losses a + b r^-c."""
    return a + b * np.array(ranks, np.float64) ** -c


def noisy(seeds: int, seed: int = 0, noise: float = 0.01, common: float = 0.0, b: float = 0.5) -> np.ndarray:
    """Return losses [ranks, seeds] around 3 + b r^-0.7.

    Args:
        noise: standard deviation of the independent noise.
        common: standard deviation of a seed's offset, which is the same for all ranks.
    """
    rng = np.random.default_rng(seed)
    independent, shared = rng.normal(0, noise, (len(RANKS), seeds)), rng.normal(0, common, (1, seeds))
    return curve(3.0, b, 0.7)[:, None] + independent + shared


@pytest.mark.parametrize(("a", "b", "c"), [(3.0, 0.5, 0.7), (0.2, 4.0, 0.12), (1.0, 0.05, 2.5), (-1.0, 2.0, 1.0)])
def test_an_exact_law_is_recovered(a, b, c):
    law = power_law.fit(RANKS, curve(a, b, c))
    assert (law.a, law.b, law.c) == pytest.approx((a, b, c), rel=1e-5)
    assert np.allclose(law.losses([64, 3]), curve(a, b, c, [64, 3]), atol=1e-6)
    assert law.improvement(4, 8).value == pytest.approx(b * (4**-c - 8**-c), abs=1e-7)
    assert not law.lack_of_fit


def test_the_order_of_ranks_does_not_matter():
    losses, order = noisy(3), [3, 0, 5, 1, 4, 2]
    first, reordered = (power_law.fit([RANKS[i] for i in o], losses[o]) for o in (range(6), order))
    assert first.ranks == reordered.ranks == tuple(RANKS)
    assert (first.a, first.b, first.c) == (reordered.a, reordered.b, reordered.c)
    assert np.array_equal(first.draws, reordered.draws)


def test_the_fit_is_the_least_squares_solution():
    """No exponent of a dense grid, with NumPy's least-squares a and b, has a smaller squared error."""
    exponents = np.geomspace(*power_law.EXPONENTS, 500)
    for seed in range(3):
        losses = noisy(1, seed, noise=0.03)[:, 0]
        law = power_law.fit(RANKS, losses)
        fitted_error, best_error = np.square(losses - law.losses(RANKS)).sum(), np.inf
        for c in exponents:
            x = np.stack([np.ones(6), np.array(RANKS) ** -c], axis=1)
            best_error = min(best_error, np.square(losses - x @ np.linalg.lstsq(x, losses, rcond=None)[0]).sum())
        assert fitted_error <= best_error * (1 + 1e-9)
        assert fitted_error > 1e-5


def test_means_of_seeds_are_fitted():
    losses = noisy(4)
    from_seeds, from_means = power_law.fit(RANKS, losses), power_law.fit(RANKS, losses.mean(axis=1))
    assert (from_seeds.a, from_seeds.b, from_seeds.c) == (from_means.a, from_means.b, from_means.c)


def test_rising_losses_give_a_flat_law():
    law = power_law.fit(RANKS, 7 - curve(3, 0.5, 0.7))
    assert law.b == 0
    assert law.a == pytest.approx((7 - curve(3, 0.5, 0.7)).mean())
    assert np.allclose(law.losses(RANKS), law.a)
    assert law.improvement(1, 32).value == 0


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_intervals_cover_the_true_values(monkeypatch, seeds):
    monkeypatch.setattr(power_law, "DRAWS", 200)
    covered = np.zeros(3)
    for seed in range(40):
        law = power_law.fit(RANKS, noisy(seeds, seed, common=0.02 * (seeds > 1)), seed)
        for i, (estimate, true) in enumerate(
            [
                (law.improvement(1, 2), 0.5 * (1 - 2**-0.7)),
                (law.improvement(32, 64), 0.5 * (32**-0.7 - 64**-0.7)),
                (law.parameters()["a"], 3.0),
            ]
        ):
            assert estimate.interval is not None
            covered[i] += estimate.interval[0] <= true <= estimate.interval[1]
    assert (covered / 40 >= 0.85).all(), covered
    assert covered.sum() < 120, "an interval that always covers is useless"


def width(estimate: power_law.IntervalEstimate) -> float:
    assert estimate.interval is not None
    return estimate.interval[1] - estimate.interval[0]


def test_noise_widens_intervals_and_seeds_narrow_them(monkeypatch):
    monkeypatch.setattr(power_law, "DRAWS", 200)

    def mean_width(seeds: int, noise: float) -> float:
        return float(np.mean([width(power_law.fit(RANKS, noisy(seeds, s, noise)).improvement(4, 8)) for s in range(6)]))

    few = mean_width(3, 0.01)
    assert mean_width(12, 0.01) < 0.7 * few
    assert mean_width(3, 0.04) > 2 * few


def test_seed_offsets_widen_only_the_interval_of_the_floor():
    without_offsets = power_law.fit(RANKS, noisy(3))
    with_offsets = power_law.fit(RANKS, noisy(3) + np.array([0.1, 0.0, -0.1]))
    assert width(with_offsets.improvement(4, 8)) == pytest.approx(width(without_offsets.improvement(4, 8)), rel=1e-6)
    assert width(with_offsets.parameters()["a"]) > 3 * width(without_offsets.parameters()["a"])


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


def test_three_losses_leave_no_residual_for_intervals():
    law = power_law.fit([1, 4, 16], curve(3.0, 0.5, 0.7, [1, 4, 16]))
    assert law.c == pytest.approx(0.7, rel=1e-5)
    assert law.improvement(1, 4).interval is None
    assert law.parameters()["a"].interval is None
    assert law.band([2]) is None
    assert power_law.fit([1, 4, 16], noisy(2)[[0, 2, 4]]).improvement(1, 4).interval is not None, (
        "two seeds give a residual"
    )


def test_a_curve_that_is_no_power_law_has_lack_of_fit():
    """A sharp drop between two ranks is no power law.

    The intervals then follow the misfit, not the spread over seeds.
    """
    drop = np.array([4.0, 3.98, 3.96, 3.5, 3.49, 3.48])[:, None]
    noise = noisy(3, noise=0.003) - noisy(3, noise=0.0)
    law = power_law.fit(RANKS, drop + noise)
    assert law.lack_of_fit
    assert not power_law.fit(RANKS, noisy(3, noise=0.003)).lack_of_fit
    assert width(law.improvement(4, 8)) > 3 * width(power_law.fit(RANKS, noisy(3, noise=0.003)).improvement(4, 8))


def test_lack_of_fit_has_few_false_alarms(monkeypatch):
    monkeypatch.setattr(power_law, "DRAWS", 2)
    assert sum(power_law.fit(RANKS, noisy(3, seed)).lack_of_fit for seed in range(100)) <= 5


@pytest.mark.parametrize(
    ("ranks", "losses", "message"),
    [
        ([1, 2], [3.0, 2.9], "ranks 1, 2: a law needs at least three"),
        ([], [], "at least three"),
        ([1, 2, 2, 1], [3.0, 2.9, 2.9, 3.0], "each of them different"),
        ([1, 2, 4], [3.0, np.nan, 2.9], "rank 2: losses"),
        ([1, 2, 4], [[3.0, 3.0], [2.9, 2.9], [2.8, np.inf]], "rank 4: losses"),
        ([0, 2, 4], [3.0, 2.9, 2.8], "rank 0"),
    ],
)
def test_losses_without_a_possible_fit_are_refused(ranks, losses, message):
    with pytest.raises(UserError, match=message):
        power_law.fit(ranks, losses)
