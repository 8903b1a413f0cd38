"""Forecast a stream before any training (`dylora plan`): similarities, decisions, parameters, memory and time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
from rich.table import Table

from dylora_mlx.data.counts import remarks
from dylora_mlx.data.stream import Skill
from dylora_mlx.growth.decide.resimulate import PastArrival, Resimulated, resimulate, skill_similarities
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.run.build import base_skill_entry
from dylora_mlx.run.cost.memory import process_memory
from dylora_mlx.system import console, process
from dylora_mlx.system.seeds import SeedStream, derived_seed
from dylora_mlx.training.metrics.flops import base_parameters
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.skill import learn, refine, solo, split_skill
from dylora_mlx.training.skill.base_pass import BasePass, run_base_pass


class MeasuredCost(NamedTuple):
    """Measured cost of training one expert on the stream's first skill."""

    step_seconds: float
    """Of one optimizer step."""
    base_pass_seconds: float
    """Of the base passes over all skills."""
    memory: int
    """Bytes that the process takes at the peak of a step."""
    peak: int
    """MLX's part of it."""


def forecast(run: TrainingRun) -> None:
    """Run the base pass over every skill, decide on them in order, and print the decisions and the estimated cost."""
    started = time.perf_counter()
    sources = list(run.skills)
    base_passes = read_skills(run)
    base_entries = [] if run.base_skill is None else [base_skill_entry(run.config, run.model, run.base_skill)]
    base_pass_seconds = time.perf_counter() - started
    names = [*(entry.skill for entry in base_entries), *(skill.name for skill in run.skills)]
    similarities = skill_similarities([*(e.means for e in base_entries), *(s.means for s in base_passes)], run.space)
    print_similarities(names, similarities.tolist())
    arrivals, total_steps = [], 0
    for index, (skill, base_pass) in enumerate(zip(run.skills, base_passes, strict=True)):
        seed = derived_seed(run.config.seed, SeedStream.DECISION, index)
        arrivals.append(PastArrival(skill.name, base_pass.means, skill.train.num_tokens, total_steps, seed))
        total_steps += learn.count_steps(run.config, learn.plan_batches(run, skill, index))
    growth = run.config.growth
    resimulated = resimulate(arrivals, base_entries, run.space, growth, run.config.seed, run.bandit)
    steps, cost = steps_per_skill(run, resimulated), measure_cost(run, base_pass_seconds)
    print_decisions(run, sources, resimulated, steps, cost)
    print_cost(run, resimulated, sum(steps), cost)


def read_skills(run: TrainingRun) -> list[BasePass]:
    """Run the base pass over every skill. One that the run will split is replaced by its parts in `run.skills`, as there."""
    base_passes: list[BasePass] = []
    while len(base_passes) < len(run.skills):
        skill, run.state.skill_index = run.skills[len(base_passes)], len(base_passes)
        base_pass = run_base_pass(run.model, skill, run.config)
        if not split_skill.split_if_mixed(run, skill, base_pass, evaluates=False):
            base_passes.append(base_pass)
    return base_passes


def steps_per_skill(run: TrainingRun, resimulated: Sequence[Resimulated]) -> list[int]:
    """Return the maximum number of steps of each skill, 0 if it is not trained.

    A refinement also trains on replayed documents of its expert's earlier skills.
    """
    steps = []
    for index, (skill, (decision, _)) in enumerate(zip(run.skills, resimulated, strict=True)):
        if decision.action == "refine":
            before = zip(run.skills[:index], resimulated[:index], strict=True)
            earlier = [previous for previous, other in before if other.decision.expert == decision.expert]
            skill = refine.mix_replay(run.config, skill, earlier, index)
        is_trained = decision.creates or decision.action == "refine"
        steps.append(learn.count_steps(run.config, learn.plan_batches(run, skill, index)) if is_trained else 0)
    return steps


