"""Decisions played through without a model: what would be decided of some arrivals, from their document means alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dylora_mlx.config import GrowthConfig
from dylora_mlx.growth.decide import policy
from dylora_mlx.growth.decide.bandit import Bandit
from dylora_mlx.growth.decide.policy import Decision, ExistingLosses, Situation, TrialResult
from dylora_mlx.growth.gate_init import FeatureStatistics
from dylora_mlx.growth.library import Library, LibraryEntry
from dylora_mlx.growth.novelty.embedding import EmbeddingSpace
from dylora_mlx.growth.novelty.measure import measure_novelty


class NotMeasured(Exception):
    """The policy asks for losses that nobody has measured."""


class PastArrival(NamedTuple):
    """A skill of the stream, as it arrived."""

    skill: str
    means: np.ndarray
    """Of its documents, [n, D]."""
    tokens: int
    """Of its training text."""
    step: int
    """At which it arrived."""
    seed: int = 0
    """Of the bandit's draw."""
    existing: ExistingLosses | None = None
    """Losses that were measured of it then."""
    trial: TrialResult | None = None
    """What a trial expert reached then."""
    experts: int | None = None
    """How many experts there were when these were measured."""


class Resimulated(NamedTuple):
    """What would be decided."""

    decision: Decision
    needs_measurement: bool
    """The policy would first measure losses that nobody measured; the decision is the threshold's."""


class RecordedEvidence:
    """Evidence that was measured then. It holds only for a pool of as many experts as there were."""

    def __init__(self, arrival: PastArrival, experts: int):
        same_pool = arrival.experts == experts
        self._existing, self._trial = (arrival.existing, arrival.trial) if same_pool else (None, None)

    def existing(self) -> ExistingLosses:
        if self._existing is None:
            raise NotMeasured
        return self._existing

    def trial(self) -> TrialResult:
        if self._trial is None:
            raise NotMeasured
        return self._trial


def resimulate(
    arrivals: Sequence[PastArrival],
    known: Sequence[LibraryEntry],
    space: EmbeddingSpace,
    growth: GrowthConfig,
    seed: int,
    learned: tuple[Bandit | None, str] = (None, "it is not part of this"),
) -> list[Resimulated]:
    """Decide on every arrival in order. known: entries of the library before the first one.

    Budgets are left out: whether experts can be merged or evicted shows only when they are trained.
    """
    library, experts, created = Library("", list(known)), 0, None
    found = []
    for arrival in arrivals:
        seen = measure_novelty(arrival.means, library, space, growth, seed)
        since = None if created is None else arrival.step - created
        situation = Situation(
            arrival.skill, seen, arrival.tokens, library.experts_of, experts, since, arrival.seed, *learned
        )
        played = _decided(situation, growth, RecordedEvidence(arrival, experts))
        decision = played.decision
        if decision.creates:
            experts, created = experts + 1, arrival.step
        elif not decision.novel and decision.nearest:
            nearest = library.find(decision.nearest)
            nearest.record_arrival(arrival.means, decision.similarities[nearest.skill], growth.moving_average)
        dims = arrival.means.shape[1]
        nothing = FeatureStatistics(np.zeros((dims, dims), np.float32), np.zeros(dims, np.float32), 0.0)
        library.add(
            LibraryEntry(arrival.skill, decision.expert, arrival.means, nothing, np.zeros((0, dims), np.float32))
        )
        found.append(played)
    return found


def _decided(situation: Situation, growth: GrowthConfig, evidence: RecordedEvidence) -> Resimulated:
    try:
        return Resimulated(policy.decide(situation, growth, evidence), False)
    except NotMeasured:
        return Resimulated(policy.decide(situation, growth, evidence, "threshold"), True)


def skill_similarities(means: Sequence[np.ndarray], space: EmbeddingSpace) -> np.ndarray:
    """Cosines between skills, float64 [k, k], from document means [n, D] each."""
    embedded = np.stack([space(found.astype(np.float64).mean(0)) for found in means])
    return embedded @ embedded.T
