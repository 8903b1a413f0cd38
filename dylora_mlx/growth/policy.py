"""From a measurement to a decision: create an expert, reuse one, or skip, and the sentence that says why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

from dylora_mlx.config import Growth
from dylora_mlx.growth.novelty import Novelty


class Situation(NamedTuple):
    """What a policy may look at: the measurement, the expert of each known skill, and the pool's state."""

    skill: str
    novelty: Novelty
    tokens: int
    experts_of: dict[str, int]
    num_experts: int
    steps_since_creation: int | None


@dataclass(frozen=True)
class Decision:
    """One line of decisions.jsonl. `expert` is the gate column that serves the skill; 0 is the base itself."""

    skill: str
    action: Literal["create", "reuse", "skip"]
    expert: int
    similarities: dict[str, float]
    score: float | None
    interval: tuple[float, float] | None
    threshold: float
    undecided: bool
    samples: int
    tokens: int
    num_experts: int
    cooldown_left: int
    reason: str

    @property
    def creates(self) -> bool:
        return self.action == "create"

    def record(self) -> dict:
        return asdict(self)


Policy = Callable[[Situation, Growth], Decision]


def by_threshold(situation: Situation, growth: Growth) -> Decision:
    """Novel skills get an expert, unless the cooldown or the pool's size forbids it; known ones reuse theirs."""
    seen = situation.novelty
    since = situation.steps_since_creation
    cooldown = 0 if since is None else max(0, growth.cooldown_steps - since)
    nearest = 0 if seen.nearest is None else situation.experts_of[seen.nearest]
    compared = "" if seen.score is None else f"{growth.similarity} similarity {seen.score:.3f}"
    doubt = " (the interval holds the threshold: a close call)" if seen.undecided else ""

    def decision(action: Literal["create", "reuse", "skip"], expert: int, reason: str) -> Decision:
        return Decision(
            situation.skill, action, expert, seen.similarities, seen.score, seen.interval, seen.threshold,
            seen.undecided, seen.samples, situation.tokens, situation.num_experts, cooldown, reason + doubt,
        )  # fmt: skip

    if not seen.novel:
        by = "the base itself" if nearest == 0 else f"expert {nearest}"
        action = "skip" if nearest == 0 else "reuse"
        return decision(
            action, nearest, f"known: {compared} to {seen.nearest} reaches {seen.threshold:.3f}, {by} serves it"
        )
    if situation.num_experts >= growth.max_experts:
        return decision(
            "reuse", nearest, f"novel, but the pool is full ({growth.max_experts} experts): the nearest serves it"
        )
    if cooldown:
        return decision("skip", nearest, f"novel, but {cooldown} steps of the cooldown are left: the nearest serves it")
    why = (
        "the library is empty" if seen.score is None else f"{compared} to {seen.nearest} is below {seen.threshold:.3f}"
    )
    return decision("create", situation.num_experts + 1, f"novel: {why}")
