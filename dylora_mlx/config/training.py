"""Options of data, model, training and logging."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dylora_mlx.config.checks import require, require_finite

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class DataConfig:
    """Splitting and packing."""

    max_seq_length: int = 640
    """Tokens in one packed row; longer documents are split into windows of this length."""
    packing_window: int = 256
    """Documents that are packed together; larger packs tighter, smaller keeps the order more random."""
    validation_fraction: float = 0.1
    """Share of a source without a validation split that is held out for validation."""
    test_fraction: float = 0.1
    """Share of a source without a test split that is held out for test."""
    feature_cache_mb: int = 8192
    """Disk space for the base's features of one skill; beyond it they are computed again at every step."""

    def __post_init__(self) -> None:
        require_finite(self)
        require(self.max_seq_length >= 16, f"max_seq_length: {self.max_seq_length} is not at least 16")
        require(self.packing_window >= 1, f"packing_window: {self.packing_window} is not at least 1")
        require(self.feature_cache_mb >= 0, f"feature_cache_mb: {self.feature_cache_mb} is below 0")
        for name in ("validation_fraction", "test_fraction"):
            require(0 < getattr(self, name) < 0.5, f"{name}: {getattr(self, name)} is not between 0 and 0.5")


@dataclass(frozen=True)
class ModelConfig:
    """The base, the experts and the router."""

    base: str = "embedded"
    """embedded, a folder, or a hub id such as google/gemma-3-270m: Gemma 3 (text), Llama or Qwen3, also of 4 or 8 bits."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the base's weights: auto is float32 on a CPU and bfloat16 on a GPU. Experts are float32."""
    rank: int = 8
    """Rank r of a new expert."""
    alpha: float = 16.0
    """Alpha of a new expert: its update is scaled by alpha / r."""
    projections: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Projections that carry experts, out of q_proj k_proj v_proj o_proj gate_proj up_proj down_proj."""
    router_layer: int | Literal["final"] = "final"
    """Where the router reads: the base's final states, or the input of this layer."""
    document_mean_weight: float = 0.5
    """Share of the document so far in what the router reads: the mean over its tokens; the rest is the token at hand. More tells
    apart skills that look alike token by token; 0 reads single tokens, as PEFT's X-LoRA does."""
    gather_threshold: float | Literal["auto"] = "auto"
    """Experts for each that a token uses from which on these are looked up, token by token, instead of all being computed;
    auto measures it once, when the pool comes to nine."""
    expert_memory_mb: int | None = None
    """Memory for frozen experts: those used last stay in it, others are read from their files when a token uses them. null: all stay."""
    mixing: Literal["layers", "logits"] = "layers"
    """Where experts are mixed: at every layer, or in the logits only (a pass for each expert; for comparison)."""

    def __post_init__(self) -> None:
        require_finite(self)
        require(bool(self.base.strip()), "base: names no base (embedded, a folder, or a hub id)")
        require(self.rank >= 1, f"rank: {self.rank} is not at least 1")
        require(self.alpha > 0, f"alpha: {self.alpha} is not above 0")
        ratio = self.gather_threshold
        known = ratio == "auto" or (not isinstance(ratio, str) and ratio >= 0)
        require(known, f"gather_threshold: {ratio} is neither auto nor at least 0")
        require(
            self.expert_memory_mb is None or self.expert_memory_mb >= 0,
            f"expert_memory_mb: {self.expert_memory_mb} is below 0",
        )
        require(len(self.projections) > 0, "projections: name at least one")
        for name in self.projections:
            require(name in ATTENTION + MLP, f"projections: '{name}' is not one of {', '.join(ATTENTION + MLP)}")
        require(len(set(self.projections)) == len(self.projections), "projections: one is named twice")
        require(
            0 <= self.document_mean_weight <= 1,
            f"document_mean_weight: {self.document_mean_weight} is not between 0 and 1",
        )
        require(
            self.router_layer == "final" or (isinstance(self.router_layer, int) and self.router_layer >= 0),
            f"router_layer: {self.router_layer} is below 0",
        )


