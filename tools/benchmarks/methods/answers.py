"""Accuracy of the compared methods on multiple-choice questions: the share whose right option is the likeliest."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx.data import skills
from dylora_mlx.data.packing import Batch
from dylora_mlx.data.questions import Question, has_options, read_questions
from dylora_mlx.evaluation.questions import chosen_options, question_domain
from dylora_mlx.model.kernels import chunked_loss, streams
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.step.domains import Domain
from dylora_mlx.training.step.losses import MicroBatch
from methods import training
from methods.bench import Bench, Row
from methods.training import Forward


class Task(NamedTuple):
    """The questions of one skill, and the documents of all their options."""

    questions: list[Question]
    domain: Domain

    def accuracy(self, losses: Sequence[float]) -> float:
        """Return the share of questions whose right option has the lowest summed loss, given that of every document."""
        chosen, _ = chosen_options(self.questions, losses)
        return float(np.mean([c == question.answer for c, question in zip(chosen, self.questions, strict=True)]))


def read_tasks(bench: Bench) -> dict[str, Task]:
    """Return the tasks of a bench by name: the first `bench.num_questions` test records of every skill that has options.

    Raises UserError for a malformed question.
    """
    config, found = bench.config, dict[str, Task]()
    for source in config.skills if bench.num_questions else []:
        read = skills.read_source(source, config.data, bench.seed)
        records = read.test[: bench.num_questions]
        if has_options(records):
            questions = read_questions(records, read.source, bench.base.tokenizer)
            shape = (config.data.max_seq_length, config.training.batch_size, bench.base.context_length)
            found[source.name] = Task(questions, question_domain(source.name, questions, *shape))
    return found


def accuracies(bench: Bench, tasks: dict[str, Task], forward: Forward, names: Collection[str] | None = None) -> Row:
    """Return the accuracy on every task, or on the named ones, under a forward pass."""
    return {
        name: task.accuracy(document_losses(bench, forward, task.domain))
        for name, task in tasks.items()
        if names is None or name in names
    }


def document_losses(bench: Bench, forward: Forward, domain: Domain) -> list[float]:
    """Return the summed loss of each document of a domain in nats, in the order of the documents."""
    batches = training.on_device(bench, domain)
    work = [partial(_token_losses, bench, forward, batch) for batch in batches]
    nats = [run() for run in work] if bench.compiled else streams.run_concurrently(work)
    sums: dict[int, float] = {}
    for batch, micro, losses in zip(domain.batches, batches, nats, strict=True):
        weighted = np.array(losses, np.float64) * np.array(micro.weights, np.float64)
        for document, loss in zip(_documents(domain, batch)[np.array(micro.target_positions)], weighted, strict=True):
            sums[int(document)] = sums.get(int(document), 0.0) + float(loss)
    sums.pop(-1, None)  # positions of padding
    return [sums[document] for document in sorted(sums)]


def of_run(run: TrainingRun, tasks: dict[str, Task]) -> Row:
    """Return the accuracy of a run's mixture, under its final routing, on every task. No task is named to the router."""
    evaluated = run.evaluate({name: task.domain for name, task in tasks.items()}) if tasks else {}
    return {name: task.accuracy([nats for nats, _ in evaluated[name].documents]) for name, task in tasks.items()}


def _token_losses(bench: Bench, forward: Forward, batch: MicroBatch) -> mx.array:
    """Return the loss of each target of a micro-batch, float32 [N]."""
    hidden = forward(batch)
    selected = hidden.reshape(-1, hidden.shape[-1])[batch.target_positions]
    layer = chunked_loss.output_layer(bench.base.model)
    return chunked_loss.token_losses(layer, selected, batch.targets, chunked_loss.tile_size(len(selected)), False)


def _documents(domain: Domain, batch: Batch) -> np.ndarray:
    """Return the document of each position of a batch, int [B * L]; -1 on padding."""
    documents = np.full(batch.segment_ids.shape, -1)
    for row, indices in enumerate(batch.rows):
        for number, index in enumerate(indices, 1):
            document = index if domain.documents is None else domain.documents[index]
            documents[row][batch.segment_ids[row] == number] = document
    return documents.reshape(-1)
