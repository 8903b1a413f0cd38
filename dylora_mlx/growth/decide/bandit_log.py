"""Decisions about experts and what came of them, as decisions.jsonl keeps them: what the bandit learns from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from dylora_mlx.errors import UserError
from dylora_mlx.system.files import is_number

Arm = Literal["create", "known"]
ARMS: tuple[Arm, Arm] = ("create", "known")
"""A new expert, or none: the skill counts as known."""
VERSION = 1


class BanditContext(NamedTuple):
    """What is known of a skill before the decision.

    similarity: the novelty measurement's score, a cosine, 0 for an empty library; margin: similarity - threshold;
    entropy: mean routing entropy of the present mixture on the skill's validation text, nats; loss_gap: the base's loss
    there minus the best existing expert's, nats a token; pool_size: experts; tokens: of the skill's training text.
    """

    similarity: float
    margin: float
    entropy: float
    loss_gap: float
    pool_size: int
    tokens: int

    def features(self) -> np.ndarray:
        """Float64 [7], each of order one: a bias and the fields, the two counts as logarithms."""
        counts = math.log1p(self.pool_size) / 4, (math.log10(max(1, self.tokens)) - 4) / 2
        return np.array([1.0, self.similarity, self.margin, self.entropy, self.loss_gap, *counts])


class BanditTrial(NamedTuple):
    """A decision and what came of it.

    propensity: probability with which `action` was drawn, None if a deterministic policy decided; rewards: nats a token
    by action, of one arm or (after a probe) of both, empty until the outcome is known.
    """

    context: BanditContext
    action: Arm
    propensity: float | None
    rewards: Mapping[Arm, float]


def reward(gain: float, parameters: int, cost: float) -> float:
    """Reward in nats a token: held-out `gain` over the best of base and experts, less `cost` a million new parameters."""
    return gain - cost * parameters / 1e6


def to_json(trial: BanditTrial) -> dict[str, Any]:
    """What a line of decisions.jsonl holds under "bandit"."""
    counts = {name: int(getattr(trial.context, name)) for name in ("pool_size", "tokens")}
    measured = {name: float(value) for name, value in trial.context._asdict().items() if name not in counts}
    return {
        "version": VERSION,
        "context": {**measured, **counts},
        "action": trial.action,
        "propensity": None if trial.propensity is None else float(trial.propensity),
        "rewards": {action: float(value) for action, value in trial.rewards.items()},
    }


def from_json(value: Any, where: str) -> BanditTrial:
    """The trial of a record. Raises UserError that begins with `where` for another version or a damaged record."""
    version = value.get("version") if isinstance(value, dict) else None
    if version != VERSION:
        raise UserError(
            f"{where}: the bandit's record is of version {version}, this release reads {VERSION}; leave that run out"
        )
    try:
        found = {name: _number(value["context"][name]) for name in BanditContext._fields}
        pool_size, tokens = int(found.pop("pool_size")), int(found.pop("tokens"))
        context = BanditContext(**found, pool_size=pool_size, tokens=tokens)
        if min(context.pool_size, context.tokens) < 0:
            raise ValueError("a count is below 0")
        propensity = None if value["propensity"] is None else _number(value["propensity"])
        if propensity is not None and not 0 < propensity <= 1:
            raise ValueError(f"{propensity} is not a probability")
        rewards: dict[Arm, float] = {_action(action): _number(found) for action, found in value["rewards"].items()}
        return BanditTrial(context, _action(value["action"]), propensity, rewards)
    except KeyError as error:
        raise UserError(f"{where}: the bandit's record lacks {error}; leave that run out") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: the bandit's record is damaged ({error}); leave that run out") from error


def _number(value: Any) -> float:
    if not is_number(value):
        raise ValueError(f"{value!r:.80} is not a finite number")
    return float(value)


def _action(value: Any) -> Arm:
    if value not in ARMS:
        raise ValueError(f"{value!r:.80} is not one of {', '.join(ARMS)}")
    return value


def read_history(paths: Iterable[Path]) -> list[BanditTrial]:
    """Trials with rewards from decisions.jsonl of run folders, of all runs in a folder, or from .jsonl files.

    Records that are equal to the last digit (a run repeated with its seed, or copied) count once: they say nothing new,
    and a posterior that saw one of them must not judge the other. Raises UserError for a path without decisions, for
    broken JSON (a torn last line is left out), and for records that cannot be read.
    """
    found: dict[str, BanditTrial] = {}
    for file in (file for path in paths for file in _files(path)):
        for where, line in _lines(file):
            if isinstance(line, dict) and line.get("bandit") is not None:
                trial = from_json(line["bandit"], where)
                if trial.rewards:
                    found[json.dumps(to_json(trial), sort_keys=True)] = trial
    return list(found.values())


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    own = path / "decisions.jsonl"
    found = [own] if own.is_file() else sorted(path.glob("*/decisions.jsonl"))
    if not found:
        raise UserError(f"{path}: no decisions.jsonl here; give a run folder, a folder of runs, or a .jsonl file")
    return found


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    """Where each line stands, and its value."""
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # no newline after it: a run was stopped while it wrote
                return
            raise UserError(f"{file}, line {number}: not JSON; mend the line or remove it") from error
        yield f"{file}, line {number}", value
