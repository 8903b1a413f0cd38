"""Options of data packing, the model, training and logging."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from dylora_mlx.config.checks import require, require_finite
from dylora_mlx.config.optimizers import OptimizerConfig, OptimizerName

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
CHAT_TEMPLATES = ("gemma", "chatml")
"""Chat templates that ship with the package, for bases that have none."""


TrackerName = Literal["wandb", "tensorboard", "trackio", "swanlab"]


@dataclass(frozen=True)
class DataConfig:
    """Data splits, packing and the feature cache."""

    max_seq_length: int = 640
    """Tokens in one packed row, at least 16. Longer documents are split into windows of this length. Lower it to save
    memory."""
    packing_window: int = 256
    """Documents that are packed together, at least 1. A larger window leaves less padding; a smaller one keeps the
    order more random."""
    validation_fraction: float = 0.1
    """Share of the records held out for validation when the source has no validation split; between 0 and 0.5."""
    test_fraction: float = 0.1
    """Share of the records held out for testing when the source has no test split; between 0 and 0.5."""
    feature_cache_mb: int = 8192
    """Maximum size of the on-disk feature cache of one skill, in MiB, with model.router_layer: final. A skill that
    needs more recomputes the base pass at every step; 0 disables the cache."""
    chat_template: str | None = None
    """Chat template in place of the base's: gemma, chatml, a file with a Jinja template, or its text. null: the base's
    own, or gemma for a base without one."""

    def __post_init__(self) -> None:
        require_finite(self)
        template = self.chat_template
        require(template is None or bool(template.strip()), "chat_template: names no template")
        require(self.max_seq_length >= 16, f"max_seq_length: {self.max_seq_length} is not at least 16")
        require(self.packing_window >= 1, f"packing_window: {self.packing_window} is not at least 1")
        require(self.feature_cache_mb >= 0, f"feature_cache_mb: {self.feature_cache_mb} is below 0")
        for name in ("validation_fraction", "test_fraction"):
            require(0 < getattr(self, name) < 0.5, f"{name}: {getattr(self, name)} is not between 0 and 0.5")


@dataclass(frozen=True)
class ModelConfig:
    """The base model, the LoRA experts and the router."""

    base: str = "embedded"
    """Base model: embedded, a folder, a GGUF file, or a hub id such as google/gemma-3-270m. Gemma 3 (text), Llama and
    Qwen3 are supported, also quantized to 4 or 8 bits."""
    preset: Literal["auto", "tiny", "small", "large"] = "auto"
    """Defaults for options that the config and the command line leave out: tiny for bases under 50 million parameters
    (the defaults shown here), small up to a billion, large above. auto: by the size of model.base."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the base weights. auto: float32 on a CPU, bfloat16 on a GPU. Experts are always float32. Choose
    float32 if losses become non-finite."""
    rank: int = 8
    """Rank r of a new expert. At least 1; an entry of skills may set its own. Raise it for skills that need more
    capacity."""
    alpha: float = 16.0
    """LoRA alpha of a new expert, above 0: its update is scaled by alpha / r. Change it together with model.rank."""
    use_rslora: bool = False
    """Scale a new expert's update by alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023), so that a higher rank needs no other
    alpha. The expert is stored with the alpha that gives this scale as alpha / r; a rank that grows keeps the scale."""
    projections: list[str] | Literal["all-linear"] = "all-linear"
    """Linear layers of a block that carry experts: any of q_proj k_proj v_proj o_proj gate_proj up_proj down_proj, or
    all-linear for all of them. Fewer give smaller experts that learn less."""
    router_layer: int | Literal["final"] = "final"
    """Hidden states that the router reads: final for the base model's final-norm states (two forward passes), or a
    layer number for that layer's input (one pass; only the layers from there on carry experts)."""
    document_mean_weight: float = 0.8
    """Weight of the mean over the document's tokens so far in the router input, from 0 to 1; the current token has the
    rest. Raise it if skills look alike token by token; 0 reads single tokens, as PEFT's X-LoRA does."""
    document_mean_decay: float = 0.9
    """Weight of a token in that mean relative to the next one, above 0 and at most 1. 1 is the plain mean of the document,
    which finds the skill of a whole document best, but hardly follows a text that turns to another skill."""
    gather_threshold: float | Literal["auto"] = "auto"
    """Use gather instead of a dense matmul over all experts once num_experts > gather_threshold * top_k; at least 0.
    auto measures the ratio once per run, at nine experts."""
    expert_memory_mb: int | None = None
    """Memory for frozen experts, in MB: the least recently used ones beyond it are offloaded to files and read when a
    token uses them. Set it if the pool does not fit in memory. null: no offload."""
    mixing: Literal["layers", "logits"] = "layers"
    """Point at which experts are combined. layers: every adapted layer, in one pass. logits: only the output logits,
    with one pass per expert and no KV cache; for comparison."""

    def __post_init__(self) -> None:
        require_finite(self)
        require(bool(self.base.strip()), "base: names no base (embedded, a folder, a GGUF file, or a hub id)")
        require(self.rank >= 1, f"rank: {self.rank} is not at least 1")
        require(self.alpha > 0, f"alpha: {self.alpha} is not above 0")
        ratio = self.gather_threshold
        known = ratio == "auto" or (not isinstance(ratio, str) and ratio >= 0)
        require(known, f"gather_threshold: {ratio} is neither auto nor at least 0")
        require(
            self.expert_memory_mb is None or self.expert_memory_mb >= 0,
            f"expert_memory_mb: {self.expert_memory_mb} is below 0",
        )
        names = self.projection_names
        require(len(names) > 0, "projections: name at least one")
        for name in names:
            require(
                name in ATTENTION + MLP,
                f"projections: '{name}' is not one of {', '.join(ATTENTION + MLP)}; all-linear means all of them",
            )
        require(len(set(names)) == len(names), "projections: one is named twice")
        require(
            0 <= self.document_mean_weight <= 1,
            f"document_mean_weight: {self.document_mean_weight} is not between 0 and 1",
        )
        require(
            0 < self.document_mean_decay <= 1,
            f"document_mean_decay: {self.document_mean_decay} is not above 0 and at most 1",
        )
        require(
            self.router_layer == "final" or (isinstance(self.router_layer, int) and self.router_layer >= 0),
            f"router_layer: {self.router_layer} is below 0",
        )

    def stored_alpha(self, rank: int, alpha: float) -> float:
        """Return the alpha of an expert's record: alpha / rank of it is the scale of the update, rsLoRA's too."""
        return alpha * math.sqrt(rank) if self.use_rslora else alpha

    @property
    def projection_names(self) -> list[str]:
        """Names of the projections that carry experts."""
        return [*ATTENTION, *MLP] if isinstance(self.projections, str) else self.projections


