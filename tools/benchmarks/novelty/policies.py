"""Policies: functions that return a verdict on document means, given the context. They call the package's policies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from dylora_mlx.config import GrowthConfig
from dylora_mlx.growth.decide import policy
from dylora_mlx.growth.decide.bandit import Bandit
from dylora_mlx.growth.library import Library
from dylora_mlx.growth.novelty.embedding import EmbeddingSpace, normalize
from dylora_mlx.growth.novelty.measure import measure_novelty
from dylora_mlx.growth.novelty.split import find_parts
from novelty.probing import Lab, TrainingDocuments

EARLIER = (0.85, 0.75)
"""Similarity thresholds of the earlier attempt: the first, and the lowered one."""
THRESHOLD, ADAPTIVE_DELTA = 0.75, 0.02
"""`growth.threshold` and `growth.adaptive_delta` of the fixed and of the adaptive threshold."""


class Context(NamedTuple):
    """Information that policies have at an arrival."""

    library: Library
    """The skills so far."""
    space: EmbeddingSpace
    """Space in which skills are compared."""
    seed: int
    texts: Sequence[str] = ()
    """Documents of the arrival, in the order of their means."""
    trained_on: Mapping[str, TrainingDocuments] = MappingProxyType({})
    """Documents that each expert was trained on, by the name of its library entry."""


class Verdict(NamedTuple):
    """Decision of a policy on an arrival. Field names are keys of the JSON file."""

    novel: bool
    """Whether the arrival is called new."""
    nearest: str | None
    """Name of the most similar library entry."""
    score: float | None
    """Similarity (cosine) that was compared with the threshold."""
    probed: bool = False
    """Whether losses were measured for the decision."""


Policy = Callable[[np.ndarray, Context], Verdict]
"""Returns the verdict on document means [n, D]."""
Splitter = Callable[[np.ndarray, list[np.ndarray], Context], np.ndarray]
"""Returns the part of each document, int64 [n], from document means [n, D] and token ids."""


def by_novelty(growth: GrowthConfig) -> Policy:
    """Return a policy that applies the package's novelty measurement with these settings."""

    def decide(means: np.ndarray, context: Context) -> Verdict:
        novelty = measure_novelty(means, context.library, context.space, growth, context.seed)
        return Verdict(novelty.is_novel, novelty.nearest, novelty.score)

    return decide


def by_evidence(growth: GrowthConfig, lab: Lab, rule: str, learned: tuple[Bandit | None, str] = (None, "")) -> Policy:
    """Return a policy that applies one of the package's policies, with measured losses as evidence.

    The evidence has the losses of the experts of the nearest skills and of a trial expert.

    Args:
        growth: Settings.
        lab: Trains the experts.
        rule: Name of the package's policy.
        learned: The trained bandit, or None and the reason why it is not trusted.
    """

    def decide(means: np.ndarray, context: Context) -> Verdict:
        novelty = measure_novelty(means, context.library, context.space, growth, context.seed)
        situation, evidence = lab.arrived(novelty, context.texts, context.trained_on, context.seed)
        situation = situation._replace(bandit=learned[0], doubt=learned[1])
        verdict = policy.POLICIES[rule](situation, growth, evidence)
        return Verdict(verdict.novel, novelty.nearest, novelty.score, verdict.existing is not None)

    return decide


def by_raw_means(threshold: float) -> Policy:
    """Return the policy of the earlier attempt: cosines of raw means of the last hidden states."""

    def decide(means: np.ndarray, context: Context) -> Verdict:
        embedding = normalize(means.astype(np.float64).mean(0))
        cosines = {
            entry.skill: float(embedding @ normalize(entry.means.astype(np.float64).mean(0)))
            for entry in context.library.entries
        }
        nearest = max(cosines, key=lambda name: cosines[name])
        return Verdict(cosines[nearest] < threshold, nearest, cosines[nearest])

    return decide


def policies(
    growth: GrowthConfig, lab: Lab | None, learned: tuple[Bandit | None, str] | None = None
) -> dict[str, Policy]:
    """Return the policies by name.

    The probe needs a lab, and the bandit also needs to be trusted; otherwise it would decide as the probe does.
    """
    # These policies do not use the bootstrap interval: take few resamples.
    plain = replace(growth, bootstrap=50)
    by_name = {
        "threshold": by_novelty(plain),
        "fixed": by_novelty(replace(plain, threshold=THRESHOLD)),
        "adaptive": by_novelty(replace(plain, threshold=THRESHOLD, adaptive_delta=ADAPTIVE_DELTA)),
    }
    if lab is not None and learned is not None and learned[0] is not None:
        by_name = {"bandit": by_evidence(growth, lab, "bandit", learned), **by_name}
    if lab is not None:
        by_name = {"probe (default)": by_evidence(growth, lab, "probe"), **by_name}
    return by_name | {f"raw means, {threshold}": by_raw_means(threshold) for threshold in EARLIER}


def splitter(growth: GrowthConfig) -> Splitter:
    """Return a splitter that applies the package's search for parts with these settings."""

    def split(means: np.ndarray, tokens: list[np.ndarray], context: Context) -> np.ndarray:
        return find_parts(means, context.space, growth, np.random.default_rng(context.seed), tokens).labels

    return split
