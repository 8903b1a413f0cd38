"""Ratios of two contenders' measurements, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Return the ratio of medians ours / theirs, and its 95% bootstrap interval."""
    rng, a, b = np.random.default_rng(0), np.array(ours), np.array(theirs)
    resampled = [np.median(rng.choice(a, len(a))) / np.median(rng.choice(b, len(b))) for _ in range(2000)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {"ratio": float(np.median(a) / np.median(b)), "low": float(low), "high": float(high)}


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Return the median over turns of ours / theirs within a turn, and its 95% bootstrap interval.

    Pairing cancels changes of the machine's speed from turn to turn.
    """
    rng, ratios = np.random.default_rng(0), np.array(ours) / np.array(theirs)
    resampled = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {"ratio": float(np.median(ratios)), "low": float(low), "high": float(high)}
