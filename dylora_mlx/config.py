"""Every option, declared once: frozen dataclasses, one section for each folder of the package.

A value that cannot work raises ValueError in `__post_init__`; the command line turns that into one line.
The defaults are the quickstart's: the embedded base on the CPU or GPU at hand.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_finite(section: Any) -> None:
    for entry in fields(section):
        value = getattr(section, entry.name)
        _require(not isinstance(value, float) or math.isfinite(value), f"{entry.name}: {value} is not a finite number")


@dataclass(frozen=True)
class Source:
    """Where the documents of one skill or of one evaluation domain come from, and how they are read."""

    name: str
    """Name of the skill: letters, digits, '_', '-' and '.'."""
    source: str
    """packaged/NAME, a .jsonl file, a folder of split files or of text files, or a hub data set as OWNER/NAME."""
    preset: Literal["none", "mbpp", "code_alpaca"] = "none"
    """Ready field mapping: sets prompt and completion for these data sets."""
    text: str | None = None
    """Template of a plain document over the record's columns, such as '{content}'."""
    prompt: str | None = None
    """Template of the prompt, such as '{instruction}'; needs completion."""
    completion: str | None = None
    """Template of the completion, such as '{output}'."""
    messages: str | None = None
    """Column that holds chat messages, a list of {role, content}."""
    contains: str | None = None
    """Keep only records in which some column contains this text, upper or lower case."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str = "train"
    """Split to train on. Validation and test use the splits of those names where the source has them."""
    limit: int | None = None
    """Use at most this many records of each split, drawn by the seed."""
    completion_only: bool = True
    """Learn only completions and assistant turns; plain text is always learned whole."""
    rank: int | None = None
    """Rank of this skill's expert, instead of model.rank."""
    alpha: float | None = None
    """Alpha of this skill's expert, instead of model.alpha."""

    def __post_init__(self) -> None:
        _require_finite(self)
        _require(_NAME.fullmatch(self.name) is not None, f"name: '{self.name}' is not a name (letters, digits, _ - .)")
        _require(bool(self.source.strip()), f"source: skill '{self.name}' names no source")
        _require(
            (self.prompt is None) == (self.completion is None),
            f"skill '{self.name}': prompt and completion go together, give both or neither",
        )
        _require(self.limit is None or self.limit >= 1, f"limit: {self.limit} of skill '{self.name}' is not at least 1")
        _require(self.rank is None or self.rank >= 1, f"rank: {self.rank} of skill '{self.name}' is not at least 1")
        _require(self.alpha is None or self.alpha > 0, f"alpha: {self.alpha} of skill '{self.name}' is not above 0")


@dataclass(frozen=True)
class Data:
    """Splitting and packing."""

    row_length: int = 640
    """Tokens in one packed row; longer documents are split into windows of this length."""
    pack_window: int = 256
    """Documents that are packed together; larger packs tighter, smaller keeps the order more random."""
    validation_fraction: float = 0.1
    """Share of a source without a validation split that is held out for validation."""
    test_fraction: float = 0.1
    """Share of a source without a test split that is held out for test."""
    feature_cache_mb: int = 8192
    """Disk space for the base's features of one skill; beyond it they are computed again at every step."""

    def __post_init__(self) -> None:
        _require_finite(self)
        _require(self.row_length >= 16, f"row_length: {self.row_length} is not at least 16")
        _require(self.pack_window >= 1, f"pack_window: {self.pack_window} is not at least 1")
        _require(self.feature_cache_mb >= 0, f"feature_cache_mb: {self.feature_cache_mb} is below 0")
        for name in ("validation_fraction", "test_fraction"):
            _require(0 < getattr(self, name) < 0.5, f"{name}: {getattr(self, name)} is not between 0 and 0.5")


