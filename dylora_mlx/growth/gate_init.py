"""Gate rows in closed form: ridge regression on per-skill feature statistics.

Each skill leaves its Gram matrix and feature sum. One-against-all ridge regression over all skills needs only their
sums, so the solution is exact and does not depend on the order in which skills came.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SHARPNESS = 12.0
"""Logits per unit of regression output: a token sure of its skill starts with about e^6 to 1 against the others."""
RIDGE = 1e-3
"""Ridge penalty, in mean eigenvalues of the pooled covariance."""


class FeatureStatistics(NamedTuple):
    """gram [D, D] = X^T X, total [D] = sum of rows, count = number of rows, of features X [n, D].

    float32, as a checkpoint keeps them, so that a resumed run goes on with the very same numbers.
    """

    gram: np.ndarray
    total: np.ndarray
    num_rows: float

    @classmethod
    def from_features(cls, features: np.ndarray) -> FeatureStatistics:
        sums = StatisticsAccumulator(features.shape[1])
        sums.add(features)
        return sums.statistics()

    def arrays(self) -> dict[str, np.ndarray]:
        return {"gram": self.gram, "total": self.total, "count": np.array([self.num_rows])}


class StatisticsAccumulator:
    """Statistics of features that come in parts, summed in float64."""

    def __init__(self, dims: int):
        self._gram, self._total, self._count = np.zeros((dims, dims)), np.zeros(dims), 0

    def add(self, features: np.ndarray) -> None:
        """Add features [n, D]."""
        x = features.astype(np.float64)
        self._gram += x.T @ x
        self._total += x.sum(0)
        self._count += len(x)

    def statistics(self) -> FeatureStatistics:
        return FeatureStatistics(self._gram.astype(np.float32), self._total.astype(np.float32), float(self._count))


def ridge_gate_row(own: Sequence[FeatureStatistics], others: Sequence[FeatureStatistics]) -> tuple[np.ndarray, float]:
    """Weight float64 [D] and bias of the row that answers 1 on `own` features and 0 on `others`.

    Every skill has the same weight, however many tokens it left. With no other skill the row is zero.
    """
    dims = len(own[0].total)
    if not others:
        return np.zeros(dims), 0.0
    means, covariance = [], np.zeros((dims, dims))
    groups = [*own, *others]
    for s in groups:
        means.append(s.total.astype(np.float64) / s.num_rows)
        covariance += s.gram.astype(np.float64) / s.num_rows / len(groups)
    targets = np.array([1.0] * len(own) + [0.0] * len(others))
    centre, level = np.mean(means, axis=0), targets.mean()
    covariance -= np.outer(centre, centre)
    moment = sum((t - level) * m for t, m in zip(targets, means, strict=True)) / len(groups)
    penalty = RIDGE * np.trace(covariance) / dims
    weight = np.linalg.solve(covariance + penalty * np.eye(dims), moment)
    return SHARPNESS * weight, SHARPNESS * (level - weight @ centre - 0.5)
