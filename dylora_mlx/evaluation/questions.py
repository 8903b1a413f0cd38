"""Accuracy on multiple-choice questions: by the likelihood of each option, and by the answer that is generated.

The likeliest option is the one with the lowest summed loss of its answer (accuracy), or with the lowest loss per byte, which
favours long options less (normalised accuracy, `acc_norm` in lm-evaluation-harness).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from dylora_mlx.config import Source
from dylora_mlx.data import packing, skills
from dylora_mlx.data.questions import Question, has_options, read_questions
from dylora_mlx.data.stream import Split
from dylora_mlx.errors import UserError
from dylora_mlx.evaluation.code import model_factories
from dylora_mlx.exporting import formats
from dylora_mlx.generation import batch, decode
from dylora_mlx.generation.batch import BatchPrompt
from dylora_mlx.generation.stream import Sampling
from dylora_mlx.model.routing.router import forced_routing
from dylora_mlx.run.run_folder import OpenedRun
from dylora_mlx.system import console
from dylora_mlx.training.step.domains import Domain, make_domains
from dylora_mlx.training.step.evaluate import Evaluator, evaluate

EXTRA_TOKENS = 4
"""Tokens that a generated answer may have beyond the longest option."""


class Accuracy(NamedTuple):
    """Results of one model on the questions of one task. Field names are keys of the JSON file."""

    accuracy: float
    """Share of questions whose right option is the likeliest."""
    normalised: float
    """The same with the loss per byte of the option."""
    greedy: float | None
    """Share of questions whose generated answer is the right option, letter for letter; None if nothing was generated."""
    chosen: list[int]
    """Index of the likeliest option of each question."""


class TaskAccuracy(NamedTuple):
    """Results on the questions of one task. Field names are keys of the JSON file."""

    questions: int
    majority: float
    """Share of the most frequent answer: the accuracy of always giving it."""
    models: dict[str, Accuracy]
    """By model: base, mixture, and the expert that holds the task's skill under its name."""
    own: str | None
    """Name of that expert; None if the task is no skill of the run, or the base serves it."""


def question_domain(name: str, questions: Sequence[Question], positions: int, rows: int, longest: int) -> Domain:
    """Pack the documents of all options of all questions into evaluation batches.

    Args:
        name: name of the domain.
        questions: the questions.
        positions: positions of a row, more if a document is longer: a cut document would lose its prompt.
        rows: rows of a batch.
        longest: the base's context length. Raises UserError for a document beyond it.
    """
    documents = [document for question in questions for document in question.documents]
    for question in questions:
        length = max(len(document.tokens) for document in question.documents)
        if length > longest:
            raise UserError(f"{question.location}: {length} tokens, and the base reads {longest}; shorten the question")
    positions = max(positions, *(len(document.tokens) - 1 for document in documents))
    segments = packing.split_documents(documents, positions)
    return make_domains({name: Split(segments, len(documents))}, positions, rows)[name]


def chosen_options(questions: Sequence[Question], losses: Sequence[float]) -> tuple[list[int], list[int]]:
    """Return the index of the likeliest option of each question, by summed loss and by loss per byte.

    `losses` holds the summed loss of the answer in each document of `question_domain`, in order.
    """
    plain, normalised, start = [], [], 0
    for question in questions:
        nats = np.array(losses[start : start + len(question.options)])
        lengths = [len(option.encode()) for option in question.options]
        plain.append(int(nats.argmin()))
        normalised.append(int((nats / lengths).argmin()))
        start += len(question.options)
    return plain, normalised


