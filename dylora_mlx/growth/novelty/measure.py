"""Novelty of a skill: its similarity to every library entry, with a bootstrap interval, and the limits it is judged by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dylora_mlx.config import GrowthConfig
from dylora_mlx.growth.library import Library, LibraryEntry
from dylora_mlx.growth.novelty import embedding, similarity
from dylora_mlx.growth.novelty.embedding import EmbeddingSpace
from dylora_mlx.growth.novelty.similarity import MeanState, Thresholds

MAX_LISTED = 64
"""Maximum number of similarities that a measurement lists, the largest ones: a decision must not grow with the library."""
MAX_RESAMPLED = 32
"""Maximum number of entries to bootstrap, the most similar ones.

In a larger library the maximum of a resample is almost always among them.
"""


class Novelty(NamedTuple):
    """Novelty measurement of a skill."""

    similarities: dict[str, float]
    """Corrected cosine to each library entry, or to the MAX_LISTED most similar ones, by skill."""
    score: float | None
    """Maximum or median of the similarities; None for an empty library."""
    interval: tuple[float, float] | None
    """Bootstrap interval of the score."""
    threshold: float
    """A skill with a lower score is novel, if nothing but similarity decides. With growth.threshold it is tau_k, otherwise
    the score at which both errors are equally likely."""
    nearest: str | None
    """Skill of the entry with the largest similarity; None for an empty library."""
    samples: int
    """Number of documents that were embedded."""
    limits: tuple[float, float] | None = None
    """Scores between which similarity cannot tell: new below, known at and above. None with a growth.threshold, which leaves
    open only what the interval leaves open."""

    @property
    def is_novel(self) -> bool:
        """Whether the score is below the threshold; always true for an empty library."""
        return self.score is None or self.score < self.threshold

    @property
    def is_undecided(self) -> bool:
        """Whether similarity alone cannot tell: the score lies between the limits, or the interval contains the threshold."""
        if self.score is None or self.interval is None:
            return False
        if self.limits is not None:
            return self.limits[0] <= self.score < self.limits[1]
        return self.interval[0] < self.threshold <= self.interval[1]


def measure_novelty(
    means: np.ndarray, library: Library, space: EmbeddingSpace, growth: GrowthConfig, seed: int
) -> Novelty:
    """Measure the novelty of a skill by comparing its document means, [n, D], with the library.

    The bootstrap interval resamples the documents of the skill and of the entries; its score is the same maximum or
    median. Resampled means are noisier than the original means, so their cosines are lower overall. They are therefore
    recentred on the score, on Fisher's z scale, where the variance of a cosine does not depend on its value.

    Args:
        means: Document means of the skill, [n, D], in the order of the source.
        library: Entries to compare with.
        space: Embedding space of the comparison.
        growth: Options of the score, the interval and the threshold.
        seed: Seed of the bootstrap.
    """
    entry_states = [entry_state(entry, space) for entry in library.entries]
    states = [each.mean for each in entry_states]
    limits = None if growth.threshold is not None else library_limits(library, entry_states, growth)
    threshold = limits.equal if limits is not None else fixed_threshold(growth, len(library))
    undecided = None if limits is None else (limits.new, limits.known)
    if not len(library):
        return Novelty({}, None, None, threshold, None, len(means), undecided)
    state = similarity.mean_state(means, space)
    # An estimate can exceed 1, which a similarity cannot.
    cosines = np.clip([similarity.corrected_cosine(state, other) for other in states], -1, 1)
    similarities = {entry.skill: float(cosine) for entry, cosine in zip(library.entries, cosines, strict=True)}
    summary = np.max if growth.similarity == "max" else np.median
    score, rng = float(summary(cosines)), np.random.default_rng(seed)
    chosen = _entries_to_resample(cosines, growth)
    resampled = _resampled_cosines(means, [library.entries[number] for number in chosen], space, growth.bootstrap, rng)
    corrections = [math.sqrt(_reliability(state) * _reliability(states[number])) for number in chosen]
    draws = summary(resampled / np.array(corrections)[:, None], axis=0)
    interval = _interval(score, draws, growth.confidence)
    nearest = max(similarities, key=lambda name: similarities[name])
    if len(similarities) > MAX_LISTED:
        listed = {library.entries[number].skill for number in np.argsort(-cosines)[:MAX_LISTED].tolist()}
        similarities = {name: value for name, value in similarities.items() if name in listed}
    return Novelty(similarities, score, interval, threshold, nearest, len(means), undecided)


def fixed_threshold(growth: GrowthConfig, entries: int) -> float:
    """Return tau_k = growth.threshold - growth.adaptive_delta * log(1 + k) for a library of k entries."""
    assert growth.threshold is not None
    return growth.threshold - growth.adaptive_delta * math.log1p(entries)


class EntryState(NamedTuple):
    """What similarities need of a library entry."""

    mean: MeanState
    halves: float | None
    """Corrected cosine of the halves of its documents; None for a single document."""


def entry_state(entry: LibraryEntry, space: EmbeddingSpace) -> EntryState:
    """Return the state of an entry in a space. It is computed again only when an arrival has moved the entry."""
    kept = space.memo.get(id(entry))
    if kept is None or kept[0] is not entry or kept[1] != entry.arrivals:
        state = EntryState(*similarity.mean_and_halves(entry.means, space, entry.centre))
        kept = space.memo[id(entry)] = (entry, entry.arrivals, state)
    return kept[2]


def library_limits(library: Library, states: Sequence[EntryState], growth: GrowthConfig) -> Thresholds:
    """Return the limits at the error rates of the config, from the library's skills and their states."""
    halves = [state.halves for state in states if state.halves is not None]
    nearest: list[float] = []
    if states:
        experts = np.array([entry.expert for entry in library.entries])
        # Skills of one expert are one kind, so they say nothing of how similar different skills are.
        others = np.where(
            experts[:, None] == experts, -np.inf, similarity.corrected_cosines([state.mean for state in states])
        )
        nearest = [float(value) for value in others.max(1) if np.isfinite(value)]
    return similarity.library_thresholds(halves, nearest, growth.false_new, growth.false_known)


