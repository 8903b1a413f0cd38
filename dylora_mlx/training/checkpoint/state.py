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
from dylora_mlx.growth.library import Library
from dylora_mlx.growth.pool import Pool, Record
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.experts.offload import Shelved
from dylora_mlx.system.files import is_number
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.checkpoint.checkpoint import Content
from dylora_mlx.training.step.optimizers import Optimizers


@dataclass
class Best:
    """Early stopping within one skill: the best loss under the routing in force, and the weights that had it."""

    phase: str = ""
    loss: float | None = None
    step: int = 0
    waited: int = 0
    weights: dict[str, mx.array] = field(default_factory=dict)


@dataclass
class Seen:
    """What the alarms compare with. losses: of the last steps of the skill, finite ones; spiking: whether the last was far
    above those before; unserved: by domain, evaluations in a row in which its expert got next to nothing of it;
    collapsed: those in which one column got everything."""

    losses: list[float] = field(default_factory=list)
    spiking: bool = False
    unserved: dict[str, int] = field(default_factory=dict)
    collapsed: int = 0


@dataclass
class State:
    """step: steps trained in all; skill: index in the stream; skill_step: the next step of that skill; decision: the
    record of the skill at hand, once made; matrix: losses by domain, first the base's, then after each skill; flops:
    counted so far; last_creation: step of the newest expert; digests: training data of each skill, by name;
    records, ledger: lines of metrics.jsonl and decisions.jsonl; removals: attempts to remove experts; skipped: updates left
    out because something was not finite, in all and in a row; looked: step and watched loss when the rank was last
    looked at; lookup_ratio: as measured when the pool grew large enough (model/crossover.py); parts: of each skill that
    was split, by name, the part of each document, by split of its data; seen: by the alarms;
    mature: the router's weight and bias before the skill at hand, for distillation."""

    step: int = 0
    skill: int = 0
    skill_step: int = 0
    decision: dict | None = None
    matrix: list[dict[str, float]] = field(default_factory=list)
    flops: int = 0
    last_creation: int | None = None
    digests: dict[str, str] = field(default_factory=dict)
    records: int = 0
    ledger: int = 0
    removals: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    looked: tuple[int, float] | None = None
    lookup_ratio: float | None = None
    parts: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    seen: Seen = field(default_factory=Seen)
    mature: dict[str, mx.array] = field(default_factory=dict)
    best: Best = field(default_factory=Best)

    def next_skill(self) -> None:
        self.skill, self.skill_step, self.decision = self.skill + 1, 0, None
        self.looked, self.best, self.mature = None, Best(), {}
        self.seen = replace(self.seen, losses=[], spiking=False)


def _flat(tree: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))


def content(state: State, base: Base, pool: Pool, library: Library, optimizers: Optimizers) -> Content:
    """Everything a run needs to go on, as checkpoint files."""
    trainer = _trainer(state)
    moments = {"experts": optimizers.experts.state, "router": optimizers.router.state}
    files = {"trainer.json": trainer, "optimizer.safetensors": _flat(moments), **pool_files(base, pool, library)}
    aside = {"best.safetensors": state.best.weights, "mature.safetensors": state.mature}
    return files | {name: arrays for name, arrays in aside.items() if arrays}


def _trainer(state: State) -> dict[str, Any]:
    """What is no array, which have files of their own."""
    trainer = asdict(replace(state, mature={}, best=replace(state.best, weights={})))
    del trainer["mature"], trainer["best"]["weights"]
    return trainer


def pool_files(base: Base, pool: Pool, library: Library) -> Content:
    """Experts, router and library as checkpoint files. Expert folders are mlx-lm adapters by themselves."""
    described = {"base": base.fingerprint, "tokenizer": base.vocabulary, "experts": pool.describe()}
    files: Content = {
        "pool.json": {**described, "library": library.describe()},
        "router.safetensors": _flat(pool.model.router.parameters()),
        "library.safetensors": library.arrays(),
    }
    for column, expert in enumerate(pool.model.experts, 1):
        folder = f"experts/expert_{column}"
        files[f"{folder}/adapters.safetensors"] = expert.path if isinstance(expert, Shelved) else mlx_lm.weights(expert)
        files[f"{folder}/adapter_config.json"] = mlx_lm.config(expert, base.name)
    return files


