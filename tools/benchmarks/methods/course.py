"""Progress of one method through the stream: training, its cost, and the losses after each skill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from dylora_mlx.data.stream import Split
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.training.step.losses import MicroBatch
from methods import adapters, answers, training
from methods.adapters import Stacking
from methods.answers import Task
from methods.bench import Bench, Clock, Result, Row
from methods.training import Forward, Learned, Loss, Penalty

ACCURACY = "accuracy"
"""Key of the base's accuracies among the rows of a bench, beside its splits."""


def base_losses(bench: Bench, split: str = "validation") -> Row:
    """Return the losses of every domain under the base alone, measured once per bench."""
    if split not in bench.base_rows:
        model = bench.model()
        bench.base_rows[split] = training.losses(bench, lambda batch: adapters.states(model, batch), split)
    return dict(bench.base_rows[split])


def base_accuracies(bench: Bench, tasks: dict[str, Task]) -> Row:
    """Return the accuracies of the base alone, measured once per bench."""
    if ACCURACY not in bench.base_rows:
        model = bench.model()
        bench.base_rows[ACCURACY] = answers.accuracies(bench, tasks, lambda batch: adapters.states(model, batch))
    return dict(bench.base_rows[ACCURACY])


class Course:
    """One method on one bench. Its matrix and answers, as in Result, start with those of the base."""

    def __init__(self, bench: Bench):
        self.bench, self.model, self.clock = bench, bench.model(), Clock()
        self.matrix, self.tasks = [base_losses(bench)], answers.read_tasks(bench)
        self.answers = [base_accuracies(bench, self.tasks)]
        self.steps = self.tokens = 0

    def train(
        self, learned: Learned, loss: Loss, split: Split, number: int, steps: int, penalty: Penalty | None = None
    ) -> Learned:
        """Train on documents in an order seeded by `number`, and add up the cost; see `training.train`."""
        plan = self.bench.lasting(split, number, steps)
        with self.clock:
            trained = training.train(self.bench, learned, loss, plan, steps, penalty)
        self.steps, self.tokens = self.steps + trained.steps, self.tokens + trained.tokens
        return trained.learned

    def teach(
        self,
        experts: Sequence[Expert],
        expert_id: int,
        split: Split,
        number: int,
        steps: int,
        penalty: Penalty | None = None,
    ) -> Expert:
        """Train one expert within the sum of all, the others frozen; return a trained copy of it."""
        expert = experts[expert_id - 1]
        stack = adapters.stacking(self.model, experts, expert_id)
        loss = _sum_loss(self.bench, self.model, stack, len(experts))
        learned = self.train({"experts": adapters.weights_of(expert)}, loss, split, number, steps, penalty)
        return adapters.with_weights(self.bench, expert, learned["experts"])

    def measure(self, forward: Forward) -> None:
        """Append the validation losses under this forward pass to the matrix, and its accuracies to the answers."""
        self.matrix.append(training.losses(self.bench, forward))
        self.answers.append(answers.accuracies(self.bench, self.tasks, forward))

    def result(self, test: Row, parameters: int, routing: Row | None = None) -> Result:
        """Return the result so far, with these test losses, adapter parameters and routing accuracies."""
        seconds, measured = self.clock.seconds, self.answers if self.tasks else None
        return Result(self.matrix, test, parameters, self.steps, self.tokens, seconds, routing, answers=measured)


def _sum_loss(bench: Bench, model: RoutedDecoder, stack: Stacking, count: int) -> Callable[[Any, MicroBatch], mx.array]:
    def loss(learned: Learned, batch: MicroBatch) -> mx.array:
        hidden = adapters.states(model, batch, stack(learned["experts"]), [1.0] * (count + 1))
        return training.summed_loss(bench, hidden, batch)

    return loss
