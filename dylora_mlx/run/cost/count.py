"""What a run computes, counted from its rows before any of it is done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from dylora_mlx.config import Config
from dylora_mlx.data import packing, stream
from dylora_mlx.data.stream import BatchPlan, BatchShape, Skill
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.experts import autotune
from dylora_mlx.training.metrics.flops import evaluation_flops, head_flops, reading_flops, step_flops
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.skill import learn, refine
from dylora_mlx.training.skill.base_pass import segments_to_read
from dylora_mlx.training.step.evaluate import Domain

Rate = Literal["reading", "evaluation", "step", "router"]
"""Kinds of work that a calibration times, each by itself: so many operations a second."""


class AssumedArrival(NamedTuple):
    """What becomes of a skill of the stream: an action of the policy, and the expert that serves it, 0 for the base."""

    action: str
    expert: int


class PlannedSkill(NamedTuple):
    """A skill as it is trained on, which for a refinement is mixed with what the expert holds, its arrival, and its
    steps, None if it is not trained."""

    skill: Skill
    arrival: AssumedArrival
    plan: BatchPlan | None
    steps: int

    @property
    def creates(self) -> bool:
        return self.arrival.action == "create"


class CountedWork(NamedTuple):
    """One kind of work of a whole run. phase: as the run's clock calls it; count: of what; flops: of matrix products, a
    multiply-add as two."""

    phase: str
    amount: int
    what: str
    rate: Rate
    flops: int


def assume_all_new(config: Config, skills: list[Skill]) -> list[AssumedArrival]:
    """Every skill gets an expert, as many as the pool may hold; those that come later are served by the first."""
    most = config.growth.max_experts
    return [AssumedArrival("create", n) if n <= most else AssumedArrival("reuse", 1) for n in range(1, len(skills) + 1)]


def assume_one_expert(config: Config, skills: list[Skill]) -> list[AssumedArrival]:
    """The first skill gets an expert, and every later one is known to it."""
    known = AssumedArrival(config.growth.when_known, 1)
    return [AssumedArrival("create", 1), *[known] * (len(skills) - 1)]


def plan_skills(run: TrainingRun, arrivals: Sequence[AssumedArrival]) -> list[PlannedSkill]:
    """The steps of every skill, at most."""
    found = []
    for number, (skill, arrival) in enumerate(zip(run.skills, arrivals, strict=True)):
        if arrival.action == "refine":
            before = zip(run.skills[:number], arrivals[:number], strict=True)
            skill = refine.mix_replay(
                run.config, skill, [s for s, other in before if other.expert == arrival.expert], number
            )
        plan = learn.plan_batches(run, skill, number) if arrival.action in ("create", "refine") else None
        found.append(PlannedSkill(skill, arrival, plan, 0 if plan is None else learn.count_steps(run.config, plan)))
    return found


def count_work(run: TrainingRun, skills: Sequence[PlannedSkill]) -> list[CountedWork]:
    """All that takes long in a run."""
    return [_reading(run, skills), *_evaluations(run, skills), _steps(run, skills), _fits(run, skills)]


def all_skills(skills: list[Skill], base_skill: Skill | None) -> list[Skill]:
    """The skills of the stream, and before them what the base knows."""
    return [*([base_skill] if base_skill else []), *skills]


def _reading(run: TrainingRun, skills: Sequence[PlannedSkill]) -> CountedWork:
    """The base over the documents of each skill, and again over what a refinement mixes."""
    again = [found.skill for found in skills if found.arrival.action == "refine"]
    shapes = [
        shape
        for skill in (*all_skills(run.skills, run.base_skill), *again)
        for shape in _read(run.config, run.base, skill)
    ]
    flops = sum(reading_flops(run.model, *shape) for shape in shapes)
    return CountedWork("reading", sum(rows for rows, _ in shapes), "rows", "reading", flops)


def _read(config: Config, base: Base, skill: Skill) -> list[tuple[int, int]]:
    """Rows and positions of the batches in which the base reads a skill."""
    pieces, _ = segments_to_read(skill, config, base.args.hidden_size)
    length = config.data.max_seq_length
    parts = stream.evaluation_rows(pieces, length, config.training.batch_size)
    return [packing.batch_extent(pieces, part, length, None) for part in parts]


def shapes_of(domains: Iterable[Domain]) -> list[BatchShape]:
    """Of all batches of some domains."""
    return [
        BatchShape(
            len(batch.inputs),
            batch.inputs.shape[1],
            max(1, int(batch.loss_mask.sum())) if domain.max_targets is None else domain.max_targets,
        )
        for domain in domains
        for batch in domain.batches
    ]


def _evaluations(run: TrainingRun, skills: Sequence[PlannedSkill]) -> list[CountedWork]:
    """All domains: the base by itself, the mixture for every skill, and three ways at the end on test text. Where the
    router reads final states, those of held-out text are computed once."""
    model, final = run.model, run.model.router_layer == "final"
    held_out, tests = shapes_of(run.domains.values()), shapes_of(run.tests.values())
    count, flops, ranks = 1, losses(run.model, held_out, None), 0
    for found in skills:
        ranks += run.expert_rank(found.skill)[0] * found.creates
        times = _times(run.config, found)
        count, flops = count + times, flops + times * losses(run.model, held_out, ranks)
    flops += 2 * losses(run.model, tests, ranks) + losses(run.model, tests, None)
    made = [CountedWork("evaluations", count + 3, "of all domains", "evaluation", flops)]
    if final:
        read = [(shape.rows, shape.length) for shape in (*held_out, *tests)]
        passes = sum(reading_flops(model, *shape) for shape in read)
        made.append(
            CountedWork("evaluations", sum(rows for rows, _ in read), "held-out rows, read once", "reading", passes)
        )
    return made


def losses(model: RoutedDecoder, shapes: Sequence[BatchShape], ranks: int | None) -> int:
    """FLOPs of the losses of some batches; ranks: of the pool, None for the base alone, whose final states may be known."""
    known = model.router_layer == "final"
    if known and ranks is None:
        return sum(head_flops(model, shape.targets) for shape in shapes)
    return sum(evaluation_flops(model, *shape, known, ranks or 0) for shape in shapes)


def _times(config: Config, found: PlannedSkill) -> int:
    """How often all domains are evaluated for a skill: while it is learned, once more if its last state is not its best,
    and before a refinement, to judge it by."""
    if found.plan is None:
        return 1
    within = -(-found.steps // config.training.steps_per_eval)
    return within + (within > 1) + (not found.creates)


def _steps(run: TrainingRun, skills: Sequence[PlannedSkill]) -> CountedWork:
    """The steps of all skills."""
    flops, pool = 0, []
    for found in skills:
        pool += [run.expert_rank(found.skill)[0]] * found.creates
        if found.plan is not None:
            flops += _of_steps(
                run.config,
                run.base,
                run.model,
                found,
                found.plan,
                used_ranks(run.config, run.model, pool, found.arrival.expert),
            )
    return CountedWork("steps", sum(found.steps for found in skills), "steps", "step", flops)


def _of_steps(
    config: Config, base: Base, model: RoutedDecoder, found: PlannedSkill, plan: BatchPlan, ranks: int
) -> int:
    """FLOPs of a skill's steps, with a full micro-batch of replayed text in each if any is replayed."""
    training, known = config.training, kept(config, base, model, found.skill)
    shapes = [shape for number in range(found.steps) for shape in plan.shapes(number)]
    if training.replay_coef or training.distillation_coef:
        size = (training.batch_size, config.data.max_seq_length)
        shapes += [BatchShape(*size, size[0] * size[1])] * found.steps
    return sum(step_flops(model, *shape, known, ranks) for shape in shapes)


