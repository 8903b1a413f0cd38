"""Similarity of two skills that does not depend on the base's scale or on the number of documents.

The mean over n documents is the skill's mean plus sampling noise, which lowers every cosine, the more the fewer
documents there are. The cosine is therefore divided by the reliability of both means (correction for attenuation,
Spearman 1904). Before that, means are centred on a broad reference text and whitened by the covariance of its
document means, so that directions count by how much documents differ in them, whatever the base.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np

from dylora_mlx.growth.novelty.embedding import Reference

LEAST_RELIABILITY = 0.05
"""Lower bound of a mean's reliability. A skill whose mean hardly differs from the reference's has an estimate near zero
or below, and the correction must not blow up."""
CEILING = 0.995
"""Corrected cosines are estimates and can exceed 1; they are cut here before Fisher's z."""

Verdict = Literal["new", "known", "undecided"]


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


class SkillSpace:
    """Maps document means to the centred and whitened mean state of a skill.

    `reference` holds the mean and the covariance of the document means of a broad text (not of its token states), and
    `whitening` is the multiple of the mean eigenvalue that is added to the covariance.
    """

    def __init__(self, reference: Reference, whitening: float):
        self._mean, self._whitener = reference.mean, reference.whitener(whitening)

    def __call__(self, means: np.ndarray) -> MeanState:
        """Return the mean state of documents [n, D], n at least 2."""
        documents = (means.astype(np.float64) - self._mean) @ self._whitener
        return MeanState(documents.mean(0), float(documents.var(0, ddof=1).sum()) / len(documents))


def corrected_cosine(first: MeanState, second: MeanState) -> float:
    """Return the estimated cosine of the true means of two skills. Noise can carry the estimate beyond 1; zero for a
    skill that does not differ from the reference at all."""
    lengths = np.sqrt(first.squared_length * second.squared_length)
    return float(first.mean @ second.mean / lengths) if lengths else 0.0


def halves_cosine(means: np.ndarray, space: SkillSpace) -> float:
    """Return the corrected cosine of the two halves of a skill's documents [n, D], which are in the order of the source.

    It is how similar another shard of the same source is: neighbours in a source are more alike than random documents.
    """
    return corrected_cosine(*(space(half) for half in np.array_split(means, 2)))


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

    def verdict(self, similarity: float) -> Verdict:
        """Judge a skill by its similarity to the nearest known one."""
        if similarity >= self.known:
            return "known"
        return "new" if similarity < self.new else "undecided"


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
    return Thresholds(min(same.quantile(missed), equal), max(different.quantile(1 - false), equal))


SAME, DIFFERENT = Scale(2.49, 0.66, 10), Scale(0.46, 0.28, 10)
"""What is assumed of every base before a library says more: measured with tools/benchmarks/similarity_matrix.py on 47
skills and three bases (the embedded one, SmolLM2 135M, Gemma 3 270M), whose means lie within 0.05 of each other. SAME is
of the halves of a skill in the order of its source, DIFFERENT of a new skill and the nearest of 1 to 12 known ones. They
count as ten observations each."""


def library_thresholds(halves: Iterable[float], nearest: Iterable[float], missed: float, false: float) -> Thresholds:
    """Return the limits for a library. Without entries they follow from SAME and DIFFERENT alone.

    Args:
        halves: `halves_cosine` of each entry's documents.
        nearest: similarity of each entry to the nearest other entry that is another skill.
        missed: share of known skills that may be called new.
        false: share of new skills that may be called known.
    """
    return thresholds(SAME.updated(halves), DIFFERENT.updated(nearest), missed, false)


def fisher(cosines: np.ndarray) -> np.ndarray:
    """Fisher's z transform of corrected cosines, cut at CEILING."""
    return np.arctanh(np.clip(cosines, -CEILING, CEILING))
