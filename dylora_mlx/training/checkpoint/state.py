"""Where a run stands, and its round trip through a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from dylora_mlx.adapters import mlx_lm
from dylora_mlx.data.stream import Skill
from dylora_mlx.errors import UserError
from dylora_mlx.growth.decide.policy import Decision
from dylora_mlx.growth.library import Library
from dylora_mlx.growth.pool import ExpertRecord, Pool
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.experts.offload import OffloadedExpert
from dylora_mlx.system.files import is_number
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.checkpoint.checkpoint import CheckpointContent
from dylora_mlx.training.step.optimizers import Optimizers


@dataclass
class BestState:
    """Early stopping within one skill: the best loss so far, and the weights that reached it."""

    phase: str = ""
    """Of the routing in force: losses under different routing do not compare."""
    loss: float | None = None
    step: int = 0
    evals_since_best: int = 0
    """Evaluations since then."""
    weights: dict[str, mx.array] = field(default_factory=dict)


@dataclass
class AnomalyState:
    """What the warnings about losses and routing compare with."""

    losses: list[float] = field(default_factory=list)
    """Of the skill's last steps, finite ones."""
    in_spike: bool = False
    """Whether the last loss was far above those before."""
    unserved: dict[str, int] = field(default_factory=dict)
    """By domain, evaluations in a row in which its expert got next to no token of it."""
    collapsed: int = 0
    """Evaluations in a row in which one expert got every token."""


@dataclass
class TrainerState:
    """Where a run stands. trainer.json holds it, arrays apart."""

    step: int = 0
    """Optimization steps in all."""
    skill_index: int = 0
    """Index of the skill at hand in the stream."""
    skill_step: int = 0
    """The next step of that skill."""
    decision: Decision | None = None
    """About the skill at hand, once it is made."""
    matrix: list[dict[str, float]] = field(default_factory=list)
    """Losses by domain: the base's first, then a row after each skill."""
    flops: int = 0
    """Counted so far."""
    last_creation: int | None = None
    """Step at which the newest expert was created."""
    data_digests: dict[str, str] = field(default_factory=dict)
    """Of each skill's training data, by name."""
    metric_lines: int = 0
    """Lines of metrics.jsonl that this state covers."""
    decision_lines: int = 0
    """Lines of decisions.jsonl that this state covers."""
    removals: int = 0
    """Attempts to merge or evict experts."""
    skipped: int = 0
    """Updates that were left out because something was not finite."""
    skipped_in_row: int = 0
    last_rank_check: tuple[int, float] | None = None
    """Step and watched loss when rank growth was last considered."""
    gather_threshold: float | None = None
    """As measured on this device, once the pool is large enough (model/experts/autotune.py)."""
    skill_parts: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """Of each skill that was split: the part of each document, by data split."""
    anomalies: AnomalyState = field(default_factory=AnomalyState)
    teacher_gate: dict[str, mx.array] = field(default_factory=dict)
    """The router's weight and bias before the skill at hand, for distillation."""
    best: BestState = field(default_factory=BestState)

    def next_skill(self) -> None:
        self.skill_index, self.skill_step, self.decision = self.skill_index + 1, 0, None
        self.last_rank_check, self.best, self.teacher_gate = None, BestState(), {}
        self.anomalies = replace(self.anomalies, losses=[], in_spike=False)


def _flatten(tree: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))


def checkpoint_content(
    state: TrainerState, base: Base, pool: Pool, library: Library, optimizers: Optimizers
) -> CheckpointContent:
    """Everything a run needs to go on, as checkpoint files."""
    trainer = _trainer_json(state)
    moments = {"experts": optimizers.experts.state, "router": optimizers.router.state}
    files = {"trainer.json": trainer, "optimizer.safetensors": _flatten(moments), **pool_files(base, pool, library)}
    aside = {"best.safetensors": state.best.weights, "teacher_gate.safetensors": state.teacher_gate}
    return files | {name: arrays for name, arrays in aside.items() if arrays}


