"""Bandit trials in decisions.jsonl: the context, action and rewards of past decisions, from which the bandit learns."""

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
"""`create` adds a new expert. `known` adds none: the skill counts as known."""
VERSION = 1
"""Version of the trial format; other versions are rejected."""


class BanditContext(NamedTuple):
    """Context features of a skill, known before the decision."""

    similarity: float
    """Score of the novelty measurement, a cosine; 0 for an empty library."""
    margin: float
    """similarity - threshold."""
    entropy: float
    """Mean routing entropy of the present mixture on the skill's validation text, nats."""
    loss_gap: float
    """Loss of the base minus loss of the best existing expert on that text, nats per token."""
    pool_size: int
    """Number of experts."""
    tokens: int
    """Number of tokens in the skill's training text."""

    def features(self) -> np.ndarray:
        """Return the feature vector, float64 [7]: a bias, then the fields, scaled to order one.

        The two counts, `pool_size` and `tokens`, enter as logarithms.
        """
        counts = math.log1p(self.pool_size) / 4, (math.log10(max(1, self.tokens)) - 4) / 2
        return np.array([1.0, self.similarity, self.margin, self.entropy, self.loss_gap, *counts])


class BanditTrial(NamedTuple):
    """A decision and its outcome."""

    context: BanditContext
    action: Arm
    propensity: float | None
    """Probability with which `action` was drawn; None if a deterministic policy decided."""
    rewards: Mapping[Arm, float]
    """Reward by action, nats per token: of one arm or, after a probe, of both. Empty until the outcome is known."""


def reward(gain: float, parameters: int, cost: float) -> float:
    """Return the reward in nats per token.

    It is the held-out `gain` over the best of the base and the experts, minus `cost` per million new parameters.
    """
    return gain - cost * parameters / 1e6


def to_json(trial: BanditTrial) -> dict[str, Any]:
    """Return a trial as the JSON value stored under "bandit" in a line of decisions.jsonl."""
    counts = {name: int(getattr(trial.context, name)) for name in ("pool_size", "tokens")}
    measured = {name: float(value) for name, value in trial.context._asdict().items() if name not in counts}
    return {
        "version": VERSION,
        "context": {**measured, **counts},
        "action": trial.action,
        "propensity": None if trial.propensity is None else float(trial.propensity),
        "rewards": {action: float(value) for action, value in trial.rewards.items()},
    }


def from_json(value: Any, location: str) -> BanditTrial:
    """Read the value of `to_json`.

    Raises UserError for another version or a damaged record; the message begins with `location`.
    """
    version = value.get("version") if isinstance(value, dict) else None
    if version != VERSION:
        raise UserError(
            f"{location}: the bandit's record is of version {version}, this release reads {VERSION}; leave that run out"
        )
    try:
        measured = {name: _number(value["context"][name]) for name in BanditContext._fields}
        pool_size, tokens = int(measured.pop("pool_size")), int(measured.pop("tokens"))
        context = BanditContext(**measured, pool_size=pool_size, tokens=tokens)
        if min(context.pool_size, context.tokens) < 0:
            raise ValueError("a count is below 0")
        propensity = None if value["propensity"] is None else _number(value["propensity"])
        if propensity is not None and not 0 < propensity <= 1:
            raise ValueError(f"{propensity} is not a probability")
        rewards: dict[Arm, float] = {
            _action(action): _number(measured) for action, measured in value["rewards"].items()
        }
        return BanditTrial(context, _action(value["action"]), propensity, rewards)
    except KeyError as error:
        raise UserError(f"{location}: the bandit's record lacks {error}; leave that run out") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{location}: the bandit's record is damaged ({error}); leave that run out") from error


def _number(value: Any) -> float:
    if not is_number(value):
        raise ValueError(f"{value!r:.80} is not a finite number")
    return float(value)


def _action(value: Any) -> Arm:
    if value not in ARMS:
        raise ValueError(f"{value!r:.80} is not one of {', '.join(ARMS)}")
    return value


def read_history(paths: Iterable[Path]) -> list[BanditTrial]:
    """Read the trials with rewards from decisions.jsonl files.

    A path is a run folder, a folder of run folders, or a .jsonl file. Exactly equal records, as from a run that was
    copied or repeated with its seed, count once: a duplicate carries no information, and with one copy in the training
    folds the other would leak into the evaluation. Raises UserError for a path without decisions, for broken JSON
    (except an incomplete last line, which is skipped) and for records that cannot be read.
    """
    trials: dict[str, BanditTrial] = {}
    for file in (file for path in paths for file in _log_files(path)):
        for location, line in _read_lines(file):
            if isinstance(line, dict) and line.get("bandit") is not None:
                trial = from_json(line["bandit"], location)
                if trial.rewards:
                    trials[json.dumps(to_json(trial), sort_keys=True)] = trial
    return list(trials.values())


def _log_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    run_log = path / "decisions.jsonl"
    files = [run_log] if run_log.is_file() else sorted(path.glob("*/decisions.jsonl"))
    if not files:
        raise UserError(f"{path}: no decisions.jsonl here; give a run folder, a folder of runs, or a .jsonl file")
    return files


def _read_lines(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the location of each line, for error messages, and its JSON value."""
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
            # A last line without a newline is incomplete: the run was stopped while it wrote.
            if number == len(lines):
                return
            raise UserError(f"{file}, line {number}: not JSON; repair the line or remove it") from error
        yield f"{file}, line {number}", value