def _reliability(state: MeanState) -> float:
    """Return the share of a mean's squared length that is not noise."""
    observed = float(state.mean @ state.mean)
    return state.squared_length / observed if observed else 1.0


def _resampled_cosines(
    means: np.ndarray, entries: Sequence[LibraryEntry], space: EmbeddingSpace, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """Return plain cosines of bootstrap means of the skill and of each entry, [entries, resamples]."""
    draws = space(embedding.bootstrap_means(means.astype(np.float64), resamples, rng))
    cosines = []
    for entry in entries:
        entry_means = entry.means.astype(np.float64)
        # Resample around the entry's centre, which later arrivals may have moved away from the mean of its documents.
        others = embedding.bootstrap_means(entry_means, resamples, rng) + (entry.centre - entry_means.mean(0))
        cosines.append(np.sum(draws * space(others), axis=1))
    return np.stack(cosines)


def _entries_to_resample(cosines: np.ndarray, growth: GrowthConfig) -> list[int]:
    """Return the indices of the entries to bootstrap: the MAX_RESAMPLED most similar ones, or all for a median."""
    if growth.similarity != "max" or len(cosines) <= MAX_RESAMPLED:
        return list(range(len(cosines)))
    return sorted(np.argsort(-cosines)[:MAX_RESAMPLED].tolist())


def _interval(score: float, draws: np.ndarray, confidence: float) -> tuple[float, float]:
    """Return the percentile interval of `draws`, moved on Fisher's z scale so that their median is the score."""
    tail = (1 - confidence) / 2
    z = similarity.fisher(draws)
    low, high = np.tanh(np.quantile(z, [tail, 1 - tail]) - np.median(z) + similarity.fisher(np.array(score)))
    # Fisher's z cuts a score near 1, which the interval holds all the same.
    return min(float(low), score), max(float(high), score)
