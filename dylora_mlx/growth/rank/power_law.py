"""A power law with an offset, fitted with intervals: how a loss falls over the rank of an expert.

loss(r) = a + b r^-c falls to a floor, as losses do over the size of a model or of its data (Hestness et al. 2017, "Deep
Learning Scaling is Predictable, Empirically", equation 1; Kaplan et al. 2020, "Scaling Laws for Neural Language Models",
section 1.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dylora_mlx.errors import UserError

EXPONENTS = (0.05, 6.0)
"""Range of c. At its lower end the loss falls by the same amount at every doubling, at its upper end only at the first."""
GRID, ZOOMS = 65, 6
"""Exponents tried at a time, evenly spaced in log c, and how often the search closes in on the best."""
DRAWS, CONFIDENCE = 1000, 0.95
"""Bootstrap resamples, and the coverage of the intervals made of them."""
DOUBT = 0.01
"""The law counts as missing the losses where seeds would put them so far off it with less than this probability."""


class IntervalEstimate(NamedTuple):
    """A value and its interval, None where the measurements leave nothing to judge it by."""

    value: float
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        ends = "interval unknown" if self.interval is None else "{:.4f} to {:.4f}".format(*self.interval)
        return f"{self.value:.4f} ({ends})"


@dataclass(frozen=True, eq=False)
class PowerLaw:
    """loss(r) = a + b r^-c in nats per token, fitted to `ranks`, in ascending order.

    b is 0 for a loss that does not fall, and c then means nothing. draws: a, b, c of bootstrap resamples, float64 [D, 3],
    none where nothing is left over to judge the fit by; misses: whether the losses are further off the curve than seeds
    explain.
    """

    a: float
    b: float
    c: float
    ranks: tuple[int, ...]
    draws: np.ndarray
    lack_of_fit: bool

    def losses(self, ranks: Sequence[float] | np.ndarray) -> np.ndarray:
        """Predicted losses, float64 [n]."""
        return _curves(np.array([[self.a, self.b, self.c]]), ranks)[0]

    def band(self, ranks: Sequence[float] | np.ndarray) -> np.ndarray | None:
        """Intervals of the predicted losses, lower and upper ends, float64 [2, n]."""
        return _ends(_curves(self.draws, ranks)) if len(self.draws) else None

    def improvement(self, low: float, high: float) -> IntervalEstimate:
        """By how much the loss falls from rank `low` to rank `high`."""
        (first, last), drawn = self.losses([low, high]), _curves(self.draws, [low, high])
        return IntervalEstimate(float(first - last), _interval(drawn[:, 0] - drawn[:, 1]))

    def parameters(self) -> dict[str, IntervalEstimate]:
        """a, b and c with their intervals."""
        values = zip("abc", (self.a, self.b, self.c), self.draws.T, strict=True)
        return {name: IntervalEstimate(value, _interval(drawn)) for name, value, drawn in values}


def fit(ranks: Sequence[int], losses: Sequence[Any] | np.ndarray, seed: int = 0) -> PowerLaw:
    """Fit the law by least squares: a and b >= 0 in closed form for every c of a grid, which closes in on the best c.

    losses: nats per token, [n] or [n, seeds] for n different ranks. Resamples (Efron 1979) are drawn over seeds, or over
    residuals where there is one seed or the curve misses the losses; `seed` decides them. In simulations of six ranks
    with one to three seeds their 95 % intervals covered 91 to 99 %. Raises UserError for fewer than three different ranks
    and for a loss that is not finite.
    """
    x, table = _checked(ranks, losses)
    means = table.mean(axis=1)
    best, rng = _least_squares(x, means[None])[0], np.random.default_rng(seed)
    fitted = _curves(best[None], x)[0]
    noise = _noise(table)
    misses = _misses(means - fitted, noise, table.shape[1], rng)
    draws = _over_residuals(means, fitted, rng) if misses or noise is None else _over_seeds(means, noise, rng)
    if noise is not None:
        draws = draws + _common(table, rng)
    found = _least_squares(x, draws) if len(draws) else np.zeros((0, 3))
    a, b, c = best.tolist()
    return PowerLaw(a, b, c, tuple(int(rank) for rank in x), found, misses)


def _checked(ranks: Sequence[int], losses: Sequence[Any] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks float64 [n] in ascending order, and their losses float64 [n, seeds]."""
    if len(set(ranks)) < max(3, len(ranks)):
        raise UserError(f"ranks {', '.join(map(str, ranks))}: a law needs at least three, each of them different")
    table = np.asarray(losses, np.float64).reshape(len(ranks), -1)
    for rank, row in zip(ranks, table, strict=True):
        if rank < 1 or not np.isfinite(row).all():
            raise UserError(f"rank {rank}: losses {row.tolist()}; ranks must be at least 1 and losses finite")
    order = np.argsort(ranks)
    return np.array(ranks, np.float64)[order], table[order]


