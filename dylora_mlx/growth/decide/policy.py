"""From a measurement to a decision: create an expert, refine or reuse one, or skip, and the sentence that says why.

A policy looks at the situation and may ask for evidence, which costs time: the losses of what exists on the skill's
held-out text, and those of a trial expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Literal, NamedTuple, Protocol

import numpy as np

from dylora_mlx.config import Growth
from dylora_mlx.growth.decide import bandit_log as trials
from dylora_mlx.growth.decide.bandit import Bandit
from dylora_mlx.growth.decide.bandit_log import Context
from dylora_mlx.growth.novelty.measure import Novelty

Action = Literal["create", "refine", "reuse", "skip"]


class Existing(NamedTuple):
    """Held-out losses of a skill before anything is learned of it, nats a token.

    losses: by gate column, every token sent there (0: the base); entropy: of the routing as it is, nats; documents:
    how many were measured.
    """

    losses: dict[int, float]
    entropy: float
    documents: int

    @property
    def best(self) -> int:
        """The column with the lowest loss."""
        return min(self.losses, key=lambda column: self.losses[column])


class Trial(NamedTuple):
    """What a trial expert reaches on the same text after some steps.

    gain: nats a token by which it beats the best that exists (negative: it does not), interval: over documents.
    """

    loss: float
    gain: float
    interval: tuple[float, float]
    steps: int


class Evidence(Protocol):
    """What a policy may ask for; each is measured once."""

    def existing(self) -> Existing: ...

    def trial(self) -> Trial: ...


class Situation(NamedTuple):
    """What a policy may look at: the measurement, the expert of each known skill, and the pool's state.

    bandit: what was learned from earlier runs, if that is asked for and trusted; doubt: why it is not trusted.
    """

    skill: str
    novelty: Novelty
    tokens: int
    experts_of: dict[str, int]
    num_experts: int
    steps_since_creation: int | None
    seed: int = 0
    bandit: Bandit | None = None
    doubt: str = ""


@dataclass(frozen=True)
class Decision:
    """One line of decisions.jsonl. `expert` is the gate column that serves the skill; 0 is the base itself.

    novel: what the policy found, whatever became of it; policy: the rule that decided in the end; draw: seed of a bandit's
    draw; probe: losses measured for it; bandit: its context and propensity; novel_documents: share of the documents that
    are new by themselves; seconds: that deciding took.
    """

    skill: str
    action: Action
    expert: int
    similarities: dict[str, float]
    score: float | None
    interval: tuple[float, float] | None
    threshold: float
    undecided: bool
    nearest: str | None
    samples: int
    tokens: int
    num_experts: int
    cooldown_left: int
    novel: bool
    policy: str
    reason: str
    draw: int
    probe: dict | None = None
    bandit: dict | None = None
    novel_documents: float | None = None
    seconds: float = 0.0

    @property
    def creates(self) -> bool:
        return self.action == "create"

    def record(self) -> dict:
        return asdict(self)


class Verdict(NamedTuple):
    """novel or known; the column that serves the skill if no expert is created; the reason; what it rests on."""

    novel: bool
    expert: int
    why: str
    policy: str
    probe: dict | None = None
    bandit: dict | None = None


Policy = Callable[[Situation, Growth, Evidence], Verdict]


def decide(situation: Situation, growth: Growth, evidence: Evidence, rule: str | None = None) -> Decision:
    """The decision of the configured policy, or of `rule`; a novel skill gets an expert unless the cooldown or the pool's
    size forbids it."""
    seen = situation.novelty
    verdict = POLICIES[rule or growth.policy](situation, growth, evidence)
    cooldown = _cooldown(situation, growth)
    served = "the base itself knows it" if verdict.expert == 0 else f"expert {verdict.expert} knows it"
    if not verdict.novel:
        action, expert = _known(verdict.expert, growth), verdict.expert
        reason = f"known: {verdict.why}, {served}"
    elif situation.num_experts >= growth.max_experts:
        action, expert = _unserved(verdict.expert), verdict.expert
        reason = f"novel, but the pool is full ({growth.max_experts} experts): {served}"
    elif cooldown:
        action, expert = "skip", verdict.expert
        reason = f"novel, but {cooldown} steps of the cooldown are left: {served}"
    else:
        action, expert, reason = "create", situation.num_experts + 1, f"novel: {verdict.why}"
    return Decision(
        situation.skill, action, expert, seen.similarities, seen.score, seen.interval, seen.threshold, seen.undecided,
        seen.nearest, seen.samples, situation.tokens, situation.num_experts, cooldown, verdict.novel,
        verdict.policy, reason, situation.seed, verdict.probe, verdict.bandit,
    )  # fmt: skip


def withheld(decision: Decision, expert: int, why: str) -> Decision:
    """A creation that cannot be: column `expert` serves the skill instead."""
    served = "the base itself knows it" if expert == 0 else f"expert {expert} knows it"
    return replace(decision, action=_unserved(expert), expert=expert, reason=f"novel, but {why}: {served}")


def by_threshold(situation: Situation, growth: Growth, evidence: Evidence) -> Verdict:
    """Similarity alone."""
    seen = situation.novelty
    nearest = 0 if seen.nearest is None else situation.experts_of[seen.nearest]
    if seen.score is None:
        return Verdict(True, nearest, "the library is empty", "threshold")
    compared = f"{growth.similarity} similarity {seen.score:.3f} to {seen.nearest}"
    says = f"is below {seen.threshold:.3f}" if seen.novel else f"reaches {seen.threshold:.3f}"
    doubt = " (the interval holds the threshold: a close call)" if seen.undecided else ""
    return Verdict(seen.novel, nearest, f"{compared} {says}{doubt}", "threshold")


def by_probe(situation: Situation, growth: Growth, evidence: Evidence) -> Verdict:
    """Similarity where its interval is clear of the threshold; else a trial expert, which has to gain enough over the
    best that exists."""
    if not situation.novelty.undecided:
        return by_threshold(situation, growth, evidence)
    existing, trial = evidence.existing(), evidence.trial()
    low, high = trial.interval
    novel = low > growth.probe.epsilon
    best = "the base" if existing.best == 0 else f"expert {existing.best}"
    why = (
        f"similarity cannot tell ({situation.novelty.score:.3f} against {situation.novelty.threshold:.3f}), and a trial "
        f"expert gains {trial.gain:+.3f} ({low:+.3f} to {high:+.3f}) nats over {best}, "
        f"{'more' if novel else 'not surely more'} than {growth.probe.epsilon:.3f}"
    )
    return Verdict(novel, existing.best, why, "probe", _probed(existing, trial))


def by_bandit(situation: Situation, growth: Growth, evidence: Evidence) -> Verdict:
    """What paid in earlier runs; where that is not trusted, the probe's rule."""
    if situation.novelty.score is None:
        return by_threshold(situation, growth, evidence)
    existing = evidence.existing()
    seen = context(situation, existing)
    if situation.bandit is None:
        verdict = by_probe(situation, growth, evidence)
        noted = trials.record(trials.Trial(seen, "create" if verdict.novel else "known", None, {}))
        why = f"{verdict.why} (the bandit is not asked: {situation.doubt})"
        return verdict._replace(why=why, probe=verdict.probe or _probed(existing, None), bandit=noted)
    arm, propensity = situation.bandit.choose(seen, np.random.default_rng(situation.seed))
    chance = situation.bandit.probability(seen)
    why = f"the outcomes of earlier runs give creating a chance of {chance:.0%} to pay"
    noted = trials.record(trials.Trial(seen, arm, propensity, {}))
    return Verdict(arm == "create", existing.best, why, "bandit", _probed(existing, None), noted)


def context(situation: Situation, existing: Existing) -> Context:
    """What the bandit sees. Raises TypeError for an empty library, which has no score."""
    score = situation.novelty.score
    if score is None:
        raise TypeError("no score: the library is empty")
    experts = [loss for column, loss in existing.losses.items() if column]
    gap = existing.losses[0] - min(experts) if experts else 0.0
    margin = score - situation.novelty.threshold
    return Context(score, margin, existing.entropy, gap, situation.num_experts, situation.tokens)


POLICIES: dict[str, Policy] = {"threshold": by_threshold, "probe": by_probe, "bandit": by_bandit}


def _known(expert: int, growth: Growth) -> Action:
    return "skip" if expert == 0 else growth.when_known


def _unserved(expert: int) -> Action:
    return "skip" if expert == 0 else "reuse"


def _cooldown(situation: Situation, growth: Growth) -> int:
    since = situation.steps_since_creation
    return 0 if since is None else max(0, growth.cooldown_steps - since)


def _probed(existing: Existing, trial: Trial | None) -> dict:
    losses = {str(column): loss for column, loss in existing.losses.items()}
    found = {"losses": losses, "entropy": existing.entropy, "documents": existing.documents}
    return found if trial is None else {**found, "trial": trial._asdict()}
