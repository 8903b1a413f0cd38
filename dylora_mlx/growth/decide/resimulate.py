"""Simulate decisions without a model: decide on a stream of skills from their document means and recorded evidence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dylora_mlx.config import GrowthConfig
from dylora_mlx.growth.decide import policy
from dylora_mlx.growth.decide.bandit import Bandit
from dylora_mlx.growth.decide.policy import Decision, ExistingLosses, Situation, TrialResult
from dylora_mlx.growth.feature_statistics import FeatureStatistics
from dylora_mlx.growth.library import Library, LibraryEntry
from dylora_mlx.growth.novelty.embedding import EmbeddingSpace
from dylora_mlx.growth.novelty.measure import measure_novelty
from dylora_mlx.growth.novelty.similarity import corrected_cosines, mean_state


class NotMeasured(Exception):
    """Raised if a policy requests losses that were not recorded."""


class PastArrival(NamedTuple):
    """A skill of the stream with everything recorded about it when it arrived."""

    skill: str
    means: np.ndarray
    """Document means, [n, D]."""
    tokens: int
    """Number of tokens in the skill's training text."""
    step: int
    """Training step at which it arrived."""
    seed: int = 0
    """Seed of the bandit's draw."""
    existing: ExistingLosses | None = None
    """Losses of the existing experts, if they were measured."""
    trial: TrialResult | None = None
    """Result of a trial expert, if one was trained."""
    experts: int | None = None
    """Number of experts when these were measured."""


class Resimulated(NamedTuple):
    """A simulated decision."""

    decision: Decision
    needs_measurement: bool
    """Whether the policy needs losses that were not recorded; then `decision` is the threshold policy's."""


class RecordedEvidence:
    """Evidence recorded when a skill arrived. It is valid only for a pool with the same number of experts as then."""

    def __init__(self, arrival: PastArrival, experts: int):
        same_pool = arrival.experts == experts
        self._existing, self._trial = (arrival.existing, arrival.trial) if same_pool else (None, None)

    def existing(self) -> ExistingLosses:
        """Return the recorded losses. Raises NotMeasured if there are none."""
        if self._existing is None:
            raise NotMeasured
        return self._existing

    def trial(self) -> TrialResult:
        """Return the recorded trial. Raises NotMeasured if there is none."""
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
    """Decide on every arrival, in order.

    growth.budget is ignored: whether experts can be merged or evicted is known only once they are trained.

    Args:
        arrivals: Skills of the stream.
        known: Library entries from before the first arrival.
        space: Embedding space of the document means.
        growth: Options of the decisions.
        seed: Seed of the bootstrap intervals.
        learned: Bandit and the reason why it is or is not trusted, as `train_bandit` returns them.
    """
    library, experts, created = Library("", list(known)), 0, None
    results = []
    for arrival in arrivals:
        novelty = measure_novelty(arrival.means, library, space, growth, seed)
        since = None if created is None else arrival.step - created
        situation = Situation(
            arrival.skill, novelty, arrival.tokens, library.experts_of, experts, since, arrival.seed, *learned
        )
        result = _decide_from_records(situation, growth, RecordedEvidence(arrival, experts))
        decision = result.decision
        if decision.creates:
            experts, created = experts + 1, arrival.step
        elif not decision.novel and decision.nearest:
            library.record_known(decision.nearest, decision.expert, arrival.means, growth.moving_average)
        dims = arrival.means.shape[1]
        # Decisions use neither statistics nor router features, so these stay empty.
        empty_statistics = FeatureStatistics(np.zeros((dims, dims), np.float32), np.zeros(dims, np.float32), 0.0)
        library.add(
            LibraryEntry(
                arrival.skill, decision.expert, arrival.means, empty_statistics, np.zeros((0, dims), np.float32)
            )
        )
        results.append(result)
    return results


def _decide_from_records(situation: Situation, growth: GrowthConfig, evidence: RecordedEvidence) -> Resimulated:
    try:
        return Resimulated(policy.decide(situation, growth, evidence), False)
    except NotMeasured:
        return Resimulated(policy.decide(situation, growth, evidence, "threshold"), True)


def skill_similarities(means: Sequence[np.ndarray], space: EmbeddingSpace) -> np.ndarray:
    """Return the corrected cosines between k skills, float64 [k, k], from the document means [n, D] of each."""
    states = [mean_state(documents, space) for documents in means]
    return np.clip(corrected_cosines(states), -1, 1)
