"""Undo: everything that learning can change about a pool, kept aside and put back exactly."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from dylora_mlx.growth.pool import ExpertRecord
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.model.experts.offload import OffloadedExpert
from dylora_mlx.model.routing.router import GateRow
from dylora_mlx.training.run import TrainingRun


@dataclass(frozen=True)
class Snapshot:
    """Experts with copies of their weights, their records, the gate rows' weights, the optimizers' states and the
    columns of the library's entries."""

    experts: list[tuple[Expert, list[tuple[str, mx.array]]]]
    records: list[ExpertRecord]
    rows: list[tuple[GateRow, mx.array, mx.array]]
    optimizers: list[Any]
    expert_ids: list[int]


def take_snapshot(run: TrainingRun) -> Snapshot:
    """Copies, evaluated, of what is there now."""
    experts = [
        (e, [] if isinstance(e, OffloadedExpert) else _copied(e)) for e in run.model.experts
    ]  # files never change
    rows = [(row, mx.array(row.weight), mx.array(row.bias)) for row in run.model.router.rows]
    optimizers = [tree_map(mx.array, state) for state in run.optimizers.state]
    mx.eval([weights for _, weights in experts], [row[1:] for row in rows], optimizers)
    expert_ids = [entry.expert for entry in run.library.entries]
    return Snapshot(experts, deepcopy(run.pool.records), rows, optimizers, expert_ids)


def _copied(expert: Expert) -> list[tuple[str, mx.array]]:
    return [(name, mx.array(value)) for name, value in dict(tree_flatten(expert.parameters())).items()]


def restore_snapshot(run: TrainingRun, kept: Snapshot) -> None:
    """Put everything back, weights and places; nothing that was done since is left."""
    for expert, weights in kept.experts:
        expert.update(tree_unflatten(weights))
    run.model.experts = [expert for expert, _ in kept.experts]
    for row, weight, bias in kept.rows:
        row.weight, row.bias = weight, bias
    run.model.router.rows = [row for row, _, _ in kept.rows]
    run.pool.records = [replace(record) for record in kept.records]
    for expert_id, record in enumerate(run.pool.records, 1):
        if record.frozen:
            run.pool.freeze(expert_id)
        else:
            run.pool.unfreeze(expert_id)
    run.optimizers.experts.state, run.optimizers.router.state = kept.optimizers
    for entry, expert_id in zip(run.library.entries, kept.expert_ids, strict=True):
        entry.expert = expert_id
