"""The package's training as a user would run it, and ablations with parts removed or added."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from dylora_mlx.config import Config
from dylora_mlx.run import loop, run_folder
from dylora_mlx.training.callbacks import Callback, Callbacks, SkillEvent
from dylora_mlx.training.run import TrainingRun
from methods import answers, training
from methods.answers import Task
from methods.bench import Bench, Clock, Result, Row

Changes = Mapping[str, Mapping[str, Any]]
"""Changed options by section of the config."""

VARIANTS: dict[str, Changes] = {
    "ours": {},
    "ours, reusing what is known": {"growth": {"when_known": "reuse"}},
    "ours, top-1": {"growth": {"top_k": 1}},
    "ours, top-2": {"growth": {"top_k": 2}},
    "ours, dense": {"growth": {"top_k": 64}},
    "ours, no rehearsal": {"training": {"rehearsal_coef": 0.0}},
    "ours, no correction of the discriminant": {"training": {"router_fit_steps": 0}},
    "ours, no null expert": {"growth": {"base_skill": None}},
    "ours, router reads layer 1": {"model": {"router_layer": 1}},
    "ours, router reads layer 3": {"model": {"router_layer": 3}},
    "ours, router reads single tokens": {"model": {"document_mean_weight": 0.0}},
    "ours, router reads half of the plain document mean": {
        "model": {"document_mean_weight": 0.5, "document_mean_decay": 1.0}
    },
    "ours, mixed in the logits": {"model": {"mixing": "logits"}},
    "ours, with balance 0.01": {"training": {"load_balance_coef": 0.01}},
    "ours, with entropy 0.02": {"training": {"entropy_coef": 0.02}},
    "ours, with replay 0.5": {"training": {"replay_coef": 0.5}},
    "ours, with distillation 0.5": {"training": {"distillation_coef": 0.5}},
    "ours, experts from scratch": {"growth": {"expert_init": "scratch"}},
    "ours, no floor": {"growth": {"min_gate": 0.0}},
    "ours, with a floor of 1": {"growth": {"min_gate": 1.0}},
    "ours, with capacity 1.25": {"training": {"capacity_factor": 1.25}},
}
"""The default settings and the ablations, by name."""


def ours(bench: Bench, changes: Changes) -> Result:
    """Train a whole run with decisions, growth and routing. Its seconds include evaluations and decisions."""
    config = changed(bench, changes)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        run, measured = run_folder.start_run(config, Path(folder) / "run"), Answers(answers.read_tasks(bench))
        measured.measure(run)
        run.callbacks = Callbacks([measured])
        started = time.perf_counter()
        loop.train_stream(run)
        seconds = time.perf_counter() - started - measured.clock.seconds
        test = {name: evaluation.loss for name, evaluation in run.evaluate(run.tests).items()}
        own_losses = {
            name: run.evaluate_expert(name, expert_id).loss for name, expert_id in expert_ids(bench, run).items()
        }
        routing = accuracy(bench, run)
    tokens = sum(learned(bench, record.skill, record.steps) for record in run.pool.records)
    parameters, rows = run.pool.num_parameters(), measured.rows if measured.tasks else None
    return Result(run.state.matrix, test, parameters, run.state.step, tokens, seconds, routing, own_losses, rows)


class Answers(Callback):
    """Accuracies of a run on questions, after every skill."""

    def __init__(self, tasks: dict[str, Task]):
        self.tasks, self.rows, self.clock = tasks, list[Row](), Clock()
        self.run: TrainingRun | None = None

    def measure(self, run: TrainingRun) -> None:
        """Measure a run before its first skill, and from now on after each."""
        self.run = run
        self.rows.append(answers.of_run(run, self.tasks))

    def on_skill(self, event: SkillEvent) -> None:
        """Add the accuracies after a skill."""
        assert self.run is not None
        with self.clock:
            self.rows.append(answers.of_run(self.run, self.tasks))


def learned(bench: Bench, name: str, steps: int) -> int:
    """Return the approximate number of tokens with a loss in `steps` steps on a skill.

    It is counted in the order of the bench's plan; the run's order may differ, but steps have similar numbers of
    tokens.
    """
    skill = next(skill for skill in bench.skills if skill.name == name)
    plan = bench.plan(skill.train, 0)
    step_tokens = [sum(int(batch.loss_mask.sum()) for batch in step) for step in plan.steps()]
    return sum(step_tokens[number % len(step_tokens)] for number in range(steps))


def changed(bench: Bench, changes: Changes) -> Config:
    """Return the bench's config with some options changed.

    No skill is split, so that every method has the same skills. Without a growth.base_skill, the bench's base skill
    becomes a domain, so that it is still evaluated.
    """
    config = bench.config
    assert config.growth.base_skill is not None
    sections = {name: replace(getattr(config, name), **options) for name, options in changes.items()}
    growth = replace(sections.get("growth", config.growth), split=False)
    domains = list(config.domains) if growth.base_skill else [*config.domains, config.growth.base_skill]
    return replace(config, **{**sections, "growth": growth, "domains": domains})


def expert_ids(bench: Bench, run: TrainingRun) -> dict[str, int]:
    """Return the expert_id that serves each skill, from the library."""
    return {name: expert_id for name, expert_id in run.library.experts_of.items() if name in bench.names}


def accuracy(bench: Bench, run: TrainingRun) -> Row:
    """Return the share of each skill's validation tokens, padding excluded, whose largest gate is its own expert's."""
    shares = {}
    for name, expert_id in expert_ids(bench, run).items():
        right, total = 0.0, 0.0
        for batch in training.on_device(bench, bench.domains("validation")[name]):
            features = run.model.router_features(batch.inputs, batch.attn_layout)  # type: ignore[arg-type]
            features = run.model.router_inputs(features, batch.document_starts)
            chosen, valid_mask = np.array(mx.argmax(run.model.router(features), axis=-1)), np.array(batch.valid_mask)
            right, total = right + float(((chosen == expert_id) * valid_mask).sum()), total + float(valid_mask.sum())
        shares[name] = right / total
    return shares
