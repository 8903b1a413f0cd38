"""Policies: decide whether to create an expert, refine or reuse one, or skip, and give the reason as a sentence.

A policy sees the situation and may request evidence, which costs time: losses of the existing experts on held-out text
of the skill, and the loss of a trial expert.
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
"""Action on a skill.

`create` trains a new expert. `refine` trains the matched expert further. `reuse` serves the skill with the matched
expert, unchanged. `skip` trains nothing: the base, or during a cooldown possibly an expert, serves the skill for now.
"""


class ExistingLosses(NamedTuple):
    """Held-out losses of a skill before it is learned, nats per token."""

    losses: dict[int, float]
    """Loss by expert_id with every token routed to that expert; 0 is the base."""
    entropy: float
    """Mean entropy of the present routing, nats."""
    documents: int
    """Number of documents measured."""
    gain: tuple[float, float] | None = None
    """Bootstrap interval of the best expert's gain over the base, nats per token, over documents; None without experts, and in
    decisions from before it was measured."""

    @property
    def best(self) -> int:
        """The expert_id with the lowest loss."""
        return min(self.losses, key=lambda expert_id: self.losses[expert_id])


class TrialResult(NamedTuple):
    """Result of a trial expert after some training steps, on the same held-out text as `ExistingLosses`."""

    loss: float
    """Nats per token."""
    gain: float
    """Loss of the best existing expert minus the trial's, nats per token; negative if the trial is worse."""
    interval: tuple[float, float]
    """Bootstrap interval of the gain, over documents."""
    steps: int
    """Training steps of the trial."""


def probe_to_json(existing: ExistingLosses | None, trial: TrialResult | None) -> dict[str, Any] | None:
    """Return measured losses as the JSON value stored under "probe" in decisions.jsonl."""
    if existing is None:
        return None
    losses = {str(expert_id): loss for expert_id, loss in existing.losses.items()}
    probe = {"losses": losses, "entropy": existing.entropy, "documents": existing.documents, "gain": existing.gain}
    return probe if trial is None else {**probe, "trial": trial._asdict()}


def probe_from_json(value: dict[str, Any] | None) -> tuple[ExistingLosses | None, TrialResult | None]:
    """Read the value of `probe_to_json`. Raises KeyError, TypeError or ValueError for a damaged value."""
    if value is None:
        return None, None
    losses = {int(expert_id): float(loss) for expert_id, loss in value["losses"].items()}
    trial, gain = value.get("trial"), value.get("gain")
    return (
        ExistingLosses(losses, value["entropy"], value["documents"], None if gain is None else _to_interval(gain)),
        None if trial is None else TrialResult(**{**trial, "interval": _to_interval(trial["interval"])}),
    )


def _to_interval(value: Sequence[float]) -> tuple[float, float]:
    low, high = value
    return low, high


class Evidence(Protocol):
    """Evidence that a policy may request. It is measured on the first call and then cached."""

    def existing(self) -> ExistingLosses:
        """Return the losses of the base and of every expert."""
        ...

    def trial(self) -> TrialResult:
        """Return the result of a trial expert."""
        ...


class Situation(NamedTuple):
    """Input of a policy: the novelty measurement, the expert of each known skill, and the state of the pool."""

    skill: str
    novelty: Novelty
    tokens: int
    """Number of tokens in the skill's training text."""
    experts_of: dict[str, int]
    """The expert_id of each known skill."""
    num_experts: int
    steps_since_creation: int | None
    """Training steps since an expert was last created; None if none has been."""
    seed: int = 0
    """Seed of the bandit's draw."""
    bandit: Bandit | None = None
    """Bandit fitted to earlier runs; None if it is not configured or not trusted."""
    doubt: str = ""
    """Why the bandit is not trusted."""


