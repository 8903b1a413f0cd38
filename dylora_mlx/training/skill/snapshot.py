"""Snapshots of the trainable state: save everything that training can change about a pool, and restore it exactly."""

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
from dylora_mlx.training.step.evaluate import Evaluation


@dataclass(frozen=True)
class Snapshot:
    """Copy of a pool, its optimizers and the library's expert ids."""

    experts: list[tuple[Expert, list[tuple[str, mx.array]]]]
    """Experts with their weights by name: an update replaces arrays, it does not modify them. No weights for an offloaded
    expert."""
    records: list[ExpertRecord]
    """The experts' records."""
    rows: list[tuple[GateRow, mx.array, mx.array]]
    """Gate rows with copies of their weights and biases."""
    optimizers: list[Any]
    """States of the two optimizers."""
    expert_ids: list[int]
    """Expert id of each library entry."""
    measured: dict[str, tuple[str, Evaluation]]
    """The run's last evaluations, which hold again once the rest is restored."""


def take_snapshot(run: TrainingRun) -> Snapshot:
    """Copy the current state. The copies are evaluated."""
    # No copies: the next checkpoint links the file of an expert that has the same arrays as at the last one.
    experts = [
        (e, [] if isinstance(e, OffloadedExpert) else list(dict(tree_flatten(e.parameters())).items()))
        for e in run.model.experts
    ]
    rows = [(row, mx.array(row.weight), mx.array(row.bias)) for row in run.model.router.rows]
    optimizers = [tree_map(mx.array, state) for state in run.optimizers.state]
    mx.eval([row[1:] for row in rows], optimizers)
    expert_ids = [entry.expert for entry in run.library.entries]
    return Snapshot(experts, deepcopy(run.pool.records), rows, optimizers, expert_ids, dict(run.measured))


def restore_snapshot(run: TrainingRun, snapshot: Snapshot) -> None:
    """Restore weights, records, gate rows, optimizer states and expert ids. Everything done since the snapshot is
    undone."""
    for expert, weights in snapshot.experts:
        expert.update(tree_unflatten(weights))
    run.model.experts = [expert for expert, _ in snapshot.experts]
    for row, weight, bias in snapshot.rows:
        row.weight, row.bias = weight, bias
    run.model.router.rows = [row for row, _, _ in snapshot.rows]
    run.pool.records = [replace(record) for record in snapshot.records]
    for expert_id, record in enumerate(run.pool.records, 1):
        if record.frozen:
            run.pool.freeze(expert_id)
        else:
            run.pool.unfreeze(expert_id)
    run.optimizers.experts.state, run.optimizers.router.state = snapshot.optimizers
    run.measured = dict(snapshot.measured)
    for entry, expert_id in zip(run.library.entries, snapshot.expert_ids, strict=True):
        entry.expert = expert_id