def _curves(parameters: np.ndarray, ranks: Sequence[float] | np.ndarray) -> np.ndarray:
    """Losses [D, n] at ranks [n] of laws a, b, c [D, 3]."""
    a, b, c = parameters.T[..., None]
    return a + b * np.asarray(ranks, np.float64) ** -c


def _ends(drawn: np.ndarray) -> np.ndarray:
    tail = (1 - CONFIDENCE) / 2
    return np.quantile(drawn, [tail, 1 - tail], axis=0)


def _interval(drawn: np.ndarray) -> tuple[float, float] | None:
    if not len(drawn):
        return None
    low, high = _ends(drawn).tolist()
    return low, high


def _least_squares(ranks: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """a, b, c [D, 3] that are nearest to losses [D, n] at ranks [n]."""
    low, high = (np.full((len(losses), 1), math.log(end)) for end in EXPONENTS)
    centred, each = losses - losses.mean(axis=1, keepdims=True), np.arange(len(losses))
    laws = np.empty((len(losses), 3))
    for _ in range(ZOOMS):
        grid = low + (high - low) * np.linspace(0, 1, GRID)
        powers = np.exp(-np.exp(grid)[..., None] * np.log(ranks))  # [D, GRID, n], faster than a power
        x = powers - powers.mean(axis=2, keepdims=True)
        products = np.maximum(np.einsum("dgn,dn->dg", x, centred), 0)  # b >= 0
        best = (products**2 / np.square(x).sum(axis=2)).argmax(axis=1)  # what a regression on x explains
        low, high = (grid[each, np.clip(best + side, 0, GRID - 1)][:, None] for side in (-1, 1))
        b = products[each, best] / np.square(x[each, best]).sum(axis=1)
        a = losses.mean(axis=1) - b * powers[each, best].mean(axis=1)
        laws = np.stack([a, b, np.exp(grid[each, best])], axis=1)
    return laws


def _noise(table: np.ndarray) -> np.ndarray | None:
    """Deviations [n, seeds] of losses from their rank's mean, without what a seed does to all ranks alike.

    They are scaled up, because deviations from fitted means are smaller than those from true ones. None for one seed.
    """
    ranks, seeds = table.shape
    if seeds == 1:
        return None
    left = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
    return left * math.sqrt(table.size / ((ranks - 1) * (seeds - 1)))


def _misses(residuals: np.ndarray, noise: np.ndarray | None, seeds: int, rng: np.random.Generator) -> bool:
    """The F test for lack of fit (Draper and Smith 1998, "Applied Regression Analysis", section 2.1), by simulation."""
    spare = len(residuals) - 3
    if noise is None or spare == 0:
        return False
    ratio = np.square(residuals).sum() / spare / max(np.square(noise).mean() / seeds, 1e-16)
    return bool((rng.f(spare, (len(residuals) - 1) * (seeds - 1), 10_000) > ratio).mean() < DOUBT)


def _over_residuals(means: np.ndarray, fitted: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mean losses [D, n] with residuals from the law drawn anew, scaled up as the noise is; none for three ranks."""
    spare = len(means) - 3
    if not spare:
        return np.zeros((0, len(means)))
    residuals = (means - fitted) * math.sqrt(len(means) / spare)
    return fitted + _size(spare, rng) * rng.choice(residuals - residuals.mean(), (DRAWS, len(means)))


def _over_seeds(means: np.ndarray, noise: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mean losses [D, n] with each seed's deviation drawn anew."""
    spare = (noise.shape[0] - 1) * (noise.shape[1] - 1)
    return means + _size(spare, rng) * rng.choice(noise.ravel(), (DRAWS, *noise.shape)).mean(axis=2)


def _common(table: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What seeds do to all ranks alike, drawn anew, [D, 1]: it moves the law up and down and says nothing of its shape."""
    seeds = table.shape[1]
    shared = (table.mean(axis=0) - table.mean()) * math.sqrt(seeds / (seeds - 1))
    return _size(seeds - 1, rng) * rng.choice(shared, (DRAWS, seeds)).mean(axis=1, keepdims=True)


def _size(spare: int, rng: np.random.Generator) -> np.ndarray:
    """Factors [D, 1] that make drawn deviations as uncertain as Student's t with `spare` degrees of freedom: how large the
    deviations are is itself known from a few of them only."""
    return np.sqrt(spare / rng.chisquare(spare, (DRAWS, 1)))
