"""Novelty of a skill: cosine similarity to every library entry, with a bootstrap interval, against a threshold."""

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
"""Random splits of each known skill's documents into halves that calibrate the threshold."""
MAX_RESAMPLED = 32
"""Maximum number of entries to bootstrap, the most similar ones.

In a larger library the maximum of a resample is almost always among them.
"""


class Novelty(NamedTuple):
    """Novelty measurement of a skill."""

    similarities: dict[str, float]
    """Cosine to each library entry, by skill."""
    score: float | None
    """Maximum or median of the similarities; None for an empty library."""
    interval: tuple[float, float] | None
    """Bootstrap interval of the score."""
    threshold: float
    """tau_k: a skill with a lower score is novel."""
    nearest: str | None
    """Skill of the entry with the largest cosine; None for an empty library."""
    samples: int
    """Number of documents that were embedded."""

    @property
    def is_novel(self) -> bool:
        """Whether the score is below the threshold; always true for an empty library."""
        return self.score is None or self.score < self.threshold

    @property
    def is_undecided(self) -> bool:
        """Whether the interval contains the threshold."""
        return self.interval is not None and self.interval[0] < self.threshold <= self.interval[1]


def novelty_threshold(growth: GrowthConfig, library: Library, space: EmbeddingSpace, rng: np.random.Generator) -> float:
    """Return tau_k for a library of k skills.

    It is calibrated if growth.false_alarm is set and the library is not empty. Otherwise it is
    growth.threshold - growth.adaptive_delta * log(1 + k).
    """
    if growth.false_alarm is not None and len(library):
        return calibrated_threshold(library, space, growth.false_alarm, rng)
    return growth.threshold - growth.adaptive_delta * math.log1p(len(library))


def calibrated_threshold(
    library: Library, space: EmbeddingSpace, false_alarm: float, rng: np.random.Generator
) -> float:
    """Return the cosine that two random halves of a known skill fall below with probability `false_alarm`.

    A normal distribution is fitted to Fisher's z over all entries and splits, because few entries do not give an
    empirical tail.
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
    """Measure the novelty of a skill by comparing its document means, [n, D], with the library.

    The bootstrap interval resamples the documents of the skill and of the entries; its score is the same maximum or
    median. Resampled means are noisier than the original means, so their cosines are lower overall. They are therefore
    recentred on the score, on Fisher's z scale, where the variance of a cosine does not depend on its value.

    Args:
        means: Document means of the skill, [n, D].
        library: Entries to compare with.
        space: Embedding space of the comparison.
        growth: Options of the score, the interval and the threshold.
        seed: Seed of the bootstrap and of the calibration.
    """
    rng = np.random.default_rng(seed)
    if not len(library):
        return Novelty({}, None, None, novelty_threshold(growth, library, space, rng), None, len(means))
    means = means.astype(np.float64)
    summary = np.max if growth.similarity == "max" else np.median
    embedded, draws = space(means.mean(0)), space(embedding.bootstrap_means(means, growth.bootstrap, rng))
    entry_cosines = space(np.stack([entry.centre for entry in library.entries])) @ embedded
    cosines = {entry.skill: float(cosine) for entry, cosine in zip(library.entries, entry_cosines, strict=True)}
    resampled = []
    for entry in (library.entries[number] for number in _entries_to_resample(entry_cosines, growth)):
        entry_means = entry.means.astype(np.float64)
        # Resample around the entry's centre, which later arrivals may have moved away from the mean of its documents.
        others = embedding.bootstrap_means(entry_means, growth.bootstrap, rng) + (entry.centre - entry_means.mean(0))
        resampled.append(np.sum(draws * space(others), axis=1))
    score = float(summary(entry_cosines))
    interval = _interval(score, summary(np.stack(resampled), axis=0), growth.confidence)
    nearest = max(cosines, key=lambda name: cosines[name])
    tau = novelty_threshold(growth, library, space, rng)
    return Novelty(cosines, score, interval, tau, nearest, len(means))


def _entries_to_resample(cosines: np.ndarray, growth: GrowthConfig) -> list[int]:
    """Return the indices of the entries to bootstrap: the MAX_RESAMPLED most similar ones, or all for a median."""
    if growth.similarity != "max" or len(cosines) <= MAX_RESAMPLED:
        return list(range(len(cosines)))
    return sorted(np.argsort(-cosines)[:MAX_RESAMPLED].tolist())


def _fisher(cosines: np.ndarray) -> np.ndarray:
    """Fisher's z transform, with cosines clipped so that -1 and 1 stay finite."""
    return np.arctanh(np.clip(cosines, -1 + 1e-9, 1 - 1e-9))


def _interval(score: float, draws: np.ndarray, confidence: float) -> tuple[float, float]:
    """Return the percentile interval of `draws`, moved on Fisher's z scale so that their median is the score."""
    tail = (1 - confidence) / 2
    z = _fisher(draws)
    low, high = np.quantile(z, [tail, 1 - tail]) - np.median(z) + _fisher(np.array(score))
    return float(np.tanh(low)), float(np.tanh(high))
