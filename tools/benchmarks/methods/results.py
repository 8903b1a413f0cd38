"""Result files, one per method, seed and order, and the measures computed from them, with intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dylora_mlx.errors import UserError
from dylora_mlx.reporting.continual import continual_metrics
from methods.bench import Result, Row

RESAMPLES = 4000
"""Bootstrap resamples of cells."""


class Cell(NamedTuple):
    """Result of one method on one stream. Field names are keys of the file."""

    method: str
    seed: int
    order: int
    """Number of the order of skills."""
    skills: list[str]
    """Names of the skills in that order."""
    known: str
    """Name of the base skill, which no method learns."""
    result: Result
    learning_rate: float | None = None
    """Learning rate of the experts; None in results from before it was recorded."""


class Mean(NamedTuple):
    """A mean over cells, its 95% bootstrap interval (Efron 1979), and the number of cells."""

    value: float
    low: float
    high: float
    num_cells: int


def place(folder: Path, method: str, seed: int, order: int) -> Path:
    """Return the path of a cell's file."""
    name = "".join(c if c.isalnum() else "-" for c in method)
    return folder / "cells" / f"{name}.seed{seed}.order{order}.json"


def write(folder: Path, cell: Cell) -> None:
    """Write a cell to its file atomically, by renaming a partial file."""
    path = place(folder, cell.method, cell.seed, cell.order)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**cell._asdict(), "result": cell.result._asdict()}) + "\n", encoding="utf-8")
    partial.replace(path)


def read(folder: Path) -> list[Cell]:
    """Return all cells of a folder, sorted by file name. Raises UserError for an invalid file."""
    cells = []
    for path in sorted((folder / "cells").glob("*.json")):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            cells.append(Cell(**{**value, "result": Result(**value["result"])}))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}: no result of this tool ({error}); remove it") from error
    return cells


def final(cell: Cell) -> float:
    """Return the mean validation loss of all skills at the end, nats per token."""
    return _mean(cell.result.matrix[-1], cell.skills)


def diagonal(cell: Cell) -> float:
    """Return the mean validation loss of the skills, each right after it was learned."""
    return float(np.mean([row[name] for row, name in zip(cell.result.matrix[1:], cell.skills, strict=True)]))


def forgetting(cell: Cell) -> float:
    """Return the forgetting of the skills, in nats per token; NaN if undefined."""
    return _or_nan(continual_metrics(cell.result.matrix, cell.skills).forgetting)


def backward(cell: Cell) -> float:
    """Return the backward transfer (BWT), in nats per token; NaN if undefined."""
    return _or_nan(continual_metrics(cell.result.matrix, cell.skills).bwt)


def forward(cell: Cell) -> float:
    """Return the forward transfer (FWT), in nats per token; NaN if undefined."""
    return _or_nan(continual_metrics(cell.result.matrix, cell.skills).fwt)


def retention(cell: Cell) -> float:
    """Return the rise of the loss on the base skill's text (base retention)."""
    return cell.result.matrix[-1][cell.known] - cell.result.matrix[0][cell.known]


def routing(cell: Cell) -> float:
    """Return the mean share of tokens whose largest gate is that of their skill's expert; NaN without a router."""
    return math.nan if cell.result.routing is None else _mean(cell.result.routing, cell.skills)


def regret(cell: Cell) -> float:
    """Return the mean loss with routing minus that with every token on its skill's own expert; NaN if not measured."""
    return math.nan if cell.result.own is None else final(cell) - _mean(cell.result.own, cell.skills)


def test(cell: Cell) -> float:
    """Return the mean test loss of all skills at the end, nats per token."""
    return _mean(cell.result.test, cell.skills)


def answered(cell: Cell) -> float:
    """Return the average accuracy on the questions of all skills at the end; NaN if not measured."""
    answers = cell.result.answers
    return math.nan if answers is None else _mean(answers[-1], list(answers[-1]))


def answers_backward(cell: Cell) -> float:
    """Return the backward transfer in accuracy: the mean change since each skill was learned, the last one left out.

    NaN if not measured or undefined.
    """
    answers = cell.result.answers
    if answers is None:
        return math.nan
    changes = [
        answers[-1][name] - answers[number][name]
        for number, name in enumerate(cell.skills[:-1], 1)
        if name in answers[-1]
    ]
    return float(np.mean(changes)) if changes else math.nan


def answers_forward(cell: Cell) -> float:
    """Return the forward transfer in accuracy: the mean change against the base just before each skill is learned, the
    first one left out. NaN if not measured or undefined."""
    answers = cell.result.answers
    if answers is None:
        return math.nan
    changes = [
        answers[number][name] - answers[0][name]
        for number, name in enumerate(cell.skills)
        if number and name in answers[0]
    ]
    return float(np.mean(changes)) if changes else math.nan


def against(cells: Sequence[Cell], other: str) -> Callable[[Cell], float]:
    """Return a measure: the final mean minus that of another method on the same seed and order.

    If the other method has no result for the order, its lowest order of the seed is used; NaN without any.
    """
    finals = {(cell.seed, cell.order): final(cell) for cell in cells if cell.method == other}
    by_seed = {seed: value for (seed, _), value in sorted(finals.items(), reverse=True)}
    return lambda cell: final(cell) - finals.get((cell.seed, cell.order), by_seed.get(cell.seed, math.nan))


def mean(values: Sequence[float]) -> Mean:
    """Return the mean over the values that are not NaN."""
    valid = np.array([value for value in values if not math.isnan(value)])
    if not len(valid):
        return Mean(math.nan, math.nan, math.nan, 0)
    resampled = np.random.default_rng(0).choice(valid, (RESAMPLES, len(valid))).mean(1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Mean(float(valid.mean()), float(low), float(high), len(valid))


def _mean(row: Row, names: Sequence[str]) -> float:
    return float(np.mean([row[name] for name in names]))


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
