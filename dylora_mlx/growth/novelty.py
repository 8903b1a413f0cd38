"""How new a skill is: its cosine to every library entry, with a bootstrap interval, against a threshold."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from dylora_mlx.config import Growth
from dylora_mlx.growth import embedding
from dylora_mlx.growth.embedding import Reference
from dylora_mlx.growth.library import Library


class Novelty(NamedTuple):
    """What was measured of a skill.

    similarities: cosine to each library entry, by skill; score: their maximum or median; interval: its bootstrap
    interval; threshold: tau_k; nearest: the entry with the largest cosine (None for an empty library).
    """

    similarities: dict[str, float]
    score: float | None
    interval: tuple[float, float] | None
    threshold: float
    nearest: str | None
    samples: int

    @property
    def novel(self) -> bool:
        """Whether the score lies below the threshold; a first skill always is."""
        return self.score is None or self.score < self.threshold

    @property
    def undecided(self) -> bool:
        """Whether the interval holds the threshold."""
        return self.interval is not None and self.interval[0] < self.threshold <= self.interval[1]


def threshold(growth: Growth, entries: int) -> float:
    """tau_k = threshold - adaptive_delta * log(1 + k)."""
    return growth.threshold - growth.adaptive_delta * math.log1p(entries)


def measure(means: np.ndarray, library: Library, reference: Reference, growth: Growth, seed: int) -> Novelty:
    """Compare document means [n, D] with the library.

    The interval resamples the documents of both sides; its score is the same maximum or median. Resampled means are
    noisier than the means they come from, so their cosines lie lower as a whole: they are moved back around the score,
    on Fisher's z scale, where a cosine's spread does not depend on its size.
    """
    tau = threshold(growth, len(library))
    if not len(library):
        return Novelty({}, None, None, tau, None, len(means))
    rng = np.random.default_rng(seed)
    whitener = reference.whitener(growth.whitening)
    summary = np.max if growth.similarity == "max" else np.median
    own = embedding.embed(means.mean(0), reference, whitener)
    draws = embedding.embed(embedding.resampled(means, growth.bootstrap, rng), reference, whitener)
    cosines, resampled = {}, []
    for entry in library.entries:
        theirs = entry.means.astype(np.float64)
        cosines[entry.skill] = float(own @ embedding.embed(theirs.mean(0), reference, whitener))
        other = embedding.embed(embedding.resampled(theirs, growth.bootstrap, rng), reference, whitener)
        resampled.append(np.sum(draws * other, axis=1))
    score = float(summary(list(cosines.values())))
    interval = _interval(score, summary(np.stack(resampled), axis=0), growth.confidence)
    nearest = max(cosines, key=lambda name: cosines[name])
    return Novelty(cosines, score, interval, tau, nearest, len(means))


def _interval(score: float, draws: np.ndarray, confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    z = np.arctanh(np.clip(draws, -1 + 1e-9, 1 - 1e-9))
    low, high = np.quantile(z, [tail, 1 - tail]) - np.median(z) + np.arctanh(np.clip(score, -1 + 1e-9, 1 - 1e-9))
    return float(np.tanh(low)), float(np.tanh(high))
