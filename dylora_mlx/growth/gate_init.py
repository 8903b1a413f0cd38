"""Closed-form initialisation of gate rows: ridge regression on feature statistics of each skill.

Each skill leaves its Gram matrix and its feature sum. One-vs-rest ridge regression over all skills needs only these
sums. The solution is therefore exact and does not depend on the order in which the skills came.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SHARPNESS = 12.0
"""Logits per unit of regression output: a token that clearly belongs to its skill starts at odds of about e^6."""
RIDGE = 1e-3
"""Ridge penalty, as a multiple of the mean eigenvalue of the pooled covariance."""


class FeatureStatistics(NamedTuple):
    """Sufficient statistics of router features X [n, D] for ridge regression.

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


def ridge_gate_row(
    positives: Sequence[FeatureStatistics], others: Sequence[FeatureStatistics]
) -> tuple[np.ndarray, float]:
    """Return weight (float64 [D]) and bias of a gate row fitted to 1 on `positives` and 0 on `others`.

    Every skill has the same weight, regardless of its number of tokens. Without `others` the row is zero.
    """
    dims = len(positives[0].total)
    if not others:
        return np.zeros(dims), 0.0
    means, covariance = [], np.zeros((dims, dims))
    groups = [*positives, *others]
    # Dividing by num_rows gives each skill the same weight. Float64, because the squared mean is subtracted below.
    for s in groups:
        means.append(s.total.astype(np.float64) / s.num_rows)
        covariance += s.gram.astype(np.float64) / s.num_rows / len(groups)
    targets = np.array([1.0] * len(positives) + [0.0] * len(others))
    centre, level = np.mean(means, axis=0), targets.mean()
    covariance -= np.outer(centre, centre)
    moment = sum((t - level) * m for t, m in zip(targets, means, strict=True)) / len(groups)
    penalty = RIDGE * np.trace(covariance) / dims
    weight = np.linalg.solve(covariance + penalty * np.eye(dims), moment)
    # Subtracting 0.5 maps the regression's decision boundary between 0 and 1 to a logit of zero.
    return SHARPNESS * weight, SHARPNESS * (level - weight @ centre - 0.5)
