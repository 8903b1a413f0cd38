"""Trainer state, and its conversion to and from checkpoint files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from dylora_mlx.adapters import mlx_lm
from dylora_mlx.data import kept
from dylora_mlx.data.stream import Skill
from dylora_mlx.errors import UserError
from dylora_mlx.growth.decide.policy import Decision
from dylora_mlx.growth.library import Library
from dylora_mlx.growth.pool import ExpertRecord, Pool
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.experts.offload import OffloadedExpert
from dylora_mlx.system.files import is_number
from dylora_mlx.system.frozen_arrays import FrozenArrays
from dylora_mlx.training.checkpoint.checkpoint import CheckpointContent
from dylora_mlx.training.checkpoint.migrate import matrix_file
from dylora_mlx.training.step.optimizers import Optimizers


@dataclass
class BestState:
    """Early stopping within one skill: the best watched loss so far and the weights that reached it."""

    loss: float | None = None
    """Lowest loss under the final routing in nats per token, None before the first evaluation."""
    step: int = 0
    """Optimization step of that loss, counted over the whole run."""
    evals_since_best: int = 0
    """Evaluations without improvement since then; training stops at `training.patience`."""
    weights: dict[str, mx.array] = field(default_factory=dict)
    """Copy of the trainable weights at that step, by name."""


@dataclass
class AnomalyState:
    """History behind the warnings about loss spikes and routing (training/health.py)."""

    losses: list[float] = field(default_factory=list)
    """Finite losses of the last steps of this skill, at most `health.WINDOW`."""
    in_spike: bool = False
    """Whether the last loss was a spike: a spike is reported only when it begins."""
    unserved: dict[str, int] = field(default_factory=dict)
    """By domain, consecutive evaluations in which its own expert received almost none of its tokens."""
    collapsed: int = 0
    """Consecutive evaluations in which one expert received every token."""


@dataclass
class TrainerState:
    """Progress of a run. Saved in trainer.json; arrays and rows of losses have files of their own. Field names are part of the format."""

    step: int = 0
    """Optimization steps so far, over all skills."""
    skill_index: int = 0
    """Index of the current skill in the stream."""
    skill_step: int = 0
    """Next step within the current skill: the cursor that a resumed run starts from."""
    decision: Decision | None = None
    """Decision about the current skill, None until it is made."""
    matrix: list[dict[str, float]] = field(default_factory=list)
    """Validation losses by domain in nats per token: the base first, then one row after each skill."""
    flops: int = 0
    """Training FLOPs so far."""
    last_creation: int | None = None
    """Step at which the newest expert was created, None without one."""
    data_digests: dict[str, str] = field(default_factory=dict)
    """Digest of each skill's and domain's records, by name: `records:` and a sha256. Runs of version 0.1.0 have the sha256
    of the training tokens, without the prefix."""
    metric_lines: int = 0
    """Lines of metrics.jsonl that this state covers; later lines are dropped on resume."""
    decision_lines: int = 0
    """Lines of decisions.jsonl that this state covers; later lines are dropped on resume."""
    removals: int = 0
    """Attempts so far to merge or evict experts."""
    skipped: int = 0
    """Updates skipped because the loss or gradient norm was not finite."""
    skipped_in_row: int = 0
    """Skipped updates in a row; `training.max_skipped` of them stop the run."""
    last_rank_check: tuple[int, float] | None = None
    """Step and watched loss at the last check for rank growth, None before the first."""
    gather_threshold: float | None = None
    """Threshold measured on this device once the pool is large enough (model/experts/autotune.py), None before."""
    skill_parts: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """For each skill that was split: by data split, the part number of each document."""
    attempt: int = 0
    """Trainings of the current skill that were undone before this one."""
    order: list[str] = field(default_factory=list)
    """Names of all skills in the order of learning, if a skill had to wait; empty while it is the config's."""
    waiting: list[str] = field(default_factory=list)
    """Skills that wait for the end of the cooldown, first come first."""
    anomalies: AnomalyState = field(default_factory=AnomalyState)
    """History behind the warnings about loss spikes and routing."""
    teacher_gate: dict[str, mx.array] = field(default_factory=dict)
    """Router weight and bias from before the current skill: the teacher's gate for distillation, and what a new expert that
    is not kept is undone to. Empty between skills."""
    best: BestState = field(default_factory=BestState)
    """Early stopping within the current skill."""

    def next_skill(self) -> None:
        """Advance to the next skill and reset everything that belongs to one skill only."""
        if self.order:
            self.waiting = [name for name in self.waiting if name != self.order[self.skill_index]]
        self.skill_index, self.skill_step, self.decision = self.skill_index + 1, 0, None
        self.last_rank_check, self.best, self.teacher_gate, self.attempt = None, BestState(), {}, 0
        self.anomalies = replace(self.anomalies, losses=[], in_spike=False)