def task_accuracies(
    run: OpenedRun, sources: Sequence[Source], split: str, limit: int | None, generates: bool
) -> Iterator[tuple[str, TaskAccuracy]]:
    """Yield the name and the accuracies of every source that holds questions, one after another.

    Args:
        run: the run to measure, under its final routing.
        sources: the domains. Those without a column `options` are passed over.
        split: validation or test.
        limit: number of questions of a source, the first ones; None for all.
        generates: also generate the answers.

    Raises UserError for a source that cannot be read, for a malformed question, if no source holds any, and for answers of
    a run that mixes experts in the logits.
    """
    if generates:
        decode.check_has_caches(run.model, "leave out --greedy")
    routing, names, found = formats.mixture_routing(run).routing, formats.expert_names(run.pool), False
    evaluator, adapters = Evaluator(run.model, compiled=False), run.model.adapters(routing.top_k)
    for source in sources:
        read = skills.read_source(source, run.config.data, run.config.seed)
        records = getattr(read, split)[:limit]
        if not has_options(records):
            continue
        found = True
        questions = read_questions(records, read.source, run.base.tokenizer)
        rows = (run.config.data.max_seq_length, run.config.training.batch_size, run.base.context_length)
        domain = question_domain(source.name, questions, *rows)
        expert_id = run.library.experts_of.get(source.name, 0)
        own = names[expert_id] if expert_id else None
        forced: dict[str, int | None] = {"base": 0, "mixture": None, **({own: expert_id} if own else {})}
        models: dict[str, Accuracy] = {}
        for name, expert in forced.items():
            with console.progress(f"{source.name}: {name}", len(questions)) as progress:
                how = routing if expert is None else forced_routing()
                result = evaluate(run.model, domain, how, expert, adapters, evaluator)
                greedy = _generated_share(run, name, questions, progress.advance) if generates else None
            plain, normalised = chosen_options(questions, [nats for nats, _ in result.documents])
            answers = [question.answer for question in questions]
            models[name] = Accuracy(_share(plain, answers), _share(normalised, answers), greedy, plain)
        majority = max(Counter(question.options[question.answer] for question in questions).values()) / len(questions)
        yield source.name, TaskAccuracy(len(questions), majority, models, own)
    if not found:
        raise UserError(
            "--options: no source has records with a column 'options'; name one that has with --data NAME=SOURCE"
        )


def _generated_share(run: OpenedRun, name: str, questions: Sequence[Question], on_done: Callable[[], None]) -> float:
    """Return the share of questions whose greedy answer, up to its first line's end, is the right option."""
    tokenizer = run.base.tokenizer.stopping_at(())
    prompts = []
    for question in questions:
        longest = max(int(document.loss_mask.sum()) for document in question.documents) + EXTRA_TOKENS
        room = max(run.base.context_length - len(question.prompt_ids), 0)
        prompts.append(BatchPrompt(question.prompt_ids, min(longest, room)))
    with model_factories(run)[name]() as model:
        texts = batch.generate_texts(model, tokenizer, prompts, Sampling(), on_done)
    return _share(
        [text.text.strip().partition("\n")[0].strip() for text in texts],
        [question.options[question.answer] for question in questions],
    )


def _share(given: Sequence[Any], right: Sequence[Any]) -> float:
    return sum(a == b for a, b in zip(given, right, strict=True)) / len(right)


def to_json(task: TaskAccuracy) -> dict[str, Any]:
    """Return a task's results as JSON values."""
    return {**task._asdict(), "models": {name: accuracy._asdict() for name, accuracy in task.models.items()}}


def interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95% interval of a share of `count` questions (Wilson 1927)."""
    z = 1.959964
    centre, spread = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    return max((centre - spread) / (1 + z * z / count), 0.0), min((centre + spread) / (1 + z * z / count), 1.0)


def print_accuracies(tasks: dict[str, TaskAccuracy]) -> None:
    """Print the accuracies of base, mixture and own expert as a table, with their mean over the tasks."""
    generated = any(accuracy.greedy is not None for task in tasks.values() for accuracy in task.models.values())
    table = Table(title="accuracy on multiple-choice questions, by the likelihood of each option", title_justify="left")
    columns = ("task", "questions", "majority", "base", "mixture", "95%", "own expert", "normalised")
    for name in (*columns, *(["base, generated", "generated"] if generated else [])):
        table.add_column(name, justify="left" if name == "task" else "right")
    for name, task in tasks.items():
        mixture, base = task.models["mixture"], task.models["base"]
        low, high = interval(mixture.accuracy, task.questions)
        own = f"{task.models[task.own].accuracy:.1%}" if task.own else "-"
        greedy = [f"{base.greedy:.1%}", f"{mixture.greedy:.1%}"] if generated else []
        table.add_row(
            name, str(task.questions), f"{task.majority:.1%}", f"{base.accuracy:.1%}", f"{mixture.accuracy:.1%}",
            f"{low:.1%} to {high:.1%}", own, f"{mixture.normalised:.1%}", *greedy,
        )  # fmt: skip
    if len(tasks) > 1:
        means = [_mean([task.models[name].accuracy for task in tasks.values()]) for name in ("base", "mixture")]
        table.add_row("mean", "", _mean([t.majority for t in tasks.values()]), *means, "", "", "")
    console.render(table)


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.1%}"
