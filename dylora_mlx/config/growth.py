"""Options of pool growth: novelty, the growth policy, LoRA rank growth, the parameter budget, and the routing
schedule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dylora_mlx.config.checks import require, require_finite
from dylora_mlx.config.source import Source


@dataclass(frozen=True)
class ProbeConfig:
    """The probe of an undecided skill: held-out losses of the base, every expert and a short trial expert."""

    steps: int = 12
    """Optimizer steps that the trial expert is trained for, at least 1. Raise it if useful experts are refused because
    the trial learns too little; each probe then takes longer."""
    rows: int = 24
    """Maximum number of packed rows of held-out text that the losses are measured on, at least 1. More rows narrow the
    interval of the gain and take longer."""
    epsilon: float = 0.02
    """Gain, in nats per token, that the trial expert must reach over the best existing loss before an expert is
    created, at least 0. The lower end of the gain's `growth.confidence` interval has to exceed it. Raise it for
    fewer experts."""

    def __post_init__(self) -> None:
        require_finite(self)
        for name in ("steps", "rows"):
            require(getattr(self, name) >= 1, f"{name}: {getattr(self, name)} is not at least 1")
        require(self.epsilon >= 0, f"epsilon: {self.epsilon} is below 0")


@dataclass(frozen=True)
class BanditConfig:
    """The bandit policy: linear Thompson sampling that learns from earlier runs when a new expert pays off."""

    history: list[str] = field(default_factory=list)
    """Paths to learn from: run folders, folders of run folders, or decisions.jsonl files. With an empty list the probe
    decides."""
    cost: float = 0.05
    """Price of one million new parameters, in nats per token, subtracted from the gain of a new expert; at least 0.
    Raise it for a smaller pool."""
    trials: int = 20
    """Usable outcomes that the off-policy check needs before it may trust the bandit, at least 2. Until then the probe
    decides."""
    tolerance: float = 0.0
    """Largest shortfall of the bandit's estimated value below the threshold policy's, in nats per token, at which the
    bandit is still trusted; at least 0. The whole interval of the off-policy check must lie above -tolerance."""

    def __post_init__(self) -> None:
        require_finite(self)
        require(self.cost >= 0, f"cost: {self.cost} is below 0")
        require(self.trials >= 2, f"trials: {self.trials} is not at least 2")
        require(self.tolerance >= 0, f"tolerance: {self.tolerance} is below 0")


@dataclass(frozen=True)
class RankConfig:
    """LoRA rank growth: a new expert's rank doubles when its validation loss stops improving."""

    epsilon: float = 0.0
    """Double the rank when the loss improved by less than this within `growth.rank.steps` steps, in nats per token; at
    least 0. 0 turns rank growth off."""
    steps: int = 25
    """Number of steps between two checks, at least 1. The first compares with the start of the skill, and each is one more
    evaluation, beside those of `training.steps_per_eval`. A skill needs more steps than this."""
    max: int = 32
    """Largest LoRA rank that doubling may reach, at least 1."""
    schedule: str | None = None
    """JSON file written by tools/benchmarks/rank_law.py. It replaces `model.rank`, `model.alpha` and `growth.rank.max`
    with the measured starting rank, alpha / r and largest rank. null: use those options."""

    def __post_init__(self) -> None:
        require_finite(self)
        require(self.epsilon >= 0, f"epsilon: {self.epsilon} is below 0")
        for name in ("steps", "max"):
            require(getattr(self, name) >= 1, f"{name}: {getattr(self, name)} is not at least 1")