def _flatten(tree: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))


def checkpoint_content(
    state: TrainerState, base: Base, pool: Pool, library: Library, optimizers: Optimizers
) -> CheckpointContent:
    """Return everything needed to resume a run, as checkpoint files."""
    moments = {"experts": optimizers.experts.state, "router": optimizers.router.state}
    files = {**trainer_files(state), "optimizer.safetensors": _flatten(moments), **pool_files(base, pool, library)}
    optional = {"best.safetensors": state.best.weights, "teacher_gate.safetensors": state.teacher_gate}
    return files | {name: arrays for name, arrays in optional.items() if arrays}


def trainer_files(state: TrainerState) -> CheckpointContent:
    """Return trainer.json, the state without its arrays, and a file for each row of the loss matrix."""
    trainer = asdict(replace(state, decision=None, teacher_gate={}, best=replace(state.best, weights={}), matrix=[]))
    del trainer["teacher_gate"], trainer["best"]["weights"], trainer["matrix"]
    decision = None if state.decision is None else state.decision.to_json()
    # Copies: a later checkpoint compares them with the rows of then, to which new domains may have been added.
    rows: CheckpointContent = {matrix_file(number): dict(row) for number, row in enumerate(state.matrix)}
    return {"trainer.json": trainer | {"decision": decision}, **rows}


def _matrix_rows(files: CheckpointContent) -> list[dict[str, float]]:
    """Return the rows of the loss matrix from the files of a checkpoint, up to the first that is missing."""
    return [files[matrix_file(i)] for i in takewhile(lambda number: matrix_file(number) in files, count())]


def pool_files(base: Base, pool: Pool, library: Library) -> CheckpointContent:
    """Return experts, router and library as checkpoint files. Each expert folder is a valid mlx-lm adapter."""
    described = {"base": base.fingerprint, "tokenizer": base.tokenizer_hash, "experts": pool.describe()}
    files: CheckpointContent = {
        "pool.json": {**described, "library": library.describe()},
        "router.safetensors": _flatten(pool.model.router.parameters()),
        **library.files(),
    }
    for expert_id, expert in enumerate(pool.model.experts, 1):
        folder = f"experts/expert_{expert_id}"
        # The file of a frozen expert never changes: a checkpoint links it instead of writing it again.
        if isinstance(expert, OffloadedExpert):
            files[f"{folder}/adapters.safetensors"] = expert.path
        else:
            weights = mlx_lm.weights(expert)
            is_frozen = pool.records[expert_id - 1].frozen
            files[f"{folder}/adapters.safetensors"] = FrozenArrays(weights) if is_frozen else weights
        files[f"{folder}/adapter_config.json"] = mlx_lm.config(expert, base.name)
    return files


