"""Policies: functions from document means and what is known so far to a verdict. The package's own are called here."""

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
from novelty.probing import Lab, Taught

EARLIER = (0.85, 0.75)
"""Thresholds of the earlier attempt, before and after it was lowered."""
ADAPTIVE_DELTA = 0.02
"""Of the adaptive threshold; chosen on development streams."""
FALSE_ALARM = 0.001
"""Of the calibrated threshold; chosen on development streams."""


class Context(NamedTuple):
    """What is known when an arrival comes: the skills so far, the space in which they are compared, the arrival's texts,
    in the order of its means, and those of each entry that got an expert."""

    library: Library
    space: EmbeddingSpace
    seed: int
    texts: Sequence[str] = ()
    taught: Mapping[str, Taught] = MappingProxyType({})


class Verdict(NamedTuple):
    """Whether an arrival is called new, the entry that is most like it, how alike they are (cosine), and whether losses
    were measured to tell."""

    novel: bool
    nearest: str | None
    score: float | None
    probed: bool = False


Policy = Callable[[np.ndarray, Context], Verdict]
"""Decides on document means [n, D]."""
Splitter = Callable[[np.ndarray, list[np.ndarray], Context], np.ndarray]
"""The part of each document, int64 [n], from their means [n, D] and their token ids."""


def by_novelty(growth: GrowthConfig) -> Policy:
    """The package's measurement under these settings."""

    def decide(means: np.ndarray, context: Context) -> Verdict:
        seen = measure_novelty(means, context.library, context.space, growth, context.seed)
        return Verdict(seen.is_novel, seen.nearest, seen.score)

    return decide


def by_evidence(growth: GrowthConfig, lab: Lab, rule: str, learned: tuple[Bandit | None, str] = (None, "")) -> Policy:
    """One of the package's policies that look at losses: the experts of the nearest skills, and a trial. learned: what
    the bandit has learned, or why it is not trusted."""

    def decide(means: np.ndarray, context: Context) -> Verdict:
        seen = measure_novelty(means, context.library, context.space, growth, context.seed)
        situation, evidence = lab.arrived(seen, context.texts, context.taught, context.seed)
        situation = situation._replace(bandit=learned[0], doubt=learned[1])
        found = policy.POLICIES[rule](situation, growth, evidence)
        return Verdict(found.novel, seen.nearest, seen.score, found.existing is not None)

    return decide


def by_raw_means(threshold: float) -> Policy:
    """The earlier attempt's rule: cosines of plain means of the last hidden states."""

    def decide(means: np.ndarray, context: Context) -> Verdict:
        own = normalize(means.astype(np.float64).mean(0))
        cosines = {e.skill: float(own @ normalize(e.means.astype(np.float64).mean(0))) for e in context.library.entries}
        nearest = max(cosines, key=lambda name: cosines[name])
        return Verdict(cosines[nearest] < threshold, nearest, cosines[nearest])

    return decide


def policies(
    growth: GrowthConfig, lab: Lab | None, learned: tuple[Bandit | None, str] | None = None
) -> dict[str, Policy]:
    """Every policy by name, the probe if there is a lab, the bandit if what it has learned is trusted too (else it
    decides as the probe does); bootstrap intervals play no part in the others and are kept short."""
    plain = replace(growth, bootstrap=50)
    found = {
        "threshold": by_novelty(plain),
        "adaptive": by_novelty(replace(plain, adaptive_delta=ADAPTIVE_DELTA)),
        "calibrated": by_novelty(replace(plain, false_alarm=FALSE_ALARM)),
    }
    if lab is not None and learned is not None and learned[0] is not None:
        found = {"bandit": by_evidence(growth, lab, "bandit", learned), **found}
    if lab is not None:
        found = {"probe (default)": by_evidence(growth, lab, "probe"), **found}
    return found | {f"raw means, {threshold}": by_raw_means(threshold) for threshold in EARLIER}


def splitter(growth: GrowthConfig) -> Splitter:
    """The package's search for the parts of a file."""

    def split(means: np.ndarray, tokens: list[np.ndarray], context: Context) -> np.ndarray:
        return find_parts(means, context.space, growth, np.random.default_rng(context.seed), tokens).labels

    return split