def _trainer_json(state: TrainerState) -> dict[str, Any]:
    """Everything but the arrays, which have files of their own."""
    trainer = asdict(replace(state, decision=None, teacher_gate={}, best=replace(state.best, weights={})))
    del trainer["teacher_gate"], trainer["best"]["weights"]
    return trainer | {"decision": None if state.decision is None else state.decision.to_json()}


def pool_files(base: Base, pool: Pool, library: Library) -> CheckpointContent:
    """Experts, router and library as checkpoint files. Expert folders are mlx-lm adapters by themselves."""
    described = {"base": base.fingerprint, "tokenizer": base.tokenizer_hash, "experts": pool.describe()}
    files: CheckpointContent = {
        "pool.json": {**described, "library": library.describe()},
        "router.safetensors": _flatten(pool.model.router.parameters()),
        "library.safetensors": library.arrays(),
    }
    for expert_id, expert in enumerate(pool.model.experts, 1):
        folder = f"experts/expert_{expert_id}"
        files[f"{folder}/adapters.safetensors"] = (
            expert.path if isinstance(expert, OffloadedExpert) else mlx_lm.weights(expert)
        )
        files[f"{folder}/adapter_config.json"] = mlx_lm.config(expert, base.name)
    return files


def restore_pool(files: CheckpointContent, base: Base, pool: Pool, folder: Path) -> Library:
    """Rebuild experts, router and library from the files of a checkpoint in `folder`. Where the pool has a shelf, frozen
    experts stand there from then on. Raises UserError when it belongs to another base, and for what no checkpoint of ours
    holds."""
    with damage_is_user_error("pool.json, the router's or the library's file"):
        description = files["pool.json"]
        if description["base"] != base.fingerprint:
            raise UserError(
                f"this checkpoint was made with another base than {base.name}: give the base it was trained on"
            )
        if description["tokenizer"] != base.tokenizer_hash:
            raise UserError(
                f"this checkpoint was made with another tokenizer than that of {base.name}: put the old one back"
            )
        for expert_id, found in enumerate(description["experts"], 1):
            record = ExpertRecord.from_json(found)
            partly, frozen = list(record.frozen_projections), record.frozen
            name = f"experts/expert_{expert_id}/adapters.safetensors"
            weights = files[name]
            mlx_lm.check_rank(weights, record.rank)  # before an expert of that size is made
            pool.add(record, mx.random.key(0))
            mlx_lm.load_weights(pool.model.experts[expert_id - 1], weights)
            pool.freeze_projections(expert_id, partly)
            if frozen:
                pool.freeze(expert_id)
            if frozen and pool.cache is not None:
                files[name] = folder / name  # its arrays are let go
                pool.offload(expert_id, folder / name, mlx_lm.factor_names(pool.model.shapes))
        pool.model.router.load_arrays(files["router.safetensors"])
        return Library.restore(description["library"], checkpoint.numpy_arrays(files["library.safetensors"]))


def imported_trainer(skills: int) -> dict[str, Any]:
    """trainer.json of a run that came with its skills learned: no step, and a matrix yet to be measured."""
    return _trainer_json(TrainerState(skill_index=skills, matrix=[{} for _ in range(skills + 1)]))


def add_imported_skill(trainer: dict[str, Any], skill: Skill, base: float, mixture: float) -> None:
    """Put a skill that came with its expert at the end of what a run has learned. base, mixture: its losses."""
    trainer["skill_index"] += 1
    trainer["data_digests"][skill.name] = skill.digest
    trainer["matrix"][0][skill.name] = base
    trainer["matrix"].append({skill.name: mixture})