def kept(config: Config, base: Base, model: RoutedDecoder, skill: Skill) -> bool:
    """Whether the features of a skill are kept for its steps."""
    return model.router_layer == "final" and segments_to_read(skill, config, base.args.hidden_size)[1]


def used_ranks(config: Config, model: RoutedDecoder, pool: Sequence[int], expert: int) -> int:
    """Ranks that a token of a step is multiplied with, of experts of these ranks: all, or where frozen ones are looked up,
    those of the one that learns and of the few that a token may choose."""
    frozen = [rank for expert_id, rank in enumerate(pool, 1) if expert_id != expert]
    top_k = config.growth.top_k
    looked_up = model.mixing == "layers" and autotune.use_gather(len(frozen), top_k, model.gather_threshold)
    return pool[expert - 1] + (max(frozen) * top_k if looked_up else sum(frozen))


def _fits(run: TrainingRun, skills: Sequence[PlannedSkill]) -> CountedWork:
    """The router fitted to what is remembered, whenever an expert is added."""
    remembered = [remembered_of(run.config, skill) for skill in all_skills(run.skills, run.base_skill)]
    before, fits, flops = len(remembered) - len(skills), 0, 0
    for number, found in enumerate(skills, 1):
        if found.creates:
            fits += 1
            each = fit_flops(run.base, sum(remembered[: before + number]), fits + 1)
            flops += run.config.training.router_fit_steps * each
    return CountedWork("router", fits, "fits", "router", flops)


def remembered_of(config: Config, skill: Skill) -> int:
    """Features of a skill that are kept."""
    return min(config.training.memory_tokens, skill.train.num_tokens)


def fit_flops(base: Base, tokens: int, expert_ids: int) -> int:
    """Of one step of a router's fit: logits, and the gradient of the rows."""
    return 4 * tokens * base.args.hidden_size * expert_ids
