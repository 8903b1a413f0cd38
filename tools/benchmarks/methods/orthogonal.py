"""O-LoRA: a penalty keeps each new LoRA orthogonal to the subspaces of the earlier ones; all LoRAs are summed.

Wang et al. 2023, "Orthogonal Subspace Learning for Language Model Continual Learning", section 3. With O = A_i^T A_t of
an earlier LoRA i and the new one t (equation 6), the loss is - sum log p + lambda sum_i L(A_i, A_t) (equation 7), where
L is the sum of the SQUARED entries of O (equation 8). The authors' code sums absolute values instead; this module
follows the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from dylora_mlx.model.experts.lora import Expert
from methods import adapters, training
from methods.apart import ExpertsByOwner
from methods.bench import Bench, Result
from methods.course import Course
from methods.training import Penalty

LAMBDA = 0.5
"""Weight of the penalty, next to a loss in nats per token: the paper's value for most of its tasks."""

Subspaces = list[dict[str, mx.array]]
"""Concatenated A [inputs, R] of some LoRAs, float32, by layer and projection."""


def orthogonal(bench: Bench) -> Result:
    """Train one LoRA per owner; a skill whose owner has one trains it further, with all others frozen."""
    course = Course(bench)
    after = learn(course)
    forward = adapters.all_on(course.model, list(after[-1].values()))
    parameters = sum(bench.parameters(expert.rank) for expert in after[-1].values())
    return course.result(training.losses(bench, forward, "test"), parameters)


def learn(course: Course, weight: float = LAMBDA) -> list[ExpertsByOwner]:
    """Train on the stream, and return the LoRAs after each skill; `weight` is lambda."""
    bench, experts_by_owner, after = course.bench, ExpertsByOwner(), []
    for number, skill in enumerate(bench.skills):
        owner = bench.owners[skill.name]
        if owner not in experts_by_owner:
            experts_by_owner = {**experts_by_owner, owner: bench.expert(bench.config.model.rank, owner)}
        expert_id = 1 + list(experts_by_owner).index(owner)
        others = [expert for other, expert in experts_by_owner.items() if other != owner]
        added_penalty = penalty(others, weight) if others else None
        learned = course.teach(
            list(experts_by_owner.values()), expert_id, skill.train, number, bench.steps(skill), added_penalty
        )
        experts_by_owner = {**experts_by_owner, owner: learned}
        after.append(experts_by_owner)
        course.measure(adapters.all_on(course.model, list(experts_by_owner.values())))
    return after


def penalty(others: Sequence[Expert], weight: float = LAMBDA) -> Penalty:
    """Return the penalty: lambda times the overlap of the LoRA in training with the others."""
    fixed = subspaces(others)
    return lambda learned: weight * overlap(fixed, learned["experts"])


def subspaces(experts: Sequence[Expert]) -> Subspaces:
    """Return the subspaces of at least one LoRA, evaluated."""
    stacked = [
        {name: mx.concatenate([e.layers[layer][name].lora_a for e in experts], axis=1) for name in named}
        for layer, named in enumerate(experts[0].layers)
    ]
    mx.eval(stacked)
    return stacked


def overlap(fixed: Subspaces, weights: Any) -> mx.array:
    """Return the sum of the squared entries of A_i^T A_t over all layers, projections and LoRAs i.

    Args:
        fixed: Subspaces of the LoRAs i.
        weights: Weights of the LoRA t.
    """
    squares = [
        mx.square(a.T @ weights["layers"][layer][name]["lora_a"]).sum()
        for layer, named in enumerate(fixed)
        for name, a in named.items()
    ]
    return sum(squares[1:], squares[0])
