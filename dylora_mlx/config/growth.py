"""Options of growth: novelty, the decision, its budget, and maturity."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dylora_mlx.config.checks import require, require_finite
from dylora_mlx.config.source import Source


@dataclass(frozen=True)
class ProbeConfig:
    """What is measured when similarity cannot tell: held-out losses of what exists, and of a short trial expert."""

    steps: int = 12
    """Steps that the trial expert is trained."""
    rows: int = 24
    """Packed rows of held-out text that losses are measured on, at most."""
    epsilon: float = 0.02
    """Nats a token that the trial's gain over the best that exists must exceed, with confidence, to create an expert."""

    def __post_init__(self) -> None:
        require_finite(self)
        for name in ("steps", "rows"):
            require(getattr(self, name) >= 1, f"{name}: {getattr(self, name)} is not at least 1")
        require(self.epsilon >= 0, f"epsilon: {self.epsilon} is below 0")


@dataclass(frozen=True)
class BanditConfig:
    """The policy that learns from the outcomes of earlier runs when a new expert pays."""

    history: list[str] = field(default_factory=list)
    """Run folders, folders of run folders, or decisions.jsonl files to learn from."""
    cost: float = 0.05
    """Price of a million new parameters, in nats a token, taken off the gain of a new expert."""
    trials: int = 20
    """Usable outcomes that the off-policy check wants before the bandit is trusted."""
    tolerance: float = 0.0
    """The bandit is trusted if it is not worse than the threshold by more than this, in nats a token, with confidence."""

    def __post_init__(self) -> None:
        require_finite(self)
        require(self.cost >= 0, f"cost: {self.cost} is below 0")
        require(self.trials >= 2, f"trials: {self.trials} is not at least 2")
        require(self.tolerance >= 0, f"tolerance: {self.tolerance} is below 0")


@dataclass(frozen=True)
class RankConfig:
    """A new expert's rank doubles when its validation loss no longer improves."""

    epsilon: float = 0.0
    """The rank doubles when the loss improves by less than this many nats in `steps` steps; 0 turns it off."""
    steps: int = 25
    """Steps between two such looks."""
    max: int = 32
    """No rank is doubled beyond this."""
    schedule: str | None = None
    """A file that tools/benchmarks/rank_law.py wrote: gives the rank of new experts and the largest rank, instead of model.rank and max."""

    def __post_init__(self) -> None:
        require_finite(self)
        require(self.epsilon >= 0, f"epsilon: {self.epsilon} is below 0")
        for name in ("steps", "max"):
            require(getattr(self, name) >= 1, f"{name}: {getattr(self, name)} is not at least 1")


@dataclass(frozen=True)
class BudgetConfig:
    """Caps on parameters. To keep them, experts are merged, then evicted, if no domain pays more than growth.epsilon."""

    adapters: int | None = None
    """Parameters of all experts together, at most."""
    trainable: int | None = None
    """Parameters that train at a time, at most: the youngest expert's and the router's."""
    merge_distance: float = 0.95
    """Experts merge up to this distance of their updates: 0 is equal, 1 unrelated."""
    merge_steps: int = 12
    """Steps of training a merged expert on what its experts were trained on."""
    low_usage: float = 1.0
    """Experts used less than this share of the average are candidates to merge; all of them if fewer than two are."""

    def __post_init__(self) -> None:
        require_finite(self)
        for name in ("adapters", "trainable"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}: {value} is not at least 1")
        require(0 <= self.merge_distance <= 1.5, f"merge_distance: {self.merge_distance} is not between 0 and 1.5")
        require(self.merge_steps >= 0, f"merge_steps: {self.merge_steps} is below 0")
        require(self.low_usage > 0, f"low_usage: {self.low_usage} is not above 0")


