"""From a measurement to a decision: create an expert, refine or reuse one, or skip, and the sentence that says why.

A policy looks at the situation and may ask for evidence, which costs time: the losses of what exists on the skill's
held-out text, and those of a trial expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from dylora_mlx.config import GrowthConfig
from dylora_mlx.growth.decide import bandit_log
from dylora_mlx.growth.decide.bandit import Bandit
from dylora_mlx.growth.decide.bandit_log import BanditContext, BanditTrial
from dylora_mlx.growth.novelty.measure import Novelty

Action = Literal["create", "refine", "reuse", "skip"]


class ExistingLosses(NamedTuple):
    """Held-out losses of a skill before anything is learned of it, nats a token."""

    losses: dict[int, float]
    """By expert id, with every token sent to that expert. 0 is the base."""
    entropy: float
    """Of the present routing, nats."""
    documents: int
    """How many were measured."""

    @property
    def best(self) -> int:
        """The expert with the lowest loss."""
        return min(self.losses, key=lambda expert_id: self.losses[expert_id])


class TrialResult(NamedTuple):
    """What a trial expert reaches on the same text after some steps."""

    loss: float
    gain: float
    """Nats a token by which it beats the best existing expert; negative where it does not."""
    interval: tuple[float, float]
    """Bootstrap interval of the gain, over documents."""
    steps: int


def probe_to_json(existing: ExistingLosses | None, trial: TrialResult | None) -> dict[str, Any] | None:
    """Measured losses as decisions.jsonl has them under "probe"."""
    if existing is None:
        return None
    losses = {str(expert_id): loss for expert_id, loss in existing.losses.items()}
    found = {"losses": losses, "entropy": existing.entropy, "documents": existing.documents}
    return found if trial is None else {**found, "trial": trial._asdict()}


def probe_from_json(value: dict[str, Any] | None) -> tuple[ExistingLosses | None, TrialResult | None]:
    """Back from `probe_to_json`. Raises KeyError, TypeError, ValueError for what it never wrote."""
    if value is None:
        return None, None
    losses = {int(expert_id): float(loss) for expert_id, loss in value["losses"].items()}
    trial = value.get("trial")
    return (
        ExistingLosses(losses, value["entropy"], value["documents"]),
        None if trial is None else TrialResult(**{**trial, "interval": _pair(trial["interval"])}),
    )


def _pair(value: Sequence[float]) -> tuple[float, float]:
    low, high = value
    return low, high


class Evidence(Protocol):
    """What a policy may ask for; each is measured once."""

    def existing(self) -> ExistingLosses: ...

    def trial(self) -> TrialResult: ...


class Situation(NamedTuple):
    """What a policy may look at: the measurement, the expert of each known skill, and the state of the pool."""

    skill: str
    novelty: Novelty
    tokens: int
    """Of the skill's training text."""
    experts_of: dict[str, int]
    num_experts: int
    steps_since_creation: int | None
    """None where no expert has been created."""
    seed: int = 0
    """Of the bandit's draw."""
    bandit: Bandit | None = None
    """What earlier runs taught, if it is asked for and trusted."""
    doubt: str = ""
    """Why the bandit is not trusted."""


