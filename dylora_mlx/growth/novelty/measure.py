"""How new a skill is: its cosine to every library entry, with a bootstrap interval, against a threshold."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from dylora_mlx.config import GrowthConfig
from dylora_mlx.growth.library import Library
from dylora_mlx.growth.novelty import embedding
from dylora_mlx.growth.novelty.embedding import EmbeddingSpace

HALVINGS = 20
"""Random splits of each known skill's documents, to calibrate the threshold."""
MAX_RESAMPLED = 32
"""Entries of a larger library whose intervals are drawn: the maximum is among them in every draw but for chance."""


class Novelty(NamedTuple):
    """How new a skill is."""

    similarities: dict[str, float]
    """Cosine to each library entry, by skill."""
    score: float | None
    """Their maximum or median; None for an empty library."""
    interval: tuple[float, float] | None
    """Bootstrap interval of the score."""
    threshold: float
    """tau_k."""
    nearest: str | None
    """The entry with the largest cosine; None for an empty library."""
    samples: int
    """Documents that were embedded."""

    @property
    def is_novel(self) -> bool:
        """Whether the score lies below the threshold; a first skill always is."""
        return self.score is None or self.score < self.threshold

    @property
    def is_undecided(self) -> bool:
        """Whether the interval holds the threshold."""
        return self.interval is not None and self.interval[0] < self.threshold <= self.interval[1]


def novelty_threshold(growth: GrowthConfig, library: Library, space: EmbeddingSpace, rng: np.random.Generator) -> float:
    """tau_k for a library of k skills: calibrated if growth.false_alarm is set, else threshold - delta * log(1 + k)."""
    if growth.false_alarm is not None and len(library):
        return calibrated_threshold(library, space, growth.false_alarm, rng)
    return growth.threshold - growth.adaptive_delta * math.log1p(len(library))


def calibrated_threshold(
    library: Library, space: EmbeddingSpace, false_alarm: float, rng: np.random.Generator
) -> float:
    """The cosine that two random halves of a known skill stay below in a share `false_alarm` of cases.

    A normal distribution of Fisher's z over all entries and splits, because its tail is wanted with few entries.
    """
    cosines = []
    for entry in library.entries:
        means = entry.means.astype(np.float64)
        for _ in range(HALVINGS):
            order = rng.permutation(len(means))
            halves = [space(means[half].mean(0)) for half in np.array_split(order, 2)]
            cosines.append(float(halves[0] @ halves[1]))
    z = _fisher(np.array(cosines))
    return float(np.tanh(z.mean() + NormalDist().inv_cdf(false_alarm) * z.std()))


def measure_novelty(
    means: np.ndarray, library: Library, space: EmbeddingSpace, growth: GrowthConfig, seed: int
) -> Novelty:
    """Compare document means [n, D] with the library.

    The interval resamples the documents of both sides; its score is the same maximum or median. Resampled means are
    noisier than the means they come from, so their cosines lie lower as a whole: they are moved back around the score,
    on Fisher's z scale, where a cosine's spread does not depend on its size.
    """
    rng = np.random.default_rng(seed)
    if not len(library):
        return Novelty({}, None, None, novelty_threshold(growth, library, space, rng), None, len(means))
    means = means.astype(np.float64)
    summary = np.max if growth.similarity == "max" else np.median
    own, draws = space(means.mean(0)), space(embedding.bootstrap_means(means, growth.bootstrap, rng))
    found = space(np.stack([entry.centre for entry in library.entries])) @ own
    cosines = {entry.skill: float(cosine) for entry, cosine in zip(library.entries, found, strict=True)}
    resampled = []
    for entry in (library.entries[number] for number in _resampled(found, growth)):
        theirs = entry.means.astype(np.float64)
        others = embedding.bootstrap_means(theirs, growth.bootstrap, rng) + (entry.centre - theirs.mean(0))
        resampled.append(np.sum(draws * space(others), axis=1))
    score = float(summary(found))
    interval = _interval(score, summary(np.stack(resampled), axis=0), growth.confidence)
    nearest = max(cosines, key=lambda name: cosines[name])
    tau = novelty_threshold(growth, library, space, rng)
    return Novelty(cosines, score, interval, tau, nearest, len(means))


def _resampled(cosines: np.ndarray, growth: GrowthConfig) -> list[int]:
    """The entries whose documents are drawn again: of a large library those that may be the nearest; a median needs all."""
    if growth.similarity != "max" or len(cosines) <= MAX_RESAMPLED:
        return list(range(len(cosines)))
    return sorted(np.argsort(-cosines)[:MAX_RESAMPLED].tolist())


def _fisher(cosines: np.ndarray) -> np.ndarray:
    return np.arctanh(np.clip(cosines, -1 + 1e-9, 1 - 1e-9))


def _interval(score: float, draws: np.ndarray, confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    z = _fisher(draws)
    low, high = np.quantile(z, [tail, 1 - tail]) - np.median(z) + _fisher(np.array(score))
    return float(np.tanh(low)), float(np.tanh(high))