def restore_pool(files: Content, base: Base, pool: Pool, folder: Path) -> Library:
    """Rebuild experts, router and library from the files of a checkpoint in `folder`. Where the pool has a shelf, frozen
    experts stand there from then on. Raises UserError when it belongs to another base, and for what no checkpoint of ours
    holds."""
    with damage_is_user_error("pool.json, the router's or the library's file"):
        description = files["pool.json"]
        if description["base"] != base.fingerprint:
            raise UserError(
                f"this checkpoint was made with another base than {base.name}: give the base it was trained on"
            )
        if description["tokenizer"] != base.vocabulary:
            raise UserError(
                f"this checkpoint was made with another tokenizer than that of {base.name}: put the old one back"
            )
        for column, found in enumerate(description["experts"], 1):
            record = Record.of(found)
            partly, frozen = list(record.partly), record.frozen
            name = f"experts/expert_{column}/adapters.safetensors"
            weights = files[name]
            mlx_lm.check_rank(weights, record.rank)  # before an expert of that size is made
            pool.add(record, mx.random.key(0))
            mlx_lm.update(pool.model.experts[column - 1], weights)
            pool.freeze_part(column, partly)
            if frozen:
                pool.freeze(column)
            if frozen and pool.shelf is not None:
                files[name] = folder / name  # its arrays are let go
                pool.put_down(column, folder / name, mlx_lm.names(pool.model.shapes))
        pool.model.router.put(files["router.safetensors"])
        return Library.restore(description["library"], checkpoint.numpy_arrays(files["library.safetensors"]))


def imported(skills: int) -> dict[str, Any]:
    """trainer.json of a run that came with its skills learned: no step, and a matrix yet to be measured."""
    return _trainer(State(skill=skills, matrix=[{} for _ in range(skills + 1)]))


def count_imported(trainer: dict[str, Any], skill: Skill, base: float, mixture: float) -> None:
    """Put a skill that came with its expert at the end of what a run has learned. base, mixture: its losses."""
    trainer["skill"] += 1
    trainer["digests"][skill.name] = skill.digest
    trainer["matrix"][0][skill.name] = base
    trainer["matrix"].append({skill.name: mixture})


def restore_training(files: Content, optimizers: Optimizers) -> State:
    """Rebuild optimizer moments and the run's state. Raises UserError for what no checkpoint of ours holds."""
    with damage_is_user_error("trainer.json or the moments' file"):
        if "optimizer.safetensors" in files:
            moments = tree_unflatten(list(files["optimizer.safetensors"].items()))
            assert isinstance(moments, dict)
            optimizers.experts.state, optimizers.router.state = moments["experts"], moments["router"]
        trainer = dict(files["trainer.json"])
        validate_trainer(trainer)
        best = Best(**trainer.pop("best"), weights=dict(files.get("best.safetensors", {})))
        seen = Seen(**trainer.pop("seen", {}))  # none in a checkpoint of before there were alarms
        return State(**trainer, best=best, seen=seen, mature=dict(files.get("mature.safetensors", {})))


def trainable_weights(pool: Pool) -> dict[str, mx.array]:
    """A copy of the weights that a skill trains, by name, for going back to the best state."""
    return {name: mx.array(value) for name, value in _flat(pool.model.trainable_parameters()).items()}


def widen(best: Best, pool: Pool) -> None:
    """Give the best weights the ranks that their expert has now; they compute what they did."""
    for name, own in trainable_weights(pool).items():
        kept = best.weights.get(name, own)
        if kept.shape != own.shape:
            new = own[:, kept.shape[1] :] if kept.shape[0] == own.shape[0] else own[kept.shape[0] :]
            best.weights[name] = mx.concatenate([kept, new], axis=1 if kept.shape[0] == own.shape[0] else 0)


def step_folder(step: int) -> str:
    return f"step-{step:06d}"


COUNTERS = ("step", "skill", "skill_step", "flops", "records", "ledger", "removals", "skipped", "skipped_in_row")
"""Parts of the state that count something."""


def validate_trainer(trainer: dict[str, Any]) -> None:
    """Raises TypeError, ValueError for values of other types than a run writes: what reads them asks no more."""
    for name in COUNTERS:
        if type(trainer.get(name, 0)) is not int or trainer.get(name, 0) < 0:
            raise TypeError(f"{name} is {trainer[name]!r:.40}")
    tables = [*trainer["matrix"], trainer["digests"], trainer["parts"], *trainer["parts"].values()]
    if not all(isinstance(table, dict) for table in tables):
        raise TypeError("a table that is none")
    if not all(is_number(loss) for row in trainer["matrix"] for loss in row.values()):
        raise TypeError("a loss that is no number")
    if not _number_or_none(trainer.get("lookup_ratio")):
        raise TypeError(f"lookup_ratio is {trainer['lookup_ratio']!r:.40}")
    best = trainer["best"]
    if not all(type(best[name]) is int for name in ("step", "waited")) or not _number_or_none(best["loss"]):
        raise TypeError(f"best is {best!r:.60}")
    seen = trainer.get("seen", {})  # none in a checkpoint of before there were alarms
    counts = [*seen.get("unserved", {}).values(), seen.get("collapsed", 0)]
    if not all(type(count) is int for count in counts) or not all(map(is_number, seen.get("losses", []))):
        raise TypeError("what the alarms saw is no list of losses and counts")
    if trainer["matrix"] and len(trainer["matrix"]) != trainer["skill"] + 1:
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