@dataclass(frozen=True)
class TrainingConfig:
    """The optimisation of one skill, evaluation, and when to stop."""

    epochs: int = 2
    """Passes over a skill's documents, unless max_steps ends it earlier."""
    max_steps: int | None = None
    """Steps for a skill at most."""
    batch_size: int = 1
    """Packed rows in one micro-batch."""
    grad_accumulation_steps: int = 2
    """Micro-batches in one step, weighted by their learned tokens."""
    learning_rate: float = 1e-2
    """Peak learning rate of the experts (AdamW)."""
    router_learning_rate: float = 1e-4
    """Peak learning rate of the router."""
    lr_warmup_fraction: float = 0.1
    """Share of a skill's steps over which the rate rises in a straight line."""
    lr_min_fraction: float = 0.1
    """The rate falls along a cosine to this share of its peak."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 turns clipping off."""
    load_balance_coef: float = 0.0
    """Coefficient of the load-balance loss E * sum_e f_e P_e."""
    entropy_coef: float = 0.0
    """Coefficient of the gates' mean entropy: above 0, tokens are drawn to fewer experts."""
    z_loss_coef: float = 1e-4
    """Coefficient of the router's z-loss, the mean squared log-sum-exp of its logits."""
    rehearsal_coef: float = 0.5
    """Coefficient of the cross-entropy that teaches the router which expert each remembered feature belongs to."""
    router_fit_steps: int = 100
    """Full-batch steps that fit the router to all remembered features when an expert is added."""
    rehearsal_tokens: int = 1024
    """Remembered tokens drawn for one step, over all earlier skills."""
    memory_tokens: int = 2048
    """Features kept per skill."""
    replay_coef: float = 0.0
    """Coefficient of the loss on replayed text of earlier skills, a micro-batch a step."""
    distillation_coef: float = 0.0
    """Coefficient of the divergence from the mixture as it was before the skill, on the same replayed text."""
    replay_tokens: int = 4096
    """Tokens of documents kept per skill for replay."""
    capacity_factor: float = 0.0
    """An expert serves at most this many times its even share of a batch's tokens while training, the base takes the rest; 0: no limit."""
    steps_per_eval: int = 25
    """Steps between evaluations of every domain; each skill's end is evaluated too."""
    early_stop_domain: str = "current"
    """Domain whose validation loss decides which state is kept: a domain's name, or current for the skill at hand."""
    patience: int = 5
    """Evaluations without improvement after which a skill ends."""
    min_improvement: float = 0.0
    """An improvement smaller than this does not count."""
    save_every: int = 100
    """Steps between checkpoints; each skill's end writes one too."""
    keep_checkpoints: int = 2
    """Checkpoints to keep."""
    max_skipped: int = 5
    """Updates in a row that may be left out because a loss or gradient is not finite; after that many the run stops."""
    grad_checkpoint: bool = False
    """Compute each block's activations again in the backward pass: less memory, about a third more time."""

    def __post_init__(self) -> None:
        require_finite(self)
        for name in (
            "epochs",
            "batch_size",
            "grad_accumulation_steps",
            "steps_per_eval",
            "patience",
            "save_every",
            "keep_checkpoints",
            "max_skipped",
        ):
            require(getattr(self, name) >= 1, f"{name}: {getattr(self, name)} is not at least 1")
        require(self.max_steps is None or self.max_steps >= 1, f"max_steps: {self.max_steps} is not at least 1")
        for name in ("learning_rate", "router_learning_rate"):
            require(0 < getattr(self, name) < 1, f"{name}: {getattr(self, name)} is not between 0 and 1")
        for name in ("lr_warmup_fraction", "lr_min_fraction"):
            require(0 <= getattr(self, name) <= 1, f"{name}: {getattr(self, name)} is not between 0 and 1")
        for name in (
            "weight_decay",
            "max_grad_norm",
            "router_fit_steps",
            "load_balance_coef",
            "entropy_coef",
            "z_loss_coef",
            "rehearsal_coef",
            "replay_coef",
            "distillation_coef",
            "replay_tokens",
            "capacity_factor",
            "min_improvement",
        ):
            require(getattr(self, name) >= 0, f"{name}: {getattr(self, name)} is below 0")
        for name in ("rehearsal_tokens", "memory_tokens"):
            require(getattr(self, name) >= 1, f"{name}: {getattr(self, name)} is not at least 1")


@dataclass(frozen=True)
class LogConfig:
    """What is written beside the console."""

    steps_per_report: int = 5
    """Steps between metric records."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases mode; metrics.jsonl is always written."""
    project_name: str = "dylora-mlx"
    """Weights & Biases project."""
    artifact: bool = False
    """Upload the final adapters, router and library to Weights & Biases as an artifact."""

    def __post_init__(self) -> None:
        require(self.steps_per_report >= 1, f"steps_per_report: {self.steps_per_report} is not at least 1")