@dataclass(frozen=True)
class Decision:
    """What was decided about a skill of the stream, and what it rests on. A line of decisions.jsonl."""

    skill: str
    action: Action
    expert: int
    """The expert that serves the skill. 0 is the null expert: the base itself."""
    similarities: dict[str, float]
    """Cosine to every library entry, by skill."""
    score: float | None
    """What is compared with the threshold; None for an empty library."""
    interval: tuple[float, float] | None
    """Bootstrap interval of the score."""
    threshold: float
    undecided: bool
    """Whether the interval holds the threshold."""
    nearest: str | None
    """The skill with the largest cosine."""
    samples: int
    """Documents that were embedded."""
    tokens: int
    """Of the skill's training text."""
    num_experts: int
    """In the pool when it was decided."""
    cooldown_left: int
    """Steps."""
    novel: bool
    """What the policy found, whatever became of it."""
    policy: str
    """The rule that decided in the end."""
    reason: str
    bandit_seed: int
    """Seed of the bandit's draw."""
    existing: ExistingLosses | None = None
    """Losses of the base and the experts, if they were measured."""
    trial: TrialResult | None = None
    """What a trial expert reached, if one was trained."""
    bandit: BanditTrial | None = None
    """What the bandit saw, and with which probability it chose."""
    novel_documents: float | None = None
    """Share of the documents that are new by themselves."""
    seconds: float = 0.0
    """That deciding took."""

    @property
    def creates(self) -> bool:
        return self.action == "create"

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON holds them, measured losses together under "probe"."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        del values["existing"], values["trial"]
        return values | {
            "probe": probe_to_json(self.existing, self.trial),
            "bandit": None if self.bandit is None else bandit_log.to_json(self.bandit),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Decision:
        """Back from `to_json`. Raises KeyError, TypeError, ValueError, UserError for what it never wrote."""
        values = dict(value)
        existing, trial = probe_from_json(values.pop("probe"))
        interval, bandit = values.pop("interval"), values.pop("bandit")
        return cls(
            **values,
            interval=None if interval is None else _pair(interval),
            existing=existing,
            trial=trial,
            bandit=None if bandit is None else bandit_log.from_json(bandit, "the decision at hand"),
        )


class PolicyVerdict(NamedTuple):
    """What a policy found, and what that rests on."""

    novel: bool
    expert: int
    """The expert that serves the skill if none is created."""
    why: str
    policy: str
    existing: ExistingLosses | None = None
    trial: TrialResult | None = None
    bandit: BanditTrial | None = None


Policy = Callable[[Situation, GrowthConfig, Evidence], PolicyVerdict]


def decide(situation: Situation, growth: GrowthConfig, evidence: Evidence, rule: str | None = None) -> Decision:
    """The decision of the configured policy, or of `rule`; a novel skill gets an expert unless the cooldown or the pool's
    size forbids it."""
    seen = situation.novelty
    verdict = POLICIES[rule or growth.policy](situation, growth, evidence)
    cooldown = _cooldown_left(situation, growth)
    served = "the base itself knows it" if verdict.expert == 0 else f"expert {verdict.expert} knows it"
    if not verdict.novel:
        action, expert = _action_if_known(verdict.expert, growth), verdict.expert
        reason = f"known: {verdict.why}, {served}"
    elif situation.num_experts >= growth.max_experts:
        action, expert = _action_if_withheld(verdict.expert), verdict.expert
        reason = f"novel, but the pool is full ({growth.max_experts} experts): {served}"
    elif cooldown:
        action, expert = "skip", verdict.expert
        reason = f"novel, but {cooldown} steps of the cooldown are left: {served}"
    else:
        action, expert, reason = "create", situation.num_experts + 1, f"novel: {verdict.why}"
    return Decision(
        situation.skill, action, expert, seen.similarities, seen.score, seen.interval, seen.threshold, seen.is_undecided,
        seen.nearest, seen.samples, situation.tokens, situation.num_experts, cooldown, verdict.novel,
        verdict.policy, reason, situation.seed, verdict.existing, verdict.trial, verdict.bandit,
    )  # fmt: skip


def withhold(decision: Decision, expert: int, why: str) -> Decision:
    """A creation that cannot be: column `expert` serves the skill instead."""
    served = "the base itself knows it" if expert == 0 else f"expert {expert} knows it"
    return replace(decision, action=_action_if_withheld(expert), expert=expert, reason=f"novel, but {why}: {served}")


def threshold_policy(situation: Situation, growth: GrowthConfig, evidence: Evidence) -> PolicyVerdict:
    """Similarity alone."""
    seen = situation.novelty
    nearest = 0 if seen.nearest is None else situation.experts_of[seen.nearest]
    if seen.score is None:
        return PolicyVerdict(True, nearest, "the library is empty", "threshold")
    compared = f"{growth.similarity} similarity {seen.score:.3f} to {seen.nearest}"
    says = f"is below {seen.threshold:.3f}" if seen.is_novel else f"reaches {seen.threshold:.3f}"
    doubt = " (the interval holds the threshold: a close call)" if seen.is_undecided else ""
    return PolicyVerdict(seen.is_novel, nearest, f"{compared} {says}{doubt}", "threshold")


def probe_policy(situation: Situation, growth: GrowthConfig, evidence: Evidence) -> PolicyVerdict:
    """Similarity where its interval is clear of the threshold; else a trial expert, which has to gain enough over the
    best that exists."""
    if not situation.novelty.is_undecided:
        return threshold_policy(situation, growth, evidence)
    existing, trial = evidence.existing(), evidence.trial()
    low, high = trial.interval
    novel = low > growth.probe.epsilon
    best = "the base" if existing.best == 0 else f"expert {existing.best}"
    why = (
        f"similarity cannot tell ({situation.novelty.score:.3f} against {situation.novelty.threshold:.3f}), and a trial "
        f"expert gains {trial.gain:+.3f} ({low:+.3f} to {high:+.3f}) nats over {best}, "
        f"{'more' if novel else 'not surely more'} than {growth.probe.epsilon:.3f}"
    )
    return PolicyVerdict(novel, existing.best, why, "probe", existing, trial)


def bandit_policy(situation: Situation, growth: GrowthConfig, evidence: Evidence) -> PolicyVerdict:
    """What paid in earlier runs; where that is not trusted, the probe's rule."""
    if situation.novelty.score is None:
        return threshold_policy(situation, growth, evidence)
    existing = evidence.existing()
    seen = bandit_context(situation, existing)
    if situation.bandit is None:
        verdict = probe_policy(situation, growth, evidence)
        trial = BanditTrial(seen, "create" if verdict.novel else "known", None, {})
        why = f"{verdict.why} (the bandit is not asked: {situation.doubt})"
        return verdict._replace(why=why, existing=existing, bandit=trial)
    arm, propensity = situation.bandit.choose(seen, np.random.default_rng(situation.seed))
    chance = situation.bandit.probability(seen)
    why = f"the outcomes of earlier runs give creating a chance of {chance:.0%} to pay"
    trial = BanditTrial(seen, arm, propensity, {})
    return PolicyVerdict(arm == "create", existing.best, why, "bandit", existing, bandit=trial)


def bandit_context(situation: Situation, existing: ExistingLosses) -> BanditContext:
    """What the bandit sees. Raises TypeError for an empty library, which has no score."""
    score = situation.novelty.score
    if score is None:
        raise TypeError("no score: the library is empty")
    experts = [loss for expert_id, loss in existing.losses.items() if expert_id]
    gap = existing.losses[0] - min(experts) if experts else 0.0
    margin = score - situation.novelty.threshold
    return BanditContext(score, margin, existing.entropy, gap, situation.num_experts, situation.tokens)


POLICIES: dict[str, Policy] = {"threshold": threshold_policy, "probe": probe_policy, "bandit": bandit_policy}


def _action_if_known(expert: int, growth: GrowthConfig) -> Action:
    return "skip" if expert == 0 else growth.when_known


def _action_if_withheld(expert: int) -> Action:
    return "skip" if expert == 0 else "reuse"


def _cooldown_left(situation: Situation, growth: GrowthConfig) -> int:
    since = situation.steps_since_creation
    return 0 if since is None else max(0, growth.cooldown_steps - since)
