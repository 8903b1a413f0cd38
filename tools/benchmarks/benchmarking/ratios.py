"""Ratios of what two sides measured, with their intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Ratio of medians ours / theirs, and its 95% bootstrap interval."""
    rng, a, b = np.random.default_rng(0), np.array(ours), np.array(theirs)
    drawn = [np.median(rng.choice(a, len(a))) / np.median(rng.choice(b, len(b))) for _ in range(2000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"ratio": float(np.median(a) / np.median(b)), "low": float(low), "high": float(high)}


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Median of ours / theirs of the same turn, and its 95% bootstrap interval over turns."""
    rng, each = np.random.default_rng(0), np.array(ours) / np.array(theirs)
    drawn = np.median(rng.choice(each, (2000, len(each))), axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"ratio": float(np.median(each)), "low": float(low), "high": float(high)}