def restore_pool(files: CheckpointContent, base: Base, pool: Pool, folder: Path) -> Library:
    """Rebuild experts, router and library from the files of the checkpoint in `folder`.

    If the pool offloads experts (it has a cache), frozen ones are read from the checkpoint's files on demand from then
    on. Raises UserError if the checkpoint belongs to another base or tokenizer, or if its content is invalid.

    Args:
        files: Content of the checkpoint. Entries of offloaded experts are replaced by paths.
        base: The base model, whose fingerprints must match.
        pool: An empty pool to fill.
        folder: Folder of the checkpoint.
    """
    with damage_is_user_error("pool.json, the router's or the library's file"):
        description = files["pool.json"]
        if description["base"] != base.fingerprint:
            raise UserError(
                f"this checkpoint was made with another base than {base.name}: pass the base it was trained on"
            )
        if description["tokenizer"] != base.tokenizer_hash:
            raise UserError(
                f"this checkpoint was made with another tokenizer than that of {base.name}: restore the old tokenizer"
            )
        for expert_id, described in enumerate(description["experts"], 1):
            record = ExpertRecord.from_json(described)
            frozen_projections, frozen = list(record.frozen_projections), record.frozen
            name = f"experts/expert_{expert_id}/adapters.safetensors"
            weights = files[name]
            mlx_lm.check_rank(weights, record.rank)  # before memory for an expert of the stated rank is allocated
            # The key only fills weights that are overwritten on the next line.
            pool.add(record, mx.random.key(0))
            mlx_lm.load_weights(pool.model.experts[expert_id - 1], weights)
            mx.eval(pool.model.experts[expert_id - 1].parameters())  # closes the file, which MLX reads lazily
            pool.freeze_projections(expert_id, frozen_projections)
            if frozen:
                pool.freeze(expert_id)
            if frozen and pool.cache is not None:
                files[name] = folder / name  # drops the reference to its arrays
                pool.offload(expert_id, folder / name, mlx_lm.factor_names(pool.model.shapes))
        pool.model.router.load_arrays(files["router.safetensors"])
        return Library.restore(description["library"], files)


def imported_trainer(skills: int) -> CheckpointContent:
    """Return the trainer's files for an imported run of `skills` learned skills.

    It has zero steps and empty rows of losses, one for the base and one for each skill, still to be measured.
    """
    return trainer_files(TrainerState(skill_index=skills, matrix=[{} for _ in range(skills + 1)]))


def add_imported_skill(files: CheckpointContent, skill: Skill, base: float, mixture: float) -> None:
    """Append a skill that was imported with its expert to the learned skills of a run.

    Args:
        files: Content of the checkpoint, changed in place.
        skill: The skill.
        base: Its validation loss with the base alone, in nats per token.
        mixture: Its validation loss with the routed mixture.
    """
    trainer, rows = files["trainer.json"], len(_matrix_rows(files))
    trainer["skill_index"] += 1
    trainer["data_digests"][skill.name] = kept.digest_of(skill)
    files[matrix_file(0)][skill.name] = base
    files[matrix_file(rows)] = {skill.name: mixture}


def restore_training(files: CheckpointContent, optimizers: Optimizers) -> TrainerState:
    """Restore the optimizer moments in place and return the trainer state. Raises UserError for invalid content."""
    with damage_is_user_error("trainer.json or the moments' file"):
        if "optimizer.safetensors" in files:
            moments = tree_unflatten(list(files["optimizer.safetensors"].items()))
            assert isinstance(moments, dict)
            optimizers.experts.state, optimizers.router.state = moments["experts"], moments["router"]
        trainer = files["trainer.json"] | {"matrix": _matrix_rows(files)}
        validate_trainer(trainer)
        decision, best = trainer.pop("decision"), trainer.pop("best")
        best.pop("phase", None)  # in runs from before losses of all phases were measured under the final routing
        anomalies = AnomalyState(**trainer.pop("anomalies"))
        return TrainerState(
            **trainer,
            decision=None if decision is None else Decision.from_json(decision),
            best=BestState(**best, weights=dict(files.get("best.safetensors", {}))),
            anomalies=anomalies,
            teacher_gate=dict(files.get("teacher_gate.safetensors", {})),
        )