@dataclass(frozen=True)
class Model:
    """The base, the experts and the router."""

    base: str = "embedded"
    """embedded, a folder with a Gemma 3 text model, or a hub id such as google/gemma-3-270m."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the base's weights: auto is float32 on a CPU and bfloat16 on a GPU. Experts are float32."""
    rank: int = 8
    """Rank r of a new expert."""
    alpha: float = 16.0
    """Alpha of a new expert: its update is scaled by alpha / r."""
    projections: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Projections that carry experts, out of q_proj k_proj v_proj o_proj gate_proj up_proj down_proj."""
    tap: int | Literal["final"] = "final"
    """Where the router reads: the base's final states (exports as X-LoRA), or the input of this layer."""

    def __post_init__(self) -> None:
        _require_finite(self)
        _require(self.rank >= 1, f"rank: {self.rank} is not at least 1")
        _require(self.alpha > 0, f"alpha: {self.alpha} is not above 0")
        _require(len(self.projections) > 0, "projections: name at least one")
        for name in self.projections:
            _require(name in ATTENTION + MLP, f"projections: '{name}' is not one of {', '.join(ATTENTION + MLP)}")
        _require(len(set(self.projections)) == len(self.projections), "projections: one is named twice")
        _require(self.tap == "final" or (isinstance(self.tap, int) and self.tap >= 0), f"tap: {self.tap} is below 0")


@dataclass(frozen=True)
class Growth:
    """Novelty detection, the decision, and maturity."""

    base_skill: Source | None = field(default_factory=lambda: Source(name="python", source="packaged/python"))
    """What the base already knows: the library's first entry, held by the null expert. Null for none."""
    threshold: float = 0.75
    """Cosine similarity at and above which a skill counts as known (tau before any adaptation)."""
    adaptive_delta: float = 0.0
    """tau_k = threshold - adaptive_delta * log(1 + k) for a library of k skills."""
    similarity: Literal["max", "median"] = "max"
    """Which of the similarities to the library is compared with the threshold."""
    whitening: float = 0.1
    """Whiten embeddings by the reference covariance, this much of its mean eigenvalue added; 0 only centres."""
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
    cooldown_steps: int = 0
    """Training steps that must pass after a creation before the next one."""
    max_experts: int = 64
    """No expert is created beyond this number."""
    warmup_steps: int = 6
    """Steps after which a new expert is mature, and routing may turn sparse (at most a third of the skill's steps)."""
    top2_steps: int = 6
    """Steps of top-2 routing before top-1 (at most a third of the skill's steps)."""
    final_top_k: int = 2
    """Experts per token at the end of the schedule; 1 is measured to route worse, by up to 0.04 nats a skill."""
    temperature: float = 1.5
    """Router temperature while an expert is young."""
    final_temperature: float = 1.0
    """Router temperature at the end of the top-2 phase, reached in a straight line."""

    def __post_init__(self) -> None:
        _require_finite(self)
        _require(-1 <= self.threshold <= 1, f"threshold: {self.threshold} is not a cosine (-1 to 1)")
        _require(self.adaptive_delta >= 0, f"adaptive_delta: {self.adaptive_delta} is below 0")
        _require(self.whitening >= 0, f"whitening: {self.whitening} is below 0")
        for name in ("min_samples", "min_tokens", "embedding_samples", "batch_samples", "max_experts", "final_top_k"):
            _require(getattr(self, name) >= 1, f"{name}: {getattr(self, name)} is not at least 1")
        _require(
            self.embedding_samples >= self.min_samples,
            f"embedding_samples: {self.embedding_samples} is below min_samples, {self.min_samples}",
        )
        _require(
            self.bootstrap >= 50, f"bootstrap: {self.bootstrap} resamples are too few for an interval (at least 50)"
        )
        _require(0.5 <= self.confidence < 1, f"confidence: {self.confidence} is not between 0.5 and 1")
        for name in ("cooldown_steps", "warmup_steps", "top2_steps"):
            _require(getattr(self, name) >= 0, f"{name}: {getattr(self, name)} is below 0")
        _require(self.temperature > 0 and self.final_temperature > 0, "temperature: must be above 0")


