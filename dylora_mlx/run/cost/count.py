"""What a run computes, counted from its rows before any of it is done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from dylora_mlx.data import packing, stream
from dylora_mlx.data.stream import Shape, Skill, Stream
from dylora_mlx.model.experts import autotune as crossover
from dylora_mlx.training.metrics.flops import evaluation_flops, head_flops, reading_flops, step_flops
from dylora_mlx.training.run import Run
from dylora_mlx.training.skill import base_pass as study
from dylora_mlx.training.skill import learn, refine
from dylora_mlx.training.step.evaluate import Domain

Rate = Literal["reading", "evaluation", "step", "router"]
"""Kinds of work that a calibration times, each by itself: so many operations a second."""


class Arrival(NamedTuple):
    """What becomes of a skill of the stream: an action of the policy, and the expert that serves it, 0 for the base."""

    action: str
    expert: int


class Learned(NamedTuple):
    """A skill as it is trained on, which for a refinement is mixed with what the expert holds, its arrival, and its
    steps, None if it is not trained."""

    skill: Skill
    arrival: Arrival
    plan: Stream | None
    steps: int

    @property
    def creates(self) -> bool:
        return self.arrival.action == "create"


class Work(NamedTuple):
    """One kind of work of a whole run. phase: as the run's clock calls it; count: of what; flops: of matrix products, a
    multiply-add as two."""

    phase: str
    count: int
    what: str
    rate: Rate
    flops: int


def all_new(run: Run) -> list[Arrival]:
    """Every skill gets an expert, as many as the pool may hold; those that come later are served by the first."""
    most = run.config.growth.max_experts
    return [Arrival("create", n) if n <= most else Arrival("reuse", 1) for n in range(1, len(run.skills) + 1)]


def one_expert(run: Run) -> list[Arrival]:
    """The first skill gets an expert, and every later one is known to it."""
    known = Arrival(run.config.growth.when_known, 1)
    return [Arrival("create", 1), *[known] * (len(run.skills) - 1)]


def planned(run: Run, arrivals: Sequence[Arrival]) -> list[Learned]:
    """The steps of every skill, at most."""
    found = []
    for number, (skill, arrival) in enumerate(zip(run.skills, arrivals, strict=True)):
        if arrival.action == "refine":
            before = zip(run.skills[:number], arrivals[:number], strict=True)
            skill = refine.with_replay(run, skill, [s for s, other in before if other.expert == arrival.expert], number)
        plan = learn.plan_of(run, skill, number) if arrival.action in ("create", "refine") else None
        found.append(Learned(skill, arrival, plan, 0 if plan is None else learn.steps_of(run, plan)))
    return found


def works(run: Run, skills: Sequence[Learned]) -> list[Work]:
    """All that takes long in a run."""
    return [_reading(run, skills), *_evaluations(run, skills), _steps(run, skills), _fits(run, skills)]


def everything(run: Run) -> list[Skill]:
    """The skills of the stream, and before them what the base knows."""
    return [*([run.known] if run.known else []), *run.skills]


def _reading(run: Run, skills: Sequence[Learned]) -> Work:
    """The base over the documents of each skill, and again over what a refinement mixes."""
    again = [found.skill for found in skills if found.arrival.action == "refine"]
    shapes = [shape for skill in (*everything(run), *again) for shape in _read(run, skill)]
    flops = sum(reading_flops(run.model, *shape) for shape in shapes)
    return Work("reading", sum(rows for rows, _ in shapes), "rows", "reading", flops)


def _read(run: Run, skill: Skill) -> list[tuple[int, int]]:
    """Rows and positions of the batches in which the base reads a skill."""
    pieces, _ = study.read(skill, run.config, run.base.args.hidden_size)
    length = run.config.data.row_length
    parts = stream.evaluation_rows(pieces, length, run.config.training.batch_rows)
    return [packing.extent(pieces, part, length, None) for part in parts]


def shapes_of(domains: Iterable[Domain]) -> list[Shape]:
    """Of all batches of some domains."""
    return [
        Shape(
            len(batch.inputs),
            batch.inputs.shape[1],
            max(1, int(batch.learn.sum())) if domain.targets is None else domain.targets,
        )
        for domain in domains
        for batch in domain.batches
    ]


def _evaluations(run: Run, skills: Sequence[Learned]) -> list[Work]:
    """All domains: the base by itself, the mixture for every skill, and three ways at the end on test text. Where the
    router reads final states, those of held-out text are computed once."""
    model, final = run.model, run.model.tap == "final"
    held_out, tests = shapes_of(run.domains.values()), shapes_of(run.tests.values())
    count, flops, ranks = 1, losses(run, held_out, None), 0
    for found in skills:
        ranks += run.rank(found.skill)[0] * found.creates
        times = _times(run, found)
        count, flops = count + times, flops + times * losses(run, held_out, ranks)
    flops += 2 * losses(run, tests, ranks) + losses(run, tests, None)
    made = [Work("evaluations", count + 3, "of all domains", "evaluation", flops)]
    if final:
        read = [(shape.rows, shape.length) for shape in (*held_out, *tests)]
        passes = sum(reading_flops(model, *shape) for shape in read)
        made.append(Work("evaluations", sum(rows for rows, _ in read), "held-out rows, read once", "reading", passes))
    return made


def losses(run: Run, shapes: Sequence[Shape], ranks: int | None) -> int:
    """FLOPs of the losses of some batches; ranks: of the pool, None for the base alone, whose final states may be known."""
    known = run.model.tap == "final"
    if known and ranks is None:
        return sum(head_flops(run.model, shape.targets) for shape in shapes)
    return sum(evaluation_flops(run.model, *shape, known, ranks or 0) for shape in shapes)


def _times(run: Run, found: Learned) -> int:
    """How often all domains are evaluated for a skill: while it is learned, once more if its last state is not its best,
    and before a refinement, to judge it by."""
    if found.plan is None:
        return 1
    within = -(-found.steps // run.config.training.eval_every)
    return within + (within > 1) + (not found.creates)


def _steps(run: Run, skills: Sequence[Learned]) -> Work:
    """The steps of all skills."""
    flops, pool = 0, []
    for found in skills:
        pool += [run.rank(found.skill)[0]] * found.creates
        if found.plan is not None:
            flops += _of_steps(run, found, found.plan, used_ranks(run, pool, found.arrival.expert))
    return Work("steps", sum(found.steps for found in skills), "steps", "step", flops)


def _of_steps(run: Run, found: Learned, plan: Stream, ranks: int) -> int:
    """FLOPs of a skill's steps, with a full micro-batch of replayed text in each if any is replayed."""
    training, known = run.config.training, kept(run, found.skill)
    shapes = [shape for number in range(found.steps) for shape in plan.shapes(number)]
    if training.replay or training.distillation:
        size = (training.batch_rows, run.config.data.row_length)
        shapes += [Shape(*size, size[0] * size[1])] * found.steps
    return sum(step_flops(run.model, *shape, known, ranks) for shape in shapes)