@dataclass(frozen=True)
class Decision:
    """The decision on one skill of the stream, with its evidence. Stored as a line of decisions.jsonl."""

    skill: str
    action: Action
    expert: int
    """expert_id of the expert that serves the skill; 0 is the null expert, the base alone."""
    similarities: dict[str, float]
    """Corrected cosine to every library entry, by skill."""
    score: float | None
    """Similarity that is judged; None for an empty library."""
    interval: tuple[float, float] | None
    """Bootstrap interval of the score."""
    threshold: float
    """A skill with a lower score is novel, if nothing but similarity decides."""
    undecided: bool
    """Whether similarity alone cannot tell."""
    nearest: str | None
    """Skill with the largest similarity."""
    samples: int
    """Number of documents that were embedded."""
    tokens: int
    """Number of tokens in the skill's training text."""
    num_experts: int
    """Size of the pool at the time of the decision."""
    cooldown_left: int
    """Training steps until the cooldown ends."""
    novel: bool
    """The policy's verdict, even if an expert was withheld."""
    policy: str
    """The policy that made the verdict, which may be a fallback of the configured one."""
    reason: str
    bandit_seed: int
    """Seed of the bandit's draw."""
    existing: ExistingLosses | None = None
    """Losses of the base and the experts, if they were measured."""
    trial: TrialResult | None = None
    """Result of the trial expert, if one was trained."""
    bandit: BanditTrial | None = None
    """The bandit's context, its choice and the probability of that choice."""
    novel_documents: float | None = None
    """Share of the documents that are novel when each is compared with the library separately."""
    seconds: float = 0.0
    """Time taken by the decision."""
    limits: tuple[float, float] | None = None
    """Scores between which similarity cannot tell; None with a growth.threshold, and in older decisions."""

    @property
    def creates(self) -> bool:
        """Whether the decision creates an expert."""
        return self.action == "create"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, with the measured losses grouped under "probe"."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        del values["existing"], values["trial"]
        return values | {
            "probe": probe_to_json(self.existing, self.trial),
            "bandit": None if self.bandit is None else bandit_log.to_json(self.bandit),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Decision:
        """Read the value of `to_json`. Raises KeyError, TypeError, ValueError or UserError for a damaged value."""
        values = dict(value)
        existing, trial = probe_from_json(values.pop("probe"))
        interval, bandit, limits = values.pop("interval"), values.pop("bandit"), values.pop("limits", None)
        return cls(
            **values,
            interval=None if interval is None else _to_interval(interval),
            limits=None if limits is None else _to_interval(limits),
            existing=existing,
            trial=trial,
            bandit=None if bandit is None else bandit_log.from_json(bandit, "the decision at hand"),
        )


class PolicyVerdict(NamedTuple):
    """A policy's verdict on a skill, with the evidence behind it."""

    novel: bool
    """Whether the skill should get a new expert."""
    expert: int
    """expert_id of the expert that serves the skill if none is created."""
    why: str
    """Reason, as the middle part of a sentence."""
    policy: str
    """Name of the policy that made the verdict."""
    existing: ExistingLosses | None = None
    trial: TrialResult | None = None
    bandit: BanditTrial | None = None


Policy = Callable[[Situation, GrowthConfig, Evidence], PolicyVerdict]


def decide(situation: Situation, growth: GrowthConfig, evidence: Evidence, rule: str | None = None) -> Decision:
    """Apply the configured policy, or the policy named `rule`, and return the decision.

    A novel skill gets a new expert unless the pool is full or the cooldown has not ended.
    """
    novelty = situation.novelty
    verdict = POLICIES[rule or growth.policy](situation, growth, evidence)
    cooldown = _cooldown_left(situation, growth)
    served = "the base itself knows it" if verdict.expert == 0 else f"expert {verdict.expert} knows it"
    if not verdict.novel:
        action, expert = _action_if_known(verdict.expert, growth), verdict.expert
        reason = f"known: {verdict.why}, {served}"
    elif why := why_withheld(situation.num_experts, cooldown, growth):
        waits = situation.num_experts < growth.max_experts  # for the cooldown to end
        action, expert = "skip" if waits else _action_if_withheld(verdict.expert), verdict.expert
        reason = f"novel, but {why}: {served}"
    else:
        action, expert, reason = "create", situation.num_experts + 1, f"novel: {verdict.why}"
    return Decision(
        situation.skill, action, expert, novelty.similarities, novelty.score, novelty.interval, novelty.threshold,
        novelty.is_undecided, novelty.nearest, novelty.samples, situation.tokens, situation.num_experts, cooldown,
        verdict.novel, verdict.policy, reason, situation.seed, verdict.existing, verdict.trial, verdict.bandit,
        limits=novelty.limits,
    )  # fmt: skip


def why_withheld(num_experts: int, cooldown_left: int, growth: GrowthConfig) -> str:
    """Return why a novel skill gets no expert now, as the middle part of a sentence; empty if it may have one."""
    if num_experts >= growth.max_experts:
        return f"the pool is full ({growth.max_experts} experts)"
    return f"{cooldown_left} steps of the cooldown are left" if cooldown_left else ""


def withhold(decision: Decision, expert: int, why: str) -> Decision:
    """Let an existing expert_id serve a novel skill that gets no expert of its own, for the reason `why`."""
    served = "the base serves it best" if expert == 0 else f"expert {expert} serves it best"
    return replace(decision, action=_action_if_withheld(expert), expert=expert, reason=f"novel, but {why}: {served}")


def threshold_policy(situation: Situation, growth: GrowthConfig, evidence: Evidence) -> PolicyVerdict:
    """Decide by similarity alone."""
    novelty = situation.novelty
    nearest = 0 if novelty.nearest is None else situation.experts_of[novelty.nearest]
    if novelty.score is None:
        return PolicyVerdict(True, nearest, "the library is empty", "threshold")
    known = str(novelty.nearest) if growth.similarity == "max" else "all known skills"
    compared = f"{growth.similarity} similarity {novelty.score:.3f} to {known}"
    limit = novelty.threshold
    if novelty.limits is not None and not novelty.is_undecided:
        limit = novelty.limits[0] if novelty.is_novel else novelty.limits[1]
    relation = f"is below {limit:.3f}" if novelty.is_novel else f"reaches {limit:.3f}"
    caveat = " (a close call)" if novelty.is_undecided else ""
    return PolicyVerdict(novelty.is_novel, nearest, f"{compared} {relation}{caveat}", "threshold")


def probe_policy(situation: Situation, growth: GrowthConfig, evidence: Evidence) -> PolicyVerdict:
    """Decide by similarity; if that cannot tell, by measured losses, the cheaper measurement first.

    If the nearest skill has an expert, and the whole interval of the best expert's gain over the base, on text of the skill,
    is at most growth.probe.epsilon, no expert knows it, and the skill is novel. Otherwise a trial expert is trained. The
    skill is novel if the lower end of the trial's gain over the best existing expert exceeds growth.probe.epsilon.
    """
    novelty = situation.novelty
    if not novelty.is_undecided:
        return threshold_policy(situation, growth, evidence)
    limits = (novelty.threshold,) if novelty.limits is None else novelty.limits
    doubt = f"similarity cannot tell ({novelty.score:.3f} against {' to '.join(f'{limit:.3f}' for limit in limits)})"
    existing, epsilon = evidence.existing(), growth.probe.epsilon
    has_expert = novelty.nearest is not None and situation.experts_of[novelty.nearest] != 0
    if has_expert and existing.gain is not None and existing.gain[1] <= epsilon:
        low, high = existing.gain
        why = f"{doubt}, and no expert gains more than {epsilon:.3f} nats over the base on it (the best {low:+.3f} to {high:+.3f})"
        return PolicyVerdict(True, existing.best, why, "probe", existing)
    trial = evidence.trial()
    low, high = trial.interval
    novel = low > epsilon
    best = "the base" if existing.best == 0 else f"expert {existing.best}"
    why = (
        f"{doubt}, and a trial expert gains {trial.gain:+.3f} ({low:+.3f} to {high:+.3f}) nats over {best}, "
        f"{'more' if novel else 'not surely more'} than {epsilon:.3f}"
    )
    return PolicyVerdict(novel, existing.best, why, "probe", existing, trial)


def bandit_policy(situation: Situation, growth: GrowthConfig, evidence: Evidence) -> PolicyVerdict:
    """Decide by a bandit fitted to the outcomes of earlier runs; fall back to `probe_policy` if it is not trusted.

    An empty library has no similarity score, so there the threshold policy decides.
    """
    if situation.novelty.score is None:
        return threshold_policy(situation, growth, evidence)
    existing = evidence.existing()
    context = bandit_context(situation, existing)
    if situation.bandit is None:
        verdict = probe_policy(situation, growth, evidence)
        trial = BanditTrial(context, "create" if verdict.novel else "known", None, {})
        why = f"{verdict.why} (the bandit is not asked: {situation.doubt})"
        return verdict._replace(why=why, existing=existing, bandit=trial)
    arm, propensity = situation.bandit.choose(context, np.random.default_rng(situation.seed))
    create_probability = situation.bandit.probability(context)
    why = f"the outcomes of earlier runs give creating a chance of {create_probability:.0%} to pay"
    trial = BanditTrial(context, arm, propensity, {})
    return PolicyVerdict(arm == "create", existing.best, why, "bandit", existing, bandit=trial)


def bandit_context(situation: Situation, existing: ExistingLosses) -> BanditContext:
    """Return the bandit's context features. Raises TypeError for an empty library, which has no score."""
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
