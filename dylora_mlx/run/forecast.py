"""What a stream would do, before any training: similarities, decisions, parameters, memory and time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
from rich.table import Table

from dylora_mlx.growth.decide import resimulate as replay
from dylora_mlx.growth.decide.resimulate import Arrival, Played
from dylora_mlx.growth.novelty import split as mixture
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.run import build as assembly
from dylora_mlx.system import console
from dylora_mlx.system.seeds import SeedStream, derived_seed, generator
from dylora_mlx.training.metrics.flops import base_parameters
from dylora_mlx.training.run import Run
from dylora_mlx.training.skill import learn, refine
from dylora_mlx.training.skill import solo as alone
from dylora_mlx.training.skill.base_pass import Study, examine


class Cost(NamedTuple):
    """Measured on the stream's first skill: seconds of one step, the seconds that the base's passes over all skills took,
    and the peak of MLX's memory in gigabytes."""

    step: float
    studies: float
    peak: float


def plan(run: Run) -> None:
    """Embed every skill, decide on them in order, and count what learning them would take."""
    started = time.perf_counter()
    studies = [examine(run.model, skill, run.config) for skill in run.skills]
    known = [] if run.known is None else [assembly.first_entry(run)]
    spent = time.perf_counter() - started
    names = [*(entry.skill for entry in known), *(skill.name for skill in run.skills)]
    matrix = replay.similarities([*(e.means for e in known), *(s.means for s in studies)], run.space)
    show_matrix(names, matrix.tolist())
    arrivals, step = [], 0
    for number, (skill, study) in enumerate(zip(run.skills, studies, strict=True)):
        seed = derived_seed(run.config.seed, SeedStream.DECISION, number)
        arrivals.append(Arrival(skill.name, study.means, skill.train.tokens, step, seed))
        step += learn.steps_of(run, learn.plan_of(run, skill, number))
    growth = run.config.growth
    played = replay.play(arrivals, known, run.space, growth, run.config.seed, run.learned)
    steps, cost = steps_of(run, played), measured(run, spent)
    show_decisions(run, studies, played, steps, cost)
    show_cost(run, played, sum(steps), cost)


def steps_of(run: Run, played: Sequence[Played]) -> list[int]:
    """Steps that each skill would be trained for, at most. A refinement replays documents of what its expert holds."""
    found = []
    for number, (skill, (decision, _)) in enumerate(zip(run.skills, played, strict=True)):
        if decision.action == "refine":
            before = zip(run.skills[:number], played[:number], strict=True)
            earlier = [each for each, other in before if other.decision.expert == decision.expert]
            skill = refine.with_replay(run, skill, earlier, number)
        learned = decision.creates or decision.action == "refine"
        found.append(learn.steps_of(run, learn.plan_of(run, skill, number)) if learned else 0)
    return found


def measured(run: Run, studies: float) -> Cost:
    """Time some steps of one expert on the first skill; nothing of it is kept."""
    skill = run.skills[0]
    rank, alpha = run.rank(skill)
    model = alone.routed_alone(run.base, run.config, Expert(run.model.shapes, rank, alpha, mx.random.key(0)))
    alone.train_alone(model, run.config, skill.train, None, 1, 0, run.compiled)  # compiles, fills the caches
    mx.reset_peak_memory()
    started = time.perf_counter()
    steps = alone.train_alone(model, run.config, skill.train, None, 2, 0, run.compiled)
    return Cost((time.perf_counter() - started) / steps, studies, mx.get_peak_memory() / 1e9)


def show_matrix(names: list[str], matrix: list[list[float]]) -> None:
    table = Table(title="similarity of the skills (cosine of centred embeddings)", title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for name, row in zip(names, matrix, strict=True):
        table.add_row(name, *(f"{value:.3f}" for value in row))
    console.show(table)


def show_decisions(run: Run, studies: list[Study], played: list[Played], steps: list[int], cost: Cost) -> None:
    table = Table(title="expected decisions, in order of arrival", title_justify="left")
    for name in ("skill", "docs", "tokens", "decision", "cosine", "params", "steps", "min"):
        named = name in ("skill", "decision")
        table.add_column(name, justify="left" if named else "right", no_wrap=named)
    for skill, (found, unknown), taken in zip(run.skills, played, steps, strict=True):
        size = run.pool.size(run.rank(skill)[0]) if found.creates else 0
        score = "-" if found.score is None else f"{found.score:.3f}"
        table.add_row(
            skill.name, str(skill.train.documents), str(skill.train.tokens),
            f"{found.action} -> {found.expert}{' *' if unknown else ''}", score, str(size), str(taken),
            f"{taken * cost.step / 60:.1f}",
        )  # fmt: skip
    console.show(table)
    for number, (skill, study) in enumerate(zip(run.skills, studies, strict=True)):
        rng = generator(run.config.seed, SeedStream.SKILL_SPLIT, number)
        if (
            run.config.growth.split
            and (kinds := mixture.partition(study.means, run.space, run.config.growth, rng).parts) > 1
        ):
            console.say(f"{skill.name} holds documents of {kinds} kinds: each would be decided on by itself")
    if any(unknown for _, unknown in played):
        console.say("* too close to tell: the run would measure losses first; this is what similarity alone says")


def show_cost(run: Run, played: list[Played], steps: int, cost: Cost) -> None:
    """Parameters, memory and time of the whole stream. steps: of all skills."""
    created = [skill for skill, (found, _) in zip(run.skills, played, strict=True) if found.creates]
    sizes = [run.pool.size(run.rank(skill)[0]) for skill in created]
    router = (len(created) + 1) * (run.base.args.hidden_size + 1)
    base = base_parameters(run.model)
    share = 100 * (max(sizes, default=0) + router) / base
    console.say(
        f"{len(created)} experts, {sum(sizes)} adapter parameters and {router} of the router, {share:.3f}% of the base's "
        f"{base} train at a time"
    )
    console.say(
        f"memory: {cost.peak:.2f} GB at the peak of a step; time: {cost.studies:.0f} s for the base's pass over all skills, "
        f"about {steps * cost.step / 60:.1f} minutes of steps at {cost.step:.2f} s, evaluations not counted (measured here and now)"
    )