def kept(run: Run, skill: Skill) -> bool:
    """Whether the features of a skill are kept for its steps."""
    return run.model.tap == "final" and study.read(skill, run.config, run.base.args.hidden_size)[1]


def used_ranks(run: Run, pool: Sequence[int], expert: int) -> int:
    """Ranks that a token of a step is multiplied with, of experts of these ranks: all, or where frozen ones are looked up,
    those of the one that learns and of the few that a token may choose."""
    frozen = [rank for column, rank in enumerate(pool, 1) if column != expert]
    top_k = run.config.growth.final_top_k
    looked_up = run.model.composition == "layers" and crossover.pays(len(frozen), top_k, run.model.lookup_ratio)
    return pool[expert - 1] + (max(frozen) * top_k if looked_up else sum(frozen))


def _fits(run: Run, skills: Sequence[Learned]) -> Work:
    """The router fitted to what is remembered, whenever an expert is added."""
    remembered = [remembered_of(run, skill) for skill in everything(run)]
    before, fits, flops = len(remembered) - len(skills), 0, 0
    for number, found in enumerate(skills, 1):
        if found.creates:
            fits += 1
            each = fit_flops(run, sum(remembered[: before + number]), fits + 1)
            flops += run.config.training.router_fit_steps * each
    return Work("router", fits, "fits", "router", flops)


def remembered_of(run: Run, skill: Skill) -> int:
    """Features of a skill that are kept."""
    return min(run.config.training.memory_tokens, skill.train.tokens)


def fit_flops(run: Run, tokens: int, columns: int) -> int:
    """Of one step of a router's fit: logits, and the gradient of the rows."""
    return 4 * tokens * run.base.args.hidden_size * columns