@dataclass(frozen=True)
class TrainingConfig:
    """The training of one skill: batch size, optimizer and scheduler, loss terms, evaluation and checkpoints."""

    epochs: int = 2
    """Passes over a skill's documents, at least 1. training.max_steps and early stopping may end the skill sooner."""
    max_steps: int | None = None
    """Maximum number of optimizer steps per skill, at least 1. null: as many as the epochs take."""
    batch_size: int = 1
    """Packed rows in one micro-batch, at least 1. Lower it if memory runs out."""
    grad_accumulation_steps: int = 2
    """Micro-batches per optimizer step, weighted by their learned tokens. Distributed ranks share them, so it must be
    at least the world size."""
    learning_rate: float = 1e-2
    """Peak learning rate of the experts, between 0 and 1, or 1000 for sgd. Lower it if the loss spikes or becomes non-finite. The default
    is AdamW's; model.preset small sets 5e-4 and large 2e-4."""
    router_learning_rate: float = 1e-4
    """Peak learning rate of the router (AdamW), between 0 and 1. Lower it if routing collapses onto few experts."""
    loraplus_lr_ratio: float = 1.0
    """Learning rate of the factors B over that of the factors A (LoRA+, Hayou et al. 2024), above 0. 1 is plain LoRA."""
    lr_schedule: Literal["cosine_decay", "linear", "exponential_decay", "step_decay", "constant"] = "cosine_decay"
    """How the learning rates fall after the warmup. cosine_decay and linear fall to lr_min_fraction; exponential_decay by
    a factor at every step, step_decay every lr_step_size steps; constant does not fall."""
    lr_warmup_fraction: float = 0.1
    """Share of a skill's steps with linear learning-rate warmup, from 0 to 1. The same scheduler drives experts and
    router."""
    lr_min_fraction: float = 0.1
    """Lowest learning rate after the warmup as a share of the peak, from 0 to 1. The schedules that fall end with it."""
    lr_decay_rate: float | None = None
    """Factor of exponential_decay and step_decay, between 0 and 1. null: the one that ends at lr_min_fraction."""
    lr_step_size: int | None = None
    """Steps between two decays of step_decay, at least 1."""
    optimizer: OptimizerName = "adamw"
    """Optimizer of the experts; their best learning rates differ. The router always has AdamW."""
    optimizer_config: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora_dropout: float = 0.0
    """Dropout of the inputs of the expert that is trained, from 0 to below 1. Never in evaluation, nor on replayed
    text."""
    weight_decay: float | Literal["auto"] = "auto"
    """Weight decay, at least 0: decoupled for adamw, lion and adafactor, part of the gradient for muon and sgd; adam has
    none. auto: mlx's, 0.01 for adamw and muon, 0 for the others. The router has the same, with auto 0.01."""
    max_grad_norm: float = 1.0
    """Norm that the gradients of the experts are clipped to, and those of the router apart from them. 0 disables
    clipping."""
    load_balance_coef: float = 0.0
    """Coefficient of the load balance loss E * sum_e f_e P_e, at least 0. Set it to about 0.01 if routing collapses
    onto few experts."""
    entropy_coef: float = 0.0
    """Coefficient of the mean entropy of the gates, at least 0. Above 0, each token's gates concentrate on fewer
    experts."""
    z_loss_coef: float = 1e-4
    """Coefficient of the router z-loss, the mean squared log-sum-exp of the centred router logits; at least 0. It keeps
    their differences small."""
    rehearsal_coef: float = 0.5
    """Coefficient of rehearsal, the router's cross-entropy on remembered features of earlier skills and on the current
    skill's; at least 0. Raise it if the router forgets earlier skills."""
    router_fit_steps: int = 60
    """Full-batch steps of the correction that fits the router to remembered tokens when the pool changes. 0: the rows
    come from the statistics of all tokens alone."""
    rehearsal_tokens: int = 1024
    """Remembered features drawn per step for rehearsal, over all earlier skills together; at least 1."""
    memory_tokens: int = 2048
    """Router features remembered per skill, at least 1. More give the router a better fit and a larger checkpoint."""
    replay_coef: float = 0.0
    """Coefficient of the language-model loss on replayed text of earlier skills, one micro-batch per step; at least 0.
    0: no replay."""
    distillation_coef: float = 0.0
    """Coefficient of the KL divergence from the mixture before this skill to the current one, on the same replayed
    text; at least 0. 0: no distillation."""
    replay_tokens: int = 4096
    """Tokens of whole documents (exemplars) stored per skill for replay and distillation, at least 0. 0 stores no text
    in the checkpoint."""
    capacity_factor: float = 0.0
    """Expert capacity in training, as a multiple of an even share of the batch's tokens; the null expert takes the
    overflow. 0: no limit."""
    steps_per_eval: int = 25
    """Steps between evaluations of the skill that is learned and of early_stop_domain, at least 1. The end of each skill
    is always evaluated, and then every domain."""
    early_stop_domain: str = "current"
    """Domain whose validation loss selects the weights to keep and drives early stopping: a domain's name, or current
    for the skill being learned."""
    patience: int = 5
    """Evaluations without improvement after which a skill ends (early stopping), at least 1."""
    min_improvement: float = 0.0
    """The loss of early_stop_domain must fall by more than this, in nats per token, to count as improved; at least
    0."""
    save_every: int = 100
    """Steps between checkpoints, at least 1. The end of each skill always writes one."""
    keep_checkpoints: int = 2
    """Number of recent checkpoints to keep, at least 1 (`save_total_limit` in transformers)."""
    checkpoints_mb: int | None = None
    """Megabytes (10^6 bytes) that the checkpoints of steps may take together, at least 1. Above it the oldest are removed,
    never the newest. null: no limit."""
    max_skipped: int = 5
    """Consecutive updates with a non-finite loss or gradient after which the run stops, at least 1. Each of them is
    skipped."""
    grad_checkpoint: bool = False
    """Recompute each block's activations in the backward pass (gradient checkpointing): less memory for about a third
    more time."""

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
        for name in ("max_steps", "checkpoints_mb"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}: {value} is not at least 1")
        for name in ("learning_rate", "router_learning_rate"):
            highest = 1000 if (name, self.optimizer) == ("learning_rate", "sgd") else 1
            require(0 < getattr(self, name) < highest, f"{name}: {getattr(self, name)} is not between 0 and {highest}")
        for name in ("lr_warmup_fraction", "lr_min_fraction"):
            require(0 <= getattr(self, name) <= 1, f"{name}: {getattr(self, name)} is not between 0 and 1")
        for name in (
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
        require(self.loraplus_lr_ratio > 0, f"loraplus_lr_ratio: {self.loraplus_lr_ratio} is not above 0")
        require(0 <= self.lora_dropout < 1, f"lora_dropout: {self.lora_dropout} is not from 0 to below 1")
        self._check_schedule()
        self.optimizer_config.check_only(self.optimizer)
        decay = self.weight_decay
        require(isinstance(decay, str) or decay >= 0, f"weight_decay: {decay} is below 0")
        without = self.optimizer == "adam" and not isinstance(decay, str) and decay > 0
        require(not without, f"weight_decay: {decay}, but adam has none; set training.optimizer: adamw")

    def _check_schedule(self) -> None:
        rate, size, schedule = self.lr_decay_rate, self.lr_step_size, self.lr_schedule
        decays = schedule in ("exponential_decay", "step_decay")
        require(rate is None or 0 < rate < 1, f"lr_decay_rate: {rate} is not between 0 and 1")
        require(
            rate is None or decays,
            f"lr_decay_rate: {schedule} has no decay rate; only exponential_decay and step_decay",
        )
        require(size is None or size >= 1, f"lr_step_size: {size} is not at least 1")
        require(
            (size is None) != (schedule == "step_decay"),
            "lr_step_size: step_decay needs it"
            if size is None
            else f"lr_step_size: {schedule} has no steps; only step_decay",
        )
        require(
            not decays or rate is not None or self.lr_min_fraction > 0,
            f"lr_min_fraction: {schedule} never reaches 0; give lr_decay_rate",
        )


@dataclass(frozen=True)
class LogConfig:
    """Metric records, and the experiment trackers that they are also logged to."""

    steps_per_report: int = 5
    """Steps between two training records in metrics.jsonl, at least 1."""
    to: list[TrackerName] = field(default_factory=list)
    """Experiment trackers to log to: any of wandb, tensorboard, trackio, swanlab. Each needs its package, the extra of that
    name. metrics.jsonl is written always."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases mode; offline and online log to it as log.to does. disabled: online if log.to has wandb."""
    swanlab: Literal["offline", "online"] = "offline"
    """SwanLab mode, if log.to has swanlab. offline keeps its files in the run folder, for swanlab sync."""
    project_name: str = "dylora-mlx"
    """Project of Weights & Biases, Trackio and SwanLab."""
    artifact: bool = False
    """Upload the final experts, router and library to Weights & Biases as an artifact."""

    def __post_init__(self) -> None:
        require(self.steps_per_report >= 1, f"steps_per_report: {self.steps_per_report} is not at least 1")
        require(len(set(self.to)) == len(self.to), "to: a tracker is named twice")
        require(self.swanlab == "offline" or "swanlab" in self.to, "swanlab: log.to does not have swanlab")

    @property
    def trackers(self) -> list[TrackerName]:
        """Names of the trackers to log to."""
        also: list[TrackerName] = ["wandb"] if self.wandb != "disabled" and "wandb" not in self.to else []
        return also + self.to
