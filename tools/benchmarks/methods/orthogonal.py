"""O-LoRA: each new LoRA is pushed out of the subspaces of the earlier ones, and all are summed.

Wang et al. 2023, "Orthogonal Subspace Learning for Language Model Continual Learning", section 3: with O = A_i^T A_t of an
earlier LoRA i and the new one t (equation 6), the loss is - sum log p + lambda sum_i L(A_i, A_t) (equation 7), where L is
the sum of the SQUARED entries of O (equation 8). The authors' code sums their absolute values instead; here it is the
paper's squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from dylora_mlx.model.experts.lora import Expert
from methods import adapters, training
from methods.apart import Owned
from methods.bench import Bench, Result
from methods.course import Course
from methods.training import Penalty

LAMBDA = 0.5
"""Of the penalty, beside a loss in nats a token: the paper's value for most of its tasks."""

Subspaces = list[dict[str, mx.array]]
"""By layer and projection, A [inputs, R] of some LoRAs side by side, float32."""


def orthogonal(bench: Bench) -> Result:
    """A LoRA for each owner; a skill whose owner has one goes on training it, all others frozen."""
    course = Course(bench)
    after = learn(course)
    forward = adapters.all_on(course.model, list(after[-1].values()))
    parameters = sum(bench.parameters(expert.rank) for expert in after[-1].values())
    return course.result(training.losses(bench, forward, "test"), parameters)


def learn(course: Course, weight: float = LAMBDA) -> list[Owned]:
    """Go through the stream; returns the LoRAs after each skill. weight: lambda."""
    bench, now, after = course.bench, Owned(), []
    for number, skill in enumerate(bench.skills):
        owner = bench.owners[skill.name]
        if owner not in now:
            now = {**now, owner: bench.expert(bench.config.model.rank, owner)}
        expert_id = 1 + list(now).index(owner)
        others = [expert for other, expert in now.items() if other != owner]
        added = penalty(others, weight) if others else None
        learned = course.teach(list(now.values()), expert_id, skill.train, number, bench.steps(skill), added)
        now = {**now, owner: learned}
        after.append(now)
        course.measure(adapters.all_on(course.model, list(now.values())))
    return after


def penalty(others: Sequence[Expert], weight: float = LAMBDA) -> Penalty:
    """lambda times the overlap of what is learned with the other LoRAs."""
    fixed = subspaces(others)
    return lambda learned: weight * overlap(fixed, learned["experts"])


def subspaces(experts: Sequence[Expert]) -> Subspaces:
    """Of at least one LoRA; evaluated."""
    found = [
        {name: mx.concatenate([e.layers[layer][name].lora_a for e in experts], axis=1) for name in named}
        for layer, named in enumerate(experts[0].layers)
    ]
    mx.eval(found)
    return found


def overlap(fixed: Subspaces, weights: Any) -> mx.array:
    """Sum of the squared entries of A_i^T A_t over all layers, projections and LoRAs i; weights: of the LoRA t."""
    squares = [
        mx.square(a.T @ weights["layers"][layer][name]["lora_a"]).sum()
        for layer, named in enumerate(fixed)
        for name, a in named.items()
    ]
    return sum(squares[1:], squares[0])