@dataclass(frozen=True)
class BudgetConfig:
    """Caps on parameters, met by merging, then evicting experts if no domain loses more than growth.epsilon."""

    adapters: int | None = None
    """Maximum number of parameters of all experts together, at least the size of one expert. A skill that would need
    more gets no expert if nothing can be merged or evicted. null: no cap."""
    trainable: int | None = None
    """Maximum number of parameters that train at once: the new expert's and the router's. A skill that would need more
    gets no expert. null: no cap."""
    merge_distance: float = 0.95
    """Largest distance between the weight updates of experts that may be merged, from 0 to 1.5: 0 means equal, 1
    orthogonal, 1.41 opposite. Lower it to merge only near-duplicates."""
    merge_steps: int = 12
    """Training steps of a merged expert on the skills of the experts it replaces. 0: no training after a merge."""
    low_usage: float = 1.0
    """Experts whose mean gate is at most this multiple of the pool's average are candidates for a merge; above 0. If
    fewer than two qualify, all experts are candidates."""

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
    """Novelty detection, the decision to create an expert, and the routing schedule of a new expert."""

    policy: Literal["threshold", "probe", "bandit"] = "probe"
    """Rule that judges whether a skill is new. threshold: similarity alone. probe: similarity, and a trial expert when
    the interval contains the threshold. bandit: learned from earlier runs (growth.bandit). Choose threshold to avoid
    the probe's extra training."""
    when_known: Literal["reuse", "refine"] = "refine"
    """Action for a known skill that an expert holds. refine: continue training that expert with replay of its earlier
    skills; roll back if another domain loses more than growth.epsilon, or if this skill or the mean over all skills
    does not improve. reuse: serve the skill with that expert, untrained."""
    epsilon: float = 0.02
    """Largest loss increase, in nats per token, that a domain may suffer when an expert is created, refined, merged or
    evicted; at least 0. Beyond it the change is undone. A new expert may also cost a tenth of what its skill gains. Raise it to
    accept more forgetting for more changes."""
    acceptance: Literal["measured", "always"] = "measured"
    """Whether a new expert is kept. measured: only if its skill surely gains and no other domain surely loses, on held-out
    documents; otherwise it is undone. always: without a measurement, for instance if there are too few held-out documents."""
    base_skill: Source | None = field(default_factory=lambda: Source(name="python", source="packaged/python"))
    """Text that the base model already knows: the first library entry, held by the null expert and guarded against
    forgetting like a skill. null: no entry for it."""
    false_new: float = 0.01
    """Share of known skills that similarity alone may call new, between 0 and 0.5. With false_known it sets the two limits
    between new and known, from how similar the library's skills are to themselves and to each other. Between the limits
    the policy decides by other evidence. Lower it for fewer experts."""
    false_known: float = 0.01
    """Share of new skills that similarity alone may call known, between 0 and 0.5. Lower it for more experts."""
    threshold: float | None = None
    """Similarity, from -1 to 1, at and above which a skill counts as known, instead of the limits from false_new and
    false_known. Raise it for more experts; lower it for fewer. null: use the limits."""
    adaptive_delta: float = 0.0
    """Lowers growth.threshold as the library grows: tau_k = threshold - adaptive_delta * log(1 + k) for k library entries.
    At least 0; 0 keeps it fixed."""
    similarity: Literal["max", "median"] = "max"
    """Statistic of the similarities to all library entries that is judged: their maximum or their median. A median needs a
    growth.threshold."""
    whitening: float = 0.1
    """Regularization of the whitening of skill embeddings, at least 0: this multiple of the mean eigenvalue is added to
    the reference covariance. Larger values whiten less; 0 only centers the embeddings."""
    projection: str | None = None
    """Projection head for skill embeddings, a file written by tools/benchmarks/train_projection.py for the same base
    and growth.whitening. It needs a growth.threshold, because its cosines have a scale of their own. null: compare the
    embeddings directly."""
    moving_average: float = 0.1
    """Weight of a new arrival of a known skill in that skill's embedding, from 0 to 1. 0 keeps the embedding of the
    first arrival. An arrival that is served by another expert than the nearest skill's moves none."""
    split: bool = True
    """Split a skill whose documents form several clusters; each part then gets its own decision and its own training.
    Turn it off to keep every source whole."""
    document_novelty: Literal["similarity", "energy"] = "similarity"
    """Score behind the logged share of novel documents (`novel_documents`): similarity is the largest cosine to the
    library, energy the free energy over it. The decision does not use it."""
    min_samples: int = 32
    """Minimum number of training documents of a skill, at least 1. A smaller skill is refused with an error, and a
    split makes no smaller part."""
    min_tokens: int = 1000
    """Minimum number of training tokens of a skill, at least 1. A smaller skill is refused with an error."""
    embedding_samples: int = 128
    """Maximum number of documents embedded for the decision, at least growth.min_samples. More documents narrow the
    similarity's interval and enlarge the checkpoint."""
    batch_samples: int = 16
    """Documents per random batch when documents are drawn for the embedding, at least 1. A last batch of less than half
    this size is dropped."""
    bootstrap: int = 500
    """Bootstrap resamples behind the intervals of the similarity and of the probe's gain, at least 50."""
    confidence: float = 0.95
    """Coverage of the intervals of the similarity and of the probe's gain, at least 0.5 and below 1. Raise it to call
    more cases undecided."""
    freeze_after: int = 0
    """Evaluations without improvement, the last in the mature phase, after which the projections in `freeze_first` are
    frozen; fewer than `training.patience`, which ends the skill. 0: all projections train until the skill ends."""
    freeze_first: list[str] = field(default_factory=lambda: ["q_proj"])
    """Projections of an expert that growth.freeze_after freezes first; each must be in model.projections."""
    replay_fraction: float = 0.5
    """Share of replayed documents, from the expert's earlier skills, in the data that refines it; at least 0 and below
    1. Raise it if refinements are rolled back for forgetting."""
    cooldown_steps: int = 0
    """Training steps that must pass after one expert is created before the next may be. A novel skill that arrives
    earlier waits, and is decided again later."""
    max_experts: int = 64
    """Maximum number of experts in the pool, at least 1. When it is full, a novel skill is served by an existing expert
    or the base, without training."""
    dense_steps: int = 6
    """Length of the dense phase: the first steps of a skill that gets a new expert, with dense routing. At most a third
    of the skill's steps."""
    anneal_steps: int = 6
    """Length of the annealing phase after the dense phase: top-k routing with at least 2 experts per token while the
    temperature falls. At most a third of the skill's steps; the mature phase takes the rest."""
    top_k: int = 3
    """Experts per token in the mature phase and in use, counting the null expert; at least 1. Values below 3 measured a
    higher loss."""
    dense_experts: int = 16
    """In the dense phase every token is routed to all experts, or to the top this many of a larger pool; at least 1. It
    also caps how many of the nearest experts expert_init averages."""
    expert_init: Literal["mean", "scratch"] = "mean"
    """Initialization of a new expert. mean: the mean update of the existing experts (of the nearest dense_experts in a
    larger pool), truncated to the new rank. scratch: a standard LoRA initialization with B = 0."""
    min_gate: float = 0.5
    """Minimum gate of an expert on every token of its skill while it trains, from 0 to 1. It guarantees a gradient and
    keeps the expert from relying on others; 1 trains it alone."""
    temperature: float = 1.5
    """Router softmax temperature in the dense phase, above 0. Higher values spread the gates more evenly."""
    final_temperature: float = 1.0
    """Router softmax temperature in the mature phase and in use, above 0. The annealing phase interpolates linearly
    from growth.temperature to it."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    bandit: BanditConfig = field(default_factory=BanditConfig)
    rank: RankConfig = field(default_factory=RankConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)

    def __post_init__(self) -> None:
        require_finite(self)
        fixed = self.threshold is not None
        require(
            self.threshold is None or -1 <= self.threshold <= 1,
            f"threshold: {self.threshold} is not a cosine (-1 to 1)",
        )
        require(
            fixed or self.adaptive_delta == 0, "adaptive_delta: it lowers growth.threshold, which is null; give both"
        )
        require(fixed or self.similarity == "max", "similarity: a median needs a growth.threshold; give both")
        require(fixed or self.projection is None, "projection: a projection head needs a growth.threshold; give both")
        require(self.adaptive_delta >= 0, f"adaptive_delta: {self.adaptive_delta} is below 0")
        require(self.whitening >= 0, f"whitening: {self.whitening} is below 0")
        require(self.epsilon >= 0, f"epsilon: {self.epsilon} is below 0")
        for name in ("false_new", "false_known"):
            require(0 < getattr(self, name) < 0.5, f"{name}: {getattr(self, name)} is not between 0 and 0.5")
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
