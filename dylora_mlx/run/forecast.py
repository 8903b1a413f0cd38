"""What a stream would do, before any training: similarities, decisions, parameters, memory and time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
from rich.table import Table

from dylora_mlx.growth.decide.resimulate import PastArrival, Resimulated, resimulate, skill_similarities
from dylora_mlx.growth.novelty.split import find_parts
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.run.build import base_skill_entry
from dylora_mlx.system import console
from dylora_mlx.system.seeds import SeedStream, derived_seed, generator
from dylora_mlx.training.metrics.flops import base_parameters
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.skill import learn, refine, solo
from dylora_mlx.training.skill.base_pass import BasePass, run_base_pass


class MeasuredCost(NamedTuple):
    """Measured on the stream's first skill: seconds of one step, the seconds that the base's passes over all skills took,
    and the peak of MLX's memory in gigabytes."""

    step: float
    studies: float
    peak: float


def forecast(run: TrainingRun) -> None:
    """Embed every skill, decide on them in order, and count what learning them would take."""
    started = time.perf_counter()
    studies = [run_base_pass(run.model, skill, run.config) for skill in run.skills]
    known = [] if run.base_skill is None else [base_skill_entry(run.config, run.model, run.base_skill)]
    spent = time.perf_counter() - started
    names = [*(entry.skill for entry in known), *(skill.name for skill in run.skills)]
    matrix = skill_similarities([*(e.means for e in known), *(s.means for s in studies)], run.space)
    print_similarities(names, matrix.tolist())
    arrivals, step = [], 0
    for number, (skill, study) in enumerate(zip(run.skills, studies, strict=True)):
        seed = derived_seed(run.config.seed, SeedStream.DECISION, number)
        arrivals.append(PastArrival(skill.name, study.means, skill.train.num_tokens, step, seed))
        step += learn.count_steps(run.config, learn.plan_batches(run, skill, number))
    growth = run.config.growth
    played = resimulate(arrivals, known, run.space, growth, run.config.seed, run.bandit)
    steps, cost = steps_per_skill(run, played), measure_cost(run, spent)
    print_decisions(run, studies, played, steps, cost)
    print_cost(run, played, sum(steps), cost)


def steps_per_skill(run: TrainingRun, played: Sequence[Resimulated]) -> list[int]:
    """Steps that each skill would be trained for, at most. A refinement replays documents of what its expert holds."""
    found = []
    for number, (skill, (decision, _)) in enumerate(zip(run.skills, played, strict=True)):
        if decision.action == "refine":
            before = zip(run.skills[:number], played[:number], strict=True)
            earlier = [each for each, other in before if other.decision.expert == decision.expert]
            skill = refine.mix_replay(run.config, skill, earlier, number)
        learned = decision.creates or decision.action == "refine"
        found.append(learn.count_steps(run.config, learn.plan_batches(run, skill, number)) if learned else 0)
    return found


def measure_cost(run: TrainingRun, studies: float) -> MeasuredCost:
    """Time some steps of one expert on the first skill; nothing of it is kept."""
    skill = run.skills[0]
    rank, alpha = run.expert_rank(skill)
    model = solo.solo_model(run.base, run.config, Expert(run.model.shapes, rank, alpha, mx.random.key(0)))
    solo.train_solo(model, run.config, skill.train, None, 1, 0, run.compiled)  # compiles, fills the caches
    mx.reset_peak_memory()
    started = time.perf_counter()
    steps = solo.train_solo(model, run.config, skill.train, None, 2, 0, run.compiled)
    return MeasuredCost((time.perf_counter() - started) / steps, studies, mx.get_peak_memory() / 1e9)


def print_similarities(names: list[str], matrix: list[list[float]]) -> None:
    table = Table(title="similarity of the skills (cosine of centred embeddings)", title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for name, row in zip(names, matrix, strict=True):
        table.add_row(name, *(f"{value:.3f}" for value in row))
    console.render(table)


def print_decisions(
    run: TrainingRun, studies: list[BasePass], played: list[Resimulated], steps: list[int], cost: MeasuredCost
) -> None:
    table = Table(title="expected decisions, in order of arrival", title_justify="left")
    for name in ("skill", "docs", "tokens", "decision", "cosine", "params", "steps", "min"):
        named = name in ("skill", "decision")
        table.add_column(name, justify="left" if named else "right", no_wrap=named)
    for skill, (found, unknown), taken in zip(run.skills, played, steps, strict=True):
        size = run.pool.expert_parameters(run.expert_rank(skill)[0]) if found.creates else 0
        score = "-" if found.score is None else f"{found.score:.3f}"
        table.add_row(
            skill.name, str(skill.train.num_documents), str(skill.train.num_tokens),
            f"{found.action} -> {found.expert}{' *' if unknown else ''}", score, str(size), str(taken),
            f"{taken * cost.step / 60:.1f}",
        )  # fmt: skip
    console.render(table)
    for number, (skill, study) in enumerate(zip(run.skills, studies, strict=True)):
        rng = generator(run.config.seed, SeedStream.SKILL_SPLIT, number)
        if run.config.growth.split and (kinds := find_parts(study.means, run.space, run.config.growth, rng).parts) > 1:
            console.info(f"{skill.name} holds documents of {kinds} kinds: each would be decided on by itself")
    if any(unknown for _, unknown in played):
        console.info("* too close to tell: the run would measure losses first; this is what similarity alone says")


def print_cost(run: TrainingRun, played: list[Resimulated], steps: int, cost: MeasuredCost) -> None:
    """Parameters, memory and time of the whole stream. steps: of all skills."""
    created = [skill for skill, (found, _) in zip(run.skills, played, strict=True) if found.creates]
    sizes = [run.pool.expert_parameters(run.expert_rank(skill)[0]) for skill in created]
    router = (len(created) + 1) * (run.base.args.hidden_size + 1)
    base = base_parameters(run.model)
    share = 100 * (max(sizes, default=0) + router) / base
    console.info(
        f"{len(created)} experts, {sum(sizes)} adapter parameters and {router} of the router, {share:.3f}% of the base's "
        f"{base} train at a time"
    )
    console.info(
        f"memory: {cost.peak:.2f} GB at the peak of a step; time: {cost.studies:.0f} s for the base's pass over all skills, "
        f"about {steps * cost.step / 60:.1f} minutes of steps at {cost.step:.2f} s, evaluations not counted (measured here and now)"
    )
