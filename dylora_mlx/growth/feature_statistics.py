"""Statistics of the router's features: what each skill leaves behind to fit gate rows, without its text.

The sums over all of a skill's tokens give means and covariances. Linear discriminant analysis (Fisher 1936; Hastie et
al. 2009, section 4.3) needs no more than these, so its rows are exact and do not depend on the order of the skills.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx.model.routing.router import Gate

SHRINKAGE = 0.03
"""Added to the variance of every direction, as a multiple of the mean variance. On the embedded base
held-out cross-entropy is flat from 0.001 to 0.03 and rises above it."""
UNSEEN = 1e-3
"""Prior of an expert without any skill, such as the null expert of a run without a base skill."""


class FeatureStatistics(NamedTuple):
    """Sufficient statistics of router features X [n, D]: what their mean and covariance need.

    The arrays are float32, the dtype of the checkpoint, so that a resumed run computes with the same numbers.
    """

    gram: np.ndarray
    """X^T X, [D, D]."""
    total: np.ndarray
    """Sum of the rows of X, [D]."""
    num_rows: float
    """n, the number of rows. A checkpoint stores it as "count"."""

    @classmethod
    def from_features(cls, features: np.ndarray) -> FeatureStatistics:
        """Compute the statistics of features [n, D]."""
        sums = StatisticsAccumulator(features.shape[1])
        sums.add(features)
        return sums.statistics()

    @property
    def mean(self) -> np.ndarray:
        """Mean of the features, float64 [D]."""
        return self.total.astype(np.float64) / self.num_rows

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the statistics as named arrays for a checkpoint."""
        return {"gram": self.gram, "total": self.total, "count": np.array([self.num_rows])}


class StatisticsAccumulator:
    """Accumulate feature statistics batch by batch, in float64."""

    def __init__(self, dims: int):
        self._gram, self._total, self._count = np.zeros((dims, dims)), np.zeros(dims), 0

    def add(self, features: np.ndarray) -> None:
        """Add features [n, D]."""
        x = features.astype(np.float64)
        self._gram += x.T @ x
        self._total += x.sum(0)
        self._count += len(x)

    def statistics(self) -> FeatureStatistics:
        """Return the statistics of all features so far, rounded to float32."""
        return FeatureStatistics(self._gram.astype(np.float32), self._total.astype(np.float32), float(self._count))


class PooledStatistics(NamedTuple):
    """Statistics of some skills together, each with the same weight: all that a discriminant needs of them."""

    means: np.ndarray
    """Mean of each skill's features, float64 [skills, D]."""
    second_moment: np.ndarray
    """Mean over skills of E[x x^T], float64 [D, D]."""

    @classmethod
    def of(cls, statistics: Sequence[FeatureStatistics]) -> PooledStatistics:
        """Pool the statistics of at least one skill."""
        total = sum((second_moment(each) for each in statistics), np.zeros(statistics[0].gram.shape))
        return cls(np.stack([each.mean for each in statistics]), total / len(statistics))

    @classmethod
    def of_features(cls, skills: Sequence[np.ndarray]) -> PooledStatistics:
        """Pool features [n, D] of at least one skill, which may be few of many skills: no matrix for each of them."""
        weights = np.concatenate([np.full(len(each), 1 / len(each) / len(skills)) for each in skills])
        features = np.concatenate(skills).astype(np.float64)
        means = np.stack([each.astype(np.float64).mean(0) for each in skills])
        return cls(means, (features * weights[:, None]).T @ features)

    def with_skill(self, statistics: FeatureStatistics) -> PooledStatistics:
        """Return the statistics with one more skill."""
        count = len(self.means)
        total = self.second_moment * count + second_moment(statistics)
        return PooledStatistics(np.concatenate([self.means, statistics.mean[None]]), total / (count + 1))


def second_moment(statistics: FeatureStatistics) -> np.ndarray:
    """Return E[x x^T], float64 [D, D]."""
    return statistics.gram.astype(np.float64) / statistics.num_rows


class FeatureScale(NamedTuple):
    """Mean and standard deviation of the router's features in each dimension, to standardise them.

    Gate rows are stored for raw features. They are fitted and trained for standardised ones, so that penalties and
    learning rates mean the same on every base.
    """

    mean: np.ndarray
    """float32 [D]."""
    std: np.ndarray
    """float32 [D], above 0."""

    @classmethod
    def pooled(cls, statistics: PooledStatistics) -> FeatureScale:
        """Return mean and standard deviation over the features of some skills, each with the same weight."""
        mean, square = statistics.means.mean(0), np.diagonal(statistics.second_moment)
        # Rounding can make the variance of a constant feature negative; the floor keeps the division harmless.
        std = np.sqrt(np.maximum(square - mean**2, 1e-12)) + 1e-6
        return cls(mean.astype(np.float32), std.astype(np.float32))

    def standardised(self, features: np.ndarray) -> np.ndarray:
        """Return features [..., D], float32, with mean 0 and variance 1 in each dimension."""
        return ((features - self.mean) / self.std).astype(np.float32)

    def for_standardised(self, gate: Gate) -> Gate:
        """Return rows for standardised features that give the same logits as `gate` gives for raw features."""
        return Gate(gate.weight * mx.array(self.std), gate.bias + gate.weight @ mx.array(self.mean))

    def gradient_for_standardised(self, gradient: Gate) -> Gate:
        """Return the gradient with respect to `for_standardised(gate)`, given that with respect to `gate`."""
        offset = gradient.bias[:, None] * mx.array(self.mean)
        return Gate((gradient.weight - offset) / mx.array(self.std), gradient.bias)

    def for_raw(self, gate: Gate) -> Gate:
        """Return rows for raw features that give the same logits as `gate` gives for standardised features."""
        weight = gate.weight / mx.array(self.std)
        return Gate(weight, gate.bias - weight @ mx.array(self.mean))


def discriminant_rows(
    statistics: PooledStatistics, owners: Sequence[int], experts: int, scale: FeatureScale
) -> tuple[np.ndarray, np.ndarray]:
    """Return weight [E, D] and bias [E], float64, of the linear discriminant for standardised features.

    Every skill has the same weight, whatever its number of tokens. The logits are those of Gaussian features with one
    covariance for all experts. They are too sharp where tokens of a document depend on each other: divide them by a
    temperature.

    Args:
        statistics: statistics of raw features.
        owners: expert_id that each skill belongs to.
        experts: E, the number of rows. An expert without a skill gets the centre of the others and a prior of UNSEEN.
        scale: mean and standard deviation that standardise the features.
    """
    mean, std = scale.mean.astype(np.float64), scale.std.astype(np.float64)
    means, skills = (statistics.means - mean) / std, len(owners)
    counts = np.bincount(owners, minlength=experts).astype(np.float64)
    centres = np.zeros((experts, len(mean)))
    np.add.at(centres, np.array(owners), means / counts[owners][:, None])
    # The covariance within skills, and that of the centres of skills that share an expert.
    within = statistics.second_moment - statistics.means.T @ statistics.means / skills
    offsets = means - centres[owners]
    covariance = within / np.outer(std, std) + offsets.T @ offsets / skills
    covariance += SHRINKAGE * np.trace(covariance) / len(mean) * np.eye(len(mean))
    seen = counts > 0
    centres[~seen] = centres[seen].mean(0)
    weight = np.linalg.solve(covariance, centres.T).T
    prior = np.where(seen, counts / skills, UNSEEN)
    return weight, np.log(prior) - 0.5 * (weight * centres).sum(1)