def measure_cost(run: TrainingRun, base_pass_seconds: float) -> MeasuredCost:
    """Time a few steps of a solo expert on the first skill, and discard it. `base_pass_seconds` is passed through."""
    skill = run.skills[0]
    rank, alpha = run.expert_rank(skill)
    before, held = process.peak_resident(), mx.get_active_memory()
    model = solo.solo_model(run.base, run.config, Expert(run.model.shapes, rank, alpha, mx.random.key(0)))
    solo.train_solo(model, run.config, skill.train, None, 1, 0, run.compiled)  # warm-up: compiles, and fills the caches
    mx.reset_peak_memory()
    started = time.perf_counter()
    steps = solo.train_solo(model, run.config, skill.train, None, 2, 0, run.compiled)
    step_seconds, peak = (time.perf_counter() - started) / steps, mx.get_peak_memory()
    beside = sum(part.bytes for part in process_memory(run, before, peak, peak - held))
    return MeasuredCost(step_seconds, base_pass_seconds, peak + beside, peak)


def print_similarities(names: list[str], matrix: list[list[float]]) -> None:
    """Print the matrix of similarities between the skills."""
    table = Table(title="similarity of the skills (1 is the same kind of text, 0 unrelated)", title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for name, row in zip(names, matrix, strict=True):
        table.add_row(name, *(f"{value:.3f}" for value in row))
    console.render(table)


def print_decisions(
    run: TrainingRun, sources: list[Skill], resimulated: list[Resimulated], steps: list[int], cost: MeasuredCost
) -> None:
    """Print the counts of every skill's data, the expected decision, new parameters, steps and time.

    `sources` are the skills before any was split, `steps` are those of each skill.
    """
    table = Table(title="expected decisions, in order of arrival", title_justify="left")
    for name in ("skill", "docs", "tokens", "learned", "decision", "similarity", "params", "steps", "min"):
        named = name in ("skill", "decision")
        table.add_column(name, justify="left" if named else "right", no_wrap=named)
    for skill, (decision, unmeasured), num_steps in zip(run.skills, resimulated, steps, strict=True):
        size = run.pool.expert_parameters(run.expert_rank(skill)[0]) if decision.creates else 0
        score = "-" if decision.score is None else f"{decision.score:.3f}"
        learned = sum(int(segment.loss_mask.sum()) for segment in skill.train.segments)
        table.add_row(
            skill.name, str(skill.train.num_documents), str(skill.train.num_tokens), str(learned),
            f"{decision.action} -> {decision.expert}{' *' if unmeasured else ''}", score, str(size), str(num_steps),
            f"{num_steps * cost.step_seconds / 60:.1f}",
        )  # fmt: skip
    console.render(table)
    for skill in sources:
        if note := skill.info.files_note(skill.name):
            console.info(note)
        for remark in remarks(run.data_counts[skill.name]):
            console.info(f"{skill.name}: {remark}")
    if any(unmeasured for _, unmeasured in resimulated):
        console.info(
            "* too close to tell: the run would measure losses first; this is the decision from similarity alone"
        )


def print_cost(run: TrainingRun, resimulated: list[Resimulated], steps: int, cost: MeasuredCost) -> None:
    """Print parameters, memory and time of the whole stream. `steps` is the total of all skills."""
    created = [skill for skill, (decision, _) in zip(run.skills, resimulated, strict=True) if decision.creates]
    sizes = [run.pool.expert_parameters(run.expert_rank(skill)[0]) for skill in created]
    router = (len(created) + 1) * (run.base.args.hidden_size + 1)
    base = base_parameters(run.model)
    share = 100 * (max(sizes, default=0) + router) / base
    console.info(
        f"{len(created)} experts, {sum(sizes)} adapter parameters and {router} of the router, {share:.3f}% of the base's "
        f"{base} train at a time"
    )
    console.info(
        f"memory: the process takes {cost.memory / 1e9:.2f} GB at the peak of a step, MLX's arrays {cost.peak / 1e9:.2f} GB "
        f"of it; time: {cost.base_pass_seconds:.0f} s for the base's pass "
        f"over all skills, about {steps * cost.step_seconds / 60:.1f} minutes of steps at {cost.step_seconds:.2f} s, "
        "evaluations not counted (measured here and now)"
    )
