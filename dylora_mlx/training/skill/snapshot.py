"""Undo: everything that learning can change about a pool, kept aside and put back exactly."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from dylora_mlx.growth.pool import Record
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.model.experts.offload import Shelved
from dylora_mlx.model.routing.router import GateRow
from dylora_mlx.training.run import Run


@dataclass(frozen=True)
class Kept:
    """Experts with copies of their weights, their records, the gate rows' weights, the optimizers' states and the
    columns of the library's entries."""

    experts: list[tuple[Expert, list[tuple[str, mx.array]]]]
    records: list[Record]
    rows: list[tuple[GateRow, mx.array, mx.array]]
    optimizers: list[Any]
    columns: list[int]


def keep(run: Run) -> Kept:
    """Copies, evaluated, of what is there now."""
    experts = [(e, [] if isinstance(e, Shelved) else _copied(e)) for e in run.model.experts]  # files never change
    rows = [(row, mx.array(row.weight), mx.array(row.bias)) for row in run.model.router.rows]
    optimizers = [tree_map(mx.array, state) for state in run.optimizers.state]
    mx.eval([weights for _, weights in experts], [row[1:] for row in rows], optimizers)
    columns = [entry.expert for entry in run.library.entries]
    return Kept(experts, deepcopy(run.pool.records), rows, optimizers, columns)


def _copied(expert: Expert) -> list[tuple[str, mx.array]]:
    return [(name, mx.array(value)) for name, value in dict(tree_flatten(expert.parameters())).items()]


def restore(run: Run, kept: Kept) -> None:
    """Put everything back, weights and places; nothing that was done since is left."""
    for expert, weights in kept.experts:
        expert.update(tree_unflatten(weights))
    run.model.experts = [expert for expert, _ in kept.experts]
    for row, weight, bias in kept.rows:
        row.weight, row.bias = weight, bias
    run.model.router.rows = [row for row, _, _ in kept.rows]
    run.pool.records = [replace(record) for record in kept.records]
    for column, record in enumerate(run.pool.records, 1):
        if record.frozen:
            run.pool.freeze(column)
        else:
            run.pool.thaw(column)
    run.optimizers.experts.state, run.optimizers.router.state = kept.optimizers
    for entry, column in zip(run.library.entries, kept.columns, strict=True):
        entry.expert = column