def restore_training(files: CheckpointContent, optimizers: Optimizers) -> TrainerState:
    """Rebuild optimizer moments and the run's state. Raises UserError for what no checkpoint of ours holds."""
    with damage_is_user_error("trainer.json or the moments' file"):
        if "optimizer.safetensors" in files:
            moments = tree_unflatten(list(files["optimizer.safetensors"].items()))
            assert isinstance(moments, dict)
            optimizers.experts.state, optimizers.router.state = moments["experts"], moments["router"]
        trainer = dict(files["trainer.json"])
        validate_trainer(trainer)
        decision, best = trainer.pop("decision"), trainer.pop("best")
        anomalies = AnomalyState(**trainer.pop("anomalies"))
        return TrainerState(
            **trainer,
            decision=None if decision is None else Decision.from_json(decision),
            best=BestState(**best, weights=dict(files.get("best.safetensors", {}))),
            anomalies=anomalies,
            teacher_gate=dict(files.get("teacher_gate.safetensors", {})),
        )


def trainable_weights(pool: Pool) -> dict[str, mx.array]:
    """A copy of the weights that a skill trains, by name, for going back to the best state."""
    return {name: mx.array(value) for name, value in _flatten(pool.model.trainable_parameters()).items()}


def grow_best_rank(best: BestState, pool: Pool) -> None:
    """Give the best weights the ranks that their expert has now; they compute what they did."""
    for name, own in trainable_weights(pool).items():
        kept = best.weights.get(name, own)
        if kept.shape != own.shape:
            new = own[:, kept.shape[1] :] if kept.shape[0] == own.shape[0] else own[kept.shape[0] :]
            best.weights[name] = mx.concatenate([kept, new], axis=1 if kept.shape[0] == own.shape[0] else 0)


def step_folder_name(step: int) -> str:
    return f"step-{step:06d}"


COUNTERS = (
    "step",
    "skill_index",
    "skill_step",
    "flops",
    "metric_lines",
    "decision_lines",
    "removals",
    "skipped",
    "skipped_in_row",
)
"""Parts of the state that count something."""


def validate_trainer(trainer: dict[str, Any]) -> None:
    """Raises TypeError, ValueError for values of other types than a run writes: what reads them asks no more."""
    for name in COUNTERS:
        if type(trainer.get(name, 0)) is not int or trainer.get(name, 0) < 0:
            raise TypeError(f"{name} is {trainer[name]!r:.40}")
    tables = [*trainer["matrix"], trainer["data_digests"], trainer["skill_parts"], *trainer["skill_parts"].values()]
    if not all(isinstance(table, dict) for table in tables):
        raise TypeError("a table that is none")
    if not all(is_number(loss) for row in trainer["matrix"] for loss in row.values()):
        raise TypeError("a loss that is no number")
    if not _number_or_none(trainer.get("gather_threshold")):
        raise TypeError(f"gather_threshold is {trainer['gather_threshold']!r:.40}")
    best = trainer["best"]
    if not all(type(best[name]) is int for name in ("step", "evals_since_best")) or not _number_or_none(best["loss"]):
        raise TypeError(f"best is {best!r:.60}")
    anomalies = trainer["anomalies"]
    counts = [*anomalies["unserved"].values(), anomalies["collapsed"]]
    if not all(type(count) is int for count in counts) or not all(map(is_number, anomalies["losses"])):
        raise TypeError("anomalies are no list of losses and counts")
    if trainer["matrix"] and len(trainer["matrix"]) != trainer["skill_index"] + 1:
        raise ValueError(f"losses after {len(trainer['matrix']) - 1} skills, but {trainer['skill']} were learned")


def _number_or_none(value: object) -> bool:
    return value is None or is_number(value)


@contextmanager
def damage_is_user_error(what: str) -> Iterator[None]:
    """Raises UserError for content that has the right hashes, but is not what a checkpoint holds."""
    try:
        yield
    except UserError:
        raise
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        AssertionError,
        OverflowError,
        RuntimeError,
    ) as error:
        raise UserError(f"{what} of this checkpoint is damaged ({error!r:.100}); use an earlier one") from error