def stored_digests(files: CheckpointContent) -> dict[str, str]:
    """Return the digests of the run's data from a checkpoint; empty for an imported run, and where they are damaged."""
    trainer = files.get("trainer.json")
    digests = trainer.get("data_digests") if isinstance(trainer, dict) else None
    return {k: v for k, v in digests.items() if isinstance(v, str)} if isinstance(digests, dict) else {}


def trainable_weights(pool: Pool) -> dict[str, mx.array]:
    """Return a copy of the trainable weights by name, for going back to the best state."""
    return {name: mx.array(value) for name, value in _flatten(pool.model.trainable_parameters()).items()}


def grow_best_rank(best: BestState, pool: Pool) -> None:
    """Pad the best weights to the current LoRA ranks of their experts, after a rank growth.

    The added ranks are those of the current weights. They contribute nothing, so the output does not change.
    """
    for name, current in trainable_weights(pool).items():
        best_value = best.weights.get(name, current)
        if best_value.shape != current.shape:
            added = (
                current[:, best_value.shape[1] :]
                if best_value.shape[0] == current.shape[0]
                else current[best_value.shape[0] :]
            )
            best.weights[name] = mx.concatenate(
                [best_value, added], axis=1 if best_value.shape[0] == current.shape[0] else 0
            )


def step_folder_name(step: int) -> str:
    """Return the folder name of the checkpoint at an optimization step."""
    return f"step-{step:06d}"


COUNTERS = (
    "step",
    "skill_index",
    "skill_step",
    "attempt",
    "flops",
    "metric_lines",
    "decision_lines",
    "removals",
    "skipped",
    "skipped_in_row",
)
"""Fields of TrainerState that must be non-negative integers."""


def validate_trainer(trainer: dict[str, Any]) -> None:
    """Validate the types and ranges in trainer.json. Raises TypeError or ValueError.

    Code that reads the state afterwards relies on it without further checks.
    """
    for name in COUNTERS:
        if type(trainer.get(name, 0)) is not int or trainer.get(name, 0) < 0:
            raise TypeError(f"{name} is {trainer[name]!r:.40}")
    tables = [*trainer["matrix"], trainer["data_digests"], trainer["skill_parts"], *trainer["skill_parts"].values()]
    if not all(isinstance(table, dict) for table in tables):
        raise TypeError("a table is not a JSON object")
    if not all(is_number(loss) for row in trainer["matrix"] for loss in row.values()):
        raise TypeError("a loss is not a number")
    names = [trainer.get("order", []), trainer.get("waiting", [])]
    if not all(isinstance(each, list) and all(isinstance(name, str) for name in each) for each in names):
        raise TypeError("the order of the skills is not a list of names")
    if not _number_or_none(trainer.get("gather_threshold")):
        raise TypeError(f"gather_threshold is {trainer['gather_threshold']!r:.40}")
    best = trainer["best"]
    if not all(type(best[name]) is int for name in ("step", "evals_since_best")) or not _number_or_none(best["loss"]):
        raise TypeError(f"best is {best!r:.60}")
    anomalies = trainer["anomalies"]
    counts = [*anomalies["unserved"].values(), anomalies["collapsed"]]
    if not all(type(count) is int for count in counts) or not all(map(is_number, anomalies["losses"])):
        raise TypeError("anomalies are not lists of losses and counts")
    if trainer["matrix"] and len(trainer["matrix"]) != trainer["skill_index"] + 1:
        raise ValueError(f"losses after {len(trainer['matrix']) - 1} skills, but {trainer['skill_index']} were learned")


def _number_or_none(value: object) -> bool:
    return value is None or is_number(value)


@contextmanager
def damage_is_user_error(what: str) -> Iterator[None]:
    """Convert errors of the block to UserError: content that has the right hashes but is not valid in a checkpoint."""
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
