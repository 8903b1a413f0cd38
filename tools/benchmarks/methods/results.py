"""Results on disk, a file for each method, seed and order; and what they come to, with intervals."""

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
"""Of cells, for intervals."""


class Cell(NamedTuple):
    """One method on one stream: seed; order: number of the order; skills: in that order; known: what nobody learns."""

    method: str
    seed: int
    order: int
    skills: list[str]
    known: str
    result: Result


class Mean(NamedTuple):
    """A mean over cells, with a 95% bootstrap interval of it (Efron 1979) and their number."""

    value: float
    low: float
    high: float
    num_cells: int


def place(folder: Path, method: str, seed: int, order: int) -> Path:
    """Where a cell's file lies."""
    name = "".join(c if c.isalnum() else "-" for c in method)
    return folder / "cells" / f"{name}.seed{seed}.order{order}.json"


def write(folder: Path, cell: Cell) -> None:
    path = place(folder, cell.method, cell.seed, cell.order)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps({**cell._asdict(), "result": cell.result._asdict()}) + "\n", encoding="utf-8")
    beside.replace(path)


def read(folder: Path) -> list[Cell]:
    """All cells of a folder, in the order of their names. Raises UserError for a file that is no cell."""
    found = []
    for path in sorted((folder / "cells").glob("*.json")):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            found.append(Cell(**{**value, "result": Result(**value["result"])}))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}: no result of this tool ({error}); remove it") from error
    return found


def final(cell: Cell) -> float:
    """Mean validation loss of all skills at the end, nats a token."""
    return _mean(cell.result.matrix[-1], cell.skills)


def diagonal(cell: Cell) -> float:
    """Mean validation loss of each skill when it had just been learned."""
    return float(np.mean([row[name] for row, name in zip(cell.result.matrix[1:], cell.skills, strict=True)]))


def forgetting(cell: Cell) -> float:
    return _or_nan(continual_metrics(cell.result.matrix, cell.skills).forgetting)


def backward(cell: Cell) -> float:
    return _or_nan(continual_metrics(cell.result.matrix, cell.skills).bwt)


def forward(cell: Cell) -> float:
    return _or_nan(continual_metrics(cell.result.matrix, cell.skills).fwt)


def retention(cell: Cell) -> float:
    """What the text that the base knows has lost."""
    return cell.result.matrix[-1][cell.known] - cell.result.matrix[0][cell.known]


def routing(cell: Cell) -> float:
    """Mean share of tokens whose largest gate is their skill's own."""
    return math.nan if cell.result.routing is None else _mean(cell.result.routing, cell.skills)


def regret(cell: Cell) -> float:
    """Routed minus every token on its skill's own expert, mean of the skills."""
    return math.nan if cell.result.own is None else final(cell) - _mean(cell.result.own, cell.skills)


def test(cell: Cell) -> float:
    return _mean(cell.result.test, cell.skills)


def against(cells: Sequence[Cell], other: str) -> Callable[[Cell], float]:
    """The final mean minus that of another method on the same seed, and on the same order if it depends on one."""
    marks = {(cell.seed, cell.order): final(cell) for cell in cells if cell.method == other}
    by_seed = {seed: value for (seed, _), value in sorted(marks.items(), reverse=True)}
    return lambda cell: final(cell) - marks.get((cell.seed, cell.order), by_seed.get(cell.seed, math.nan))


def mean(values: Sequence[float]) -> Mean:
    """Over the values that are numbers."""
    found = np.array([value for value in values if not math.isnan(value)])
    if not len(found):
        return Mean(math.nan, math.nan, math.nan, 0)
    drawn = np.random.default_rng(0).choice(found, (RESAMPLES, len(found))).mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Mean(float(found.mean()), float(low), float(high), len(found))


def _mean(row: Row, names: Sequence[str]) -> float:
    return float(np.mean([row[name] for name in names]))


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
