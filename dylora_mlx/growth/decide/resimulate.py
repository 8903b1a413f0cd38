"""Decisions played through without a model: what would be decided of some arrivals, from their document means alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dylora_mlx.config import Growth
from dylora_mlx.growth.decide import policy
from dylora_mlx.growth.decide.bandit import Bandit
from dylora_mlx.growth.decide.policy import Decision, Existing, Situation, Trial
from dylora_mlx.growth.gate_init import Statistics
from dylora_mlx.growth.library import Entry, Library
from dylora_mlx.growth.novelty import measure as novelty
from dylora_mlx.growth.novelty.embedding import Space


class Unmeasured(Exception):
    """The policy asks for losses that nobody has measured."""


class Arrival(NamedTuple):
    """A skill of the stream: document means [n, D], training tokens, the step at which it arrives, the seed of what is
    drawn for it, and the losses that were measured of it, with the number of experts there were then."""

    skill: str
    means: np.ndarray
    tokens: int
    step: int
    seed: int = 0
    measured: dict | None = None
    experts: int | None = None


class Played(NamedTuple):
    """What would be decided; open: the policy would first measure losses, so the decision is the threshold's."""

    decision: Decision
    open: bool


class Recorded:
    """Evidence from a line of the ledger. It holds only for a pool of as many experts as there were."""

    def __init__(self, arrival: Arrival, experts: int):
        self.found = arrival.measured if arrival.experts == experts else None

    def existing(self) -> Existing:
        if self.found is None:
            raise Unmeasured
        losses = {int(column): loss for column, loss in self.found["losses"].items()}
        return Existing(losses, self.found["entropy"], self.found["documents"])

    def trial(self) -> Trial:
        trial = None if self.found is None else self.found.get("trial")
        if trial is None:
            raise Unmeasured
        return Trial(**{**trial, "interval": tuple(trial["interval"])})


def play(
    arrivals: Sequence[Arrival],
    known: Sequence[Entry],
    space: Space,
    growth: Growth,
    seed: int,
    learned: tuple[Bandit | None, str] = (None, "it is not part of this"),
) -> list[Played]:
    """Decide on every arrival in order. known: entries of the library before the first one.

    Budgets are left out: whether experts can be merged or evicted shows only when they are trained.
    """
    library, experts, created = Library("", list(known)), 0, None
    found = []
    for arrival in arrivals:
        seen = novelty.measure(arrival.means, library, space, growth, seed)
        since = None if created is None else arrival.step - created
        situation = Situation(
            arrival.skill, seen, arrival.tokens, library.experts_of, experts, since, arrival.seed, *learned
        )
        played = _decided(situation, growth, Recorded(arrival, experts))
        decision = played.decision
        if decision.creates:
            experts, created = experts + 1, arrival.step
        elif not decision.novel and decision.nearest:
            nearest = library.find(decision.nearest)
            nearest.see(arrival.means, decision.similarities[nearest.skill], growth.moving_average)
        dims = arrival.means.shape[1]
        nothing = Statistics(np.zeros((dims, dims), np.float32), np.zeros(dims, np.float32), 0.0)
        library.add(Entry(arrival.skill, decision.expert, arrival.means, nothing, np.zeros((0, dims), np.float32)))
        found.append(played)
    return found


def _decided(situation: Situation, growth: Growth, evidence: Recorded) -> Played:
    try:
        return Played(policy.decide(situation, growth, evidence), False)
    except Unmeasured:
        return Played(policy.decide(situation, growth, evidence, "threshold"), True)


def similarities(means: Sequence[np.ndarray], space: Space) -> np.ndarray:
    """Cosines between skills, float64 [k, k], from document means [n, D] each."""
    embedded = np.stack([space(found.astype(np.float64).mean(0)) for found in means])
    return embedded @ embedded.T