@dataclass(frozen=True)
class GrowthConfig:
    """Novelty detection, the decision, and maturity."""

    policy: Literal["threshold", "probe", "bandit"] = "probe"
    """threshold: similarity alone; probe: a trial expert where similarity cannot tell; bandit: learned from earlier runs."""
    when_known: Literal["reuse", "refine"] = "refine"
    """What becomes of a known skill: its expert goes on training with replay of its earlier skills, which is undone if one
    of them loses, or serves it as it is."""
    epsilon: float = 0.02
    """Nats a token that a domain may lose when an expert is refined, merged or evicted; beyond that it is undone."""
    base_skill: Source | None = field(default_factory=lambda: Source(name="python", source="packaged/python"))
    """What the base already knows: the library's first entry, held by the null expert. Null for none."""
    threshold: float = 0.75
    """Cosine similarity at and above which a skill counts as known (tau before any adaptation)."""
    adaptive_delta: float = 0.0
    """tau_k = threshold - adaptive_delta * log(1 + k) for a library of k skills."""
    false_alarm: float | None = None
    """Calibrate the threshold instead: known skills, split in halves, would be called new this often."""
    similarity: Literal["max", "median"] = "max"
    """Which of the similarities to the library is compared with the threshold."""
    whitening: float = 0.1
    """Whiten embeddings by the reference covariance, this much of its mean eigenvalue added; 0 only centres."""
    projection: str | None = None
    """A projection head that tools/benchmarks/train_projection.py wrote; null compares the embeddings as they are."""
    moving_average: float = 0.1
    """Share of a newly seen part of a known skill in that skill's embedding; 0 keeps the embedding of the first arrival."""
    split: bool = True
    """Split a skill whose documents are of several kinds; each part is decided on, and trained, by itself."""
    document_novelty: Literal["similarity", "energy"] = "similarity"
    """How the novelty of single documents is scored: largest cosine to the library, or free energy over it."""
    min_samples: int = 32
    """A skill with fewer documents is refused."""
    min_tokens: int = 1000
    """A skill with fewer tokens is refused."""
    embedding_samples: int = 128
    """Documents embedded for the decision, at most."""
    batch_samples: int = 16
    """Documents in one of the random batches that are averaged."""
    bootstrap: int = 500
    """Resamples behind the similarity's interval."""
    confidence: float = 0.95
    """Coverage of that interval."""
    freeze_after: int = 0
    """Evaluations without improvement after which the projections in `freeze_first` stop learning; 0: not before the rest."""
    freeze_first: list[str] = field(default_factory=lambda: ["q_proj"])
    """Projections of an expert that stop learning first."""
    replay_fraction: float = 0.5
    """Share of earlier documents of the expert's skills in what an expert is refined on."""
    cooldown_steps: int = 0
    """Training steps that must pass after a creation before the next one."""
    max_experts: int = 64
    """No expert is created beyond this number."""
    dense_steps: int = 6
    """Dense routing for the first so many steps of a skill that gets an expert, before it turns sparse (at most a third of the
    skill's steps)."""
    anneal_steps: int = 6
    """Steps after those in which routing is sparse and the temperature falls: top_k experts a token, at least 2 (at
    most a third of the skill's steps). Then the expert is mature."""
    top_k: int = 3
    """Experts per token at the end of the schedule, of all that there are; fewer are measured to route worse."""
    dense_experts: int = 16
    """While a new expert is young every token is routed to all experts, or to the likeliest so many of a larger pool."""
    expert_init: Literal["mean", "scratch"] = "mean"
    """Where a new expert starts: mean: from what the experts that are there have in common, the mean of their updates; scratch: from
    the base alone."""
    ridge_start: bool = True
    """A new gate row starts from the ridge solution over the features of all skills; without, from zero."""
    min_gate: float = 0.5
    """Least gate of an expert while it is trained, on every token of its skill; 1 trains it as if it were alone."""
    temperature: float = 1.5
    """Router temperature while an expert is young."""
    final_temperature: float = 1.0
    """Router temperature at the end of the top-2 phase, reached in a straight line."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    bandit: BanditConfig = field(default_factory=BanditConfig)
    rank: RankConfig = field(default_factory=RankConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)

    def __post_init__(self) -> None:
        require_finite(self)
        require(-1 <= self.threshold <= 1, f"threshold: {self.threshold} is not a cosine (-1 to 1)")
        require(self.adaptive_delta >= 0, f"adaptive_delta: {self.adaptive_delta} is below 0")
        require(self.whitening >= 0, f"whitening: {self.whitening} is below 0")
        require(self.epsilon >= 0, f"epsilon: {self.epsilon} is below 0")
        require(
            self.false_alarm is None or 0 < self.false_alarm < 0.5,
            f"false_alarm: {self.false_alarm} is not between 0 and 0.5",
        )
        require(
            self.false_alarm is None or self.adaptive_delta == 0,
            "false_alarm: a calibrated threshold is not adaptive too, give false_alarm or adaptive_delta",
        )
        require(0 <= self.moving_average <= 1, f"moving_average: {self.moving_average} is not between 0 and 1")
        require(0 <= self.min_gate <= 1, f"min_gate: {self.min_gate} is not between 0 and 1")
        require(0 <= self.replay_fraction < 1, f"replay_fraction: {self.replay_fraction} is not between 0 and 1")
        for name in (
            "min_samples",
            "min_tokens",
            "embedding_samples",
            "batch_samples",
            "max_experts",
            "top_k",
            "dense_experts",
        ):
            require(getattr(self, name) >= 1, f"{name}: {getattr(self, name)} is not at least 1")
        require(
            self.embedding_samples >= self.min_samples,
            f"embedding_samples: {self.embedding_samples} is below min_samples, {self.min_samples}",
        )
        require(
            self.bootstrap >= 50, f"bootstrap: {self.bootstrap} resamples are too few for an interval (at least 50)"
        )
        require(0.5 <= self.confidence < 1, f"confidence: {self.confidence} is not between 0.5 and 1")
        for name in ("cooldown_steps", "dense_steps", "anneal_steps", "freeze_after"):
            require(getattr(self, name) >= 0, f"{name}: {getattr(self, name)} is below 0")
        require(self.temperature > 0 and self.final_temperature > 0, "temperature: must be above 0")