@dataclass(frozen=True)
class Training:
    """The optimisation of one skill, evaluation, and when to stop."""

    epochs: int = 2
    """Passes over a skill's documents, unless max_steps ends it earlier."""
    max_steps: int | None = None
    """Steps for a skill at most."""
    batch_rows: int = 1
    """Packed rows in one micro-batch."""
    accumulation: int = 2
    """Micro-batches in one step, weighted by their learned tokens."""
    learning_rate: float = 1e-2
    """Peak learning rate of the experts (AdamW)."""
    router_learning_rate: float = 1e-4
    """Peak learning rate of the router."""
    warmup_fraction: float = 0.1
    """Share of a skill's steps over which the rate rises in a straight line."""
    final_fraction: float = 0.1
    """The rate falls along a cosine to this share of its peak."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 turns clipping off."""
    balance: float = 0.0
    """Coefficient of the load-balance loss E * sum_e f_e P_e."""
    z_loss: float = 1e-4
    """Coefficient of the router's z-loss, the mean squared log-sum-exp of its logits."""
    rehearsal: float = 0.5
    """Coefficient of the cross-entropy that teaches the router which expert each remembered feature belongs to."""
    router_fit_steps: int = 100
    """Full-batch steps that fit the router to all remembered features when an expert is added."""
    rehearsal_tokens: int = 1024
    """Remembered tokens drawn for one step, over all earlier skills."""
    memory_tokens: int = 2048
    """Features kept per skill."""
    eval_every: int = 25
    """Steps between evaluations of every domain; each skill's end is evaluated too."""
    early_stop_domain: str = "current"
    """Domain whose validation loss decides which state is kept: a domain's name, or current for the skill at hand."""
    patience: int = 5
    """Evaluations without improvement after which a skill ends."""
    min_improvement: float = 0.0
    """An improvement smaller than this does not count."""
    checkpoint_every: int = 100
    """Steps between checkpoints; each skill's end writes one too."""
    keep_checkpoints: int = 2
    """Checkpoints to keep."""
    grad_checkpoint: bool = False
    """Compute each block's activations again in the backward pass: less memory, about a third more time."""

    def __post_init__(self) -> None:
        _require_finite(self)
        for name in (
            "epochs",
            "batch_rows",
            "accumulation",
            "eval_every",
            "patience",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            _require(getattr(self, name) >= 1, f"{name}: {getattr(self, name)} is not at least 1")
        _require(self.max_steps is None or self.max_steps >= 1, f"max_steps: {self.max_steps} is not at least 1")
        for name in ("learning_rate", "router_learning_rate"):
            _require(0 < getattr(self, name) < 1, f"{name}: {getattr(self, name)} is not between 0 and 1")
        for name in ("warmup_fraction", "final_fraction"):
            _require(0 <= getattr(self, name) <= 1, f"{name}: {getattr(self, name)} is not between 0 and 1")
        for name in (
            "weight_decay",
            "clip_norm",
            "router_fit_steps",
            "balance",
            "z_loss",
            "rehearsal",
            "min_improvement",
        ):
            _require(getattr(self, name) >= 0, f"{name}: {getattr(self, name)} is below 0")
        for name in ("rehearsal_tokens", "memory_tokens"):
            _require(getattr(self, name) >= 1, f"{name}: {getattr(self, name)} is not at least 1")


@dataclass(frozen=True)
class Log:
    """What is written beside the console."""

    every: int = 5
    """Steps between metric records."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases mode; metrics.jsonl is always written."""
    project: str = "dylora-mlx"
    """Weights & Biases project."""

    def __post_init__(self) -> None:
        _require(self.every >= 1, f"every: {self.every} is not at least 1")


@dataclass(frozen=True)
class Config:
    """A whole run: the stream of skills in order, and a section for each part."""

    skills: list[Source]
    """The stream, in order of arrival."""
    domains: list[Source] = field(default_factory=list)
    """Further domains to evaluate, such as one that early stopping watches."""
    seed: int = 0
    """Seed of splits, packing, initial weights and resampling."""
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    growth: Growth = field(default_factory=Growth)
    training: Training = field(default_factory=Training)
    log: Log = field(default_factory=Log)

    def __post_init__(self) -> None:
        _require(len(self.skills) > 0, "skills: the stream is empty, name at least one skill")
        base_skill = [self.growth.base_skill] if self.growth.base_skill else []
        names = [s.name for s in (*base_skill, *self.skills, *self.domains)]
        for name in names:
            _require(names.count(name) == 1, f"skills: two skills or domains are called '{name}'")
        stop = self.training.early_stop_domain
        _require(
            stop in ("current", *names),
            f"training.early_stop_domain: '{stop}' is none of current, {', '.join(names)}",
        )
        _require(0 <= self.seed < 2**31, f"seed: {self.seed} is not between 0 and {2**31 - 1}")
