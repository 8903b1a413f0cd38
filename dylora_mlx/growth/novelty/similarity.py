"""Similarity of two skills that does not depend on the base's scale or on the number of documents.

The mean over n documents is the skill's mean plus sampling noise, which lowers every cosine, the more the fewer
documents there are. The cosine is therefore divided by the reliability of both means (correction for attenuation,
Spearman 1904). Before that, means are centred on a broad reference text and whitened by the covariance of its
document means, so that directions count by how much documents differ in them, whatever the base.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dylora_mlx.growth.novelty.embedding import EmbeddingSpace

LEAST_RELIABILITY = 0.05
"""Lower bound of a mean's reliability. A skill whose mean hardly differs from the reference's has an estimate near zero
or below, and the correction must not blow up."""
CEILING = 0.995
"""Corrected cosines are estimates and can exceed 1; they are cut here before Fisher's z."""


class MeanState(NamedTuple):
    """Mean state of a skill, centred and whitened, with the noise of its estimate."""

    mean: np.ndarray
    """Float64 [D]."""
    noise: float
    """Expected squared length of the sampling error of `mean`."""

    @property
    def squared_length(self) -> float:
        """Squared length of the true mean, without the noise."""
        observed = float(self.mean @ self.mean)
        return max(observed - self.noise, LEAST_RELIABILITY * observed)


def mean_state(means: np.ndarray, space: EmbeddingSpace, centre: np.ndarray | None = None) -> MeanState:
    """Return the mean state of documents [n, D].

    The noise is unknown, and counts as zero, for a single document and in the space of a projection head.

    Args:
        means: Document means, [n, D].
        space: Embedding space.
        centre: Mean state [D] to take instead of the documents' mean: later arrivals may have moved a skill's centre.
    """
    return mean_and_halves(means, space, centre)[0]


def mean_and_halves(
    means: np.ndarray, space: EmbeddingSpace, centre: np.ndarray | None = None
) -> tuple[MeanState, float | None]:
    """Return the mean state of documents [n, D], and the corrected cosine of their halves, None for a single document.

    The documents are in the order of the source, so the cosine is how similar another shard of it is: neighbours in a source are
    more alike than random documents. Arguments as for `mean_state`.
    """
    if space.has_head:
        parts = [means, *np.array_split(means, 2)] if len(means) > 1 else [means]
        states = [MeanState(space(part.astype(np.float64).mean(0)), 0.0) for part in parts]
        moved = states[0] if centre is None else MeanState(space(centre), 0.0)
    else:
        whitened = space.whiten(means)
        parts = [whitened, *np.array_split(whitened, 2)] if len(means) > 1 else [whitened]
        states = [_state_of(part) for part in parts]
        moved = states[0] if centre is None else MeanState(space.whiten(centre), states[0].noise)
    return moved, corrected_cosine(*states[1:]) if len(states) > 1 else None


def _state_of(whitened: np.ndarray) -> MeanState:
    noise = float(whitened.var(0, ddof=1).sum()) / len(whitened) if len(whitened) > 1 else 0.0
    return MeanState(whitened.mean(0), noise)


def corrected_cosine(first: MeanState, second: MeanState) -> float:
    """Return the estimated cosine of the true means of two skills. Noise can carry the estimate beyond 1; zero for a
    skill that does not differ from the reference at all."""
    lengths = np.sqrt(first.squared_length * second.squared_length)
    return float(first.mean @ second.mean / lengths) if lengths else 0.0


def corrected_cosines(states: Sequence[MeanState]) -> np.ndarray:
    """Return the corrected cosine of every pair of k mean states, float64 [k, k]."""
    means = np.stack([state.mean for state in states])
    lengths = np.sqrt([state.squared_length for state in states])
    products = np.outer(lengths, lengths)
    return np.divide(means @ means.T, products, out=np.zeros_like(products), where=products > 0)


class Scale(NamedTuple):
    """Logistic distribution of corrected cosines on Fisher's z scale, and how many observations it counts for (weight).

    Its tails are heavier than a normal distribution's, which promised too low error rates.
    """

    mean: float
    std: float
    weight: float

    def updated(self, cosines: Iterable[float]) -> Scale:
        """Return the distribution after more observations, each of weight 1."""
        z = fisher(np.array([*cosines], np.float64))
        if not len(z):
            return self
        weight = self.weight + len(z)
        mean = (self.weight * self.mean + z.sum()) / weight
        squares = self.weight * (self.std**2 + self.mean**2) + (z**2).sum()
        return Scale(float(mean), float(np.sqrt(max(squares / weight - mean**2, 0))), weight)

    def quantile(self, probability: float) -> float:
        """Return the corrected cosine below which the distribution has this probability."""
        return float(np.tanh(self.mean + math.sqrt(3) / math.pi * math.log(probability / (1 - probability)) * self.std))


class Thresholds(NamedTuple):
    """Limits between new, undecided and known skills."""

    new: float
    """A skill with a lower similarity is new."""
    known: float
    """A skill with at least this similarity is known."""
    equal: float
    """Similarity at which both errors are equally likely, for a decision without other evidence."""


def thresholds(same: Scale, different: Scale, missed: float, false: float) -> Thresholds:
    """Return the limits at stated error rates.

    Where the distributions overlap too much for one limit to meet both rates, skills between the two limits are
    undecided. Otherwise there is one limit, at which both errors are equally likely.

    Args:
        same: similarities of a known skill to its own entry.
        different: similarities of a new skill to the nearest entry.
        missed: share of known skills that may be called new.
        false: share of new skills that may be called known.
    """
    stds = same.std + different.std
    equal = float(np.tanh((same.mean * different.std + different.mean * same.std) / stds))
    return Thresholds(min(same.quantile(missed), equal), max(different.quantile(1 - false), equal), equal)


SAME, DIFFERENT = Scale(2.49, 0.66, 10), Scale(0.46, 0.28, 10)
"""What is assumed of every base before a library says more: measured with tools/benchmarks/similarity_matrix.py on 47
skills and three bases (the embedded one, SmolLM2 135M, Gemma 3 270M), whose means lie within 0.05 of each other. SAME is
of the halves of a skill in the order of its source, DIFFERENT of a new skill and the nearest of 1 to 12 known ones. They
count as ten observations each."""


def library_thresholds(halves: Iterable[float], nearest: Iterable[float], missed: float, false: float) -> Thresholds:
    """Return the limits for a library. Without entries they follow from SAME and DIFFERENT alone.

    Args:
        halves: corrected cosine of the halves of each entry's documents.
        nearest: similarity of each entry to the nearest other entry that is another skill.
        missed: share of known skills that may be called new.
        false: share of new skills that may be called known.
    """
    return thresholds(SAME.updated(halves), DIFFERENT.updated(nearest), missed, false)


def fisher(cosines: np.ndarray) -> np.ndarray:
    """Fisher's z transform of corrected cosines, cut at CEILING."""
    return np.arctanh(np.clip(cosines, -CEILING, CEILING))
