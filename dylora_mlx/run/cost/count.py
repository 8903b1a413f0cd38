"""Count the work of a run (rows, evaluations, steps, router fits, and their FLOPs) from its packed rows, before it starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from dylora_mlx.config import Config
from dylora_mlx.data import packing, stream
from dylora_mlx.data.stream import BatchPlan, BatchShape, Skill
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.experts import autotune
from dylora_mlx.training.metrics.flops import base_pass_flops, evaluation_flops, head_flops, step_flops
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.skill import fit_router, learn, refine, router_tokens, split_skill, turns
from dylora_mlx.training.skill.base_pass import segments_to_read
from dylora_mlx.training.skill.evaluations import evaluation_steps
from dylora_mlx.training.skill.turns import Exemplars
from dylora_mlx.training.step.domains import Domain

Rate = Literal["reading", "evaluation", "step", "router"]
"""Kinds of work that the calibration times separately, in FLOPs a second."""


class AssumedArrival(NamedTuple):
    """The decision on a skill that an estimate assumes."""

    action: str
    """An action of the policy: create, reuse or refine."""
    expert: int
    """expert_id of the expert that serves the skill, 0 for the base."""


class PlannedSkill(NamedTuple):
    """A skill with the batches and the number of steps that are planned for it."""

    skill: Skill
    """For a refinement, it includes the replayed documents of the expert's earlier skills."""
    arrival: AssumedArrival
    plan: BatchPlan | None
    """None if the skill is not trained."""
    steps: int
    """0 if the skill is not trained."""

    @property
    def creates(self) -> bool:
        """Whether the skill gets a new expert."""
        return self.arrival.action == "create"


class CountedWork(NamedTuple):
    """One kind of work of a whole run."""

    phase: str
    """Name of the run's timer that measures it."""
    amount: int
    """Number of units."""
    what: str
    """Unit of `amount`, such as rows or steps."""
    rate: Rate
    """Kind of work whose calibrated rate applies."""
    flops: int
    """FLOPs of the matrix products; a multiply-add counts as two."""


def assume_all_new(config: Config, skills: list[Skill]) -> list[AssumedArrival]:
    """Assume that every skill gets an expert, up to growth.max_experts. Later skills reuse the first expert."""
    most = config.growth.max_experts
    return [AssumedArrival("create", n) if n <= most else AssumedArrival("reuse", 1) for n in range(1, len(skills) + 1)]


def assume_one_expert(config: Config, skills: list[Skill]) -> list[AssumedArrival]:
    """Assume that the first skill gets an expert, and that every later skill is known to it."""
    known = AssumedArrival(config.growth.when_known, 1)
    return [AssumedArrival("create", 1), *[known] * (len(skills) - 1)]


def plan_skills(run: TrainingRun, arrivals: Sequence[AssumedArrival]) -> list[PlannedSkill]:
    """Plan the batches of every skill, and its maximum number of steps: early stopping may end it sooner."""
    planned = []
    for index, (skill, arrival) in enumerate(zip(run.skills, arrivals, strict=True)):
        if arrival.action == "refine":
            before = zip(run.skills[:index], arrivals[:index], strict=True)
            skill = refine.mix_replay(
                run.config, skill, [s for s, other in before if other.expert == arrival.expert], index
            )
        plan = learn.plan_batches(run, skill, index) if arrival.action in ("create", "refine") else None
        planned.append(PlannedSkill(skill, arrival, plan, 0 if plan is None else learn.count_steps(run.config, plan)))
    return planned


def count_work(run: TrainingRun, skills: Sequence[PlannedSkill]) -> list[CountedWork]:
    """Count the long-running work of a run: base passes, evaluations, steps and router fits."""
    return [
        _base_pass_work(run, skills),
        *_evaluation_work(run, skills),
        _step_work(run, skills),
        _router_fit_work(run, skills),
    ]


def all_skills(skills: list[Skill], base_skill: Skill | None) -> list[Skill]:
    """Return the base skill, if there is one, and the skills of the stream."""
    return [*([base_skill] if base_skill else []), *skills]


def _base_pass_work(run: TrainingRun, skills: Sequence[PlannedSkill]) -> CountedWork:
    """Count the base passes: over each skill, over the mixed data of a refinement, and over the texts with turns that the
    router is fitted to whenever an expert is added."""
    refined = [planned.skill for planned in skills if planned.arrival.action == "refine"]
    shapes = [
        shape
        for skill in (*all_skills(run.skills, run.base_skill), *refined)
        for shape in _base_pass_extents(run.config, run.base, skill)
    ]
    shapes += _turn_extents(run, skills)
    flops = sum(base_pass_flops(run.model, *shape) for shape in shapes)
    return CountedWork("reading", sum(rows for rows, _ in shapes), "rows", "reading", flops)


def _base_pass_extents(config: Config, base: Base, skill: Skill) -> list[tuple[int, int]]:
    """Return (rows, positions) of the batches of a skill's base pass."""
    segments, _ = segments_to_read(skill, config, base.args.hidden_size)
    length = config.data.max_seq_length
    batches = stream.evaluation_rows(segments, length, config.training.batch_size)
    return [packing.batch_extent(segments, batch, length, None) for batch in batches]


def _turn_extents(run: TrainingRun, skills: Sequence[PlannedSkill]) -> list[tuple[int, int]]:
    """Return (rows, positions) of the batches of spliced texts that the fits of the router read."""
    config, length, extents = run.config, run.config.data.max_seq_length, []
    if not config.training.router_fit_steps:
        return []
    known = [Exemplars(split_skill.skill_exemplars(config, run.base_skill), 0)] if run.base_skill else []
    for planned in skills:
        known.append(Exemplars(split_skill.skill_exemplars(config, planned.skill), planned.arrival.expert))
        if planned.creates:
            segments = turns.spliced_segments(known, config)
            batches = stream.evaluation_rows(segments, length, config.training.batch_size)
            extents += [packing.batch_extent(segments, batch, length, None) for batch in batches]
    return extents


def batch_shapes(domains: Iterable[Domain]) -> list[BatchShape]:
    """Return the shapes of all batches of some domains."""
    return [
        BatchShape(
            len(batch.inputs),
            batch.inputs.shape[1],
            max(1, int(batch.loss_mask.sum())) if domain.max_targets is None else domain.max_targets,
        )
        for domain in domains
        for batch in domain.batches
    ]


def evaluated_together(run: TrainingRun) -> list[Domain]:
    """Return domains that are as much as one evaluation after a skill takes: all, or the first within `eval.total_tokens`.

    Which domains are selected then is not known yet. Their number is what costs.
    """
    budget, chosen, size = run.config.eval.total_tokens, list[Domain](), 0
    for domain in run.domains.values():
        size += domain.positions
        if budget is not None and chosen and size > budget:
            break
        chosen.append(domain)
    return chosen


def _evaluation_work(run: TrainingRun, skills: Sequence[PlannedSkill]) -> list[CountedWork]:
    """Count the evaluations, in rows of held-out text.

    The base alone, the watched domains while a skill is learned and every domain after it, or as many as `eval.total_tokens`
    allows, then the end of the run. If the router reads the final layer's states, the base's states of held-out text are
    computed once and cached, or for each skill anew if not all domains are evaluated.
    """
    model, domains, together = run.model, run.domains.values(), evaluated_together(run)
    work: list[tuple[list[BatchShape], int | None]] = [(batch_shapes(domains), None)]
    ranks = 0
    for planned in skills:
        ranks += run.expert_rank(planned.skill)[0] * planned.creates
        if planned.plan is None:
            continue  # the pool stays as it was, and so do its losses
        watched = {planned.skill.name, learn.watched_domain(run.config, planned.skill)}
        during = len(evaluation_steps(run.config, planned.steps))
        if planned.creates and run.config.growth.acceptance == "measured":
            work.append((batch_shapes(run.domains[name] for name in watched), ranks))  # without the expert, to judge it
        # The start is evaluated too. After the skill an earlier state may have been the best, so all count again.
        work += [(batch_shapes(run.domains[name] for name in watched), ranks)] * (1 + during)
        work.append((batch_shapes(together), ranks))
    own_tests = [run.tests[planned.skill.name] for planned in skills if planned.arrival.expert]
    full = [domain for name, domain in run.final_domains.items() if domain is not run.domains[name]]
    at_end = [batch_shapes(run.tests.values()), batch_shapes(full)]
    work += [
        *((shapes, ranks) for shapes in (*at_end, batch_shapes(own_tests))),
        *((shapes, None) for shapes in at_end),
    ]
    rows = sum(shape.rows for shapes, _ in work for shape in shapes)
    flops = sum(loss_flops(model, *each) for each in work)
    counted = [CountedWork("evaluations", rows, "held-out rows", "evaluation", flops)]
    if model.router_layer == "final":
        again = together * len(skills) if len(together) < len(domains) else []
        extents = [(s.rows, s.length) for s in batch_shapes([*domains, *again, *run.tests.values(), *full])]
        base_flops = sum(base_pass_flops(model, *extent) for extent in extents)
        what = "held-out rows, read once"
        counted.append(CountedWork("evaluations", sum(rows for rows, _ in extents), what, "reading", base_flops))
    return counted


def loss_flops(model: RoutedDecoder, shapes: Sequence[BatchShape], ranks: int | None) -> int:
    """Return the FLOPs of evaluating the losses of some batches.

    Args:
        model: the decoder.
        shapes: shapes of the batches.
        ranks: sum of the pool's LoRA ranks. None for the base alone, which costs the head only if its states are cached.
    """
    states_cached = model.router_layer == "final"
    if states_cached and ranks is None:
        return sum(head_flops(model, shape.targets) for shape in shapes)
    return sum(evaluation_flops(model, *shape, states_cached, ranks or 0) for shape in shapes)


def _step_work(run: TrainingRun, skills: Sequence[PlannedSkill]) -> CountedWork:
    """Count the training steps of all skills."""
    flops, ranks = 0, []
    for planned in skills:
        ranks += [run.expert_rank(planned.skill)[0]] * planned.creates
        if planned.plan is not None:
            flops += _skill_step_flops(
                run.config,
                run.base,
                run.model,
                planned,
                planned.plan,
                used_ranks(run.config, run.model, ranks, planned.arrival.expert),
            )
    return CountedWork("steps", sum(planned.steps for planned in skills), "steps", "step", flops)


def _skill_step_flops(
    config: Config, base: Base, model: RoutedDecoder, planned: PlannedSkill, plan: BatchPlan, ranks: int
) -> int:
    """Return the FLOPs of a skill's steps. With replay or distillation, each step has one more full micro-batch."""
    training, cached = config.training, features_cached(config, base, model, planned.skill)
    shapes = [shape for number in range(planned.steps) for shape in plan.shapes(number)]
    if training.replay_coef or training.distillation_coef:
        size = (training.batch_size, config.data.max_seq_length)
        shapes += [BatchShape(*size, size[0] * size[1])] * planned.steps
    return sum(step_flops(model, *shape, cached, ranks) for shape in shapes)


def features_cached(config: Config, base: Base, model: RoutedDecoder, skill: Skill) -> bool:
    """Return whether training reads the base's states of a skill from the feature cache."""
    return model.router_layer == "final" and segments_to_read(skill, config, base.args.hidden_size)[1]


def used_ranks(config: Config, model: RoutedDecoder, pool: Sequence[int], expert: int) -> int:
    """Return the sum of LoRA ranks that a token is multiplied with in a step.

    With a dense matmul these are the ranks of all experts. With gather they are those of the trained expert and, at most, of
    top_k frozen ones.

    Args:
        config: the run's options.
        model: the decoder, for its mixing and gather threshold.
        pool: LoRA ranks of the experts, by expert_id from 1.
        expert: expert_id of the trained expert.
    """
    frozen = [rank for expert_id, rank in enumerate(pool, 1) if expert_id != expert]
    top_k = config.growth.top_k
    gathers = model.mixing == "layers" and autotune.use_gather(len(frozen), top_k, model.gather_threshold)
    return pool[expert - 1] + (max(frozen) * top_k if gathers else sum(frozen))


def _router_fit_work(run: TrainingRun, skills: Sequence[PlannedSkill]) -> CountedWork:
    """Count the fits of the router to the remembered features, one whenever an expert is added."""
    remembered = [remembered_tokens(run.config, skill) for skill in all_skills(run.skills, run.base_skill)]
    num_base_skills, fits, flops = len(remembered) - len(skills), 0, 0
    for number, planned in enumerate(skills, 1):
        if planned.creates:
            fits += 1
            step_flops = fit_flops(run.base, sum(remembered[: num_base_skills + number]), fits + 1)
            flops += round(run.config.training.router_fit_steps * step_flops)
    return CountedWork("router", fits, "fits", "router", flops)


def remembered_tokens(config: Config, skill: Skill) -> int:
    """Return how many features (tokens) of a skill the library remembers."""
    return min(config.training.memory_tokens, skill.train.num_tokens)


def fit_flops(base: Base, tokens: int, expert_ids: int) -> float:
    """Return the FLOPs of one step of a router's fit: the logits and the gradient of the rows, for each trial and the end."""
    rows, trials = min(tokens, router_tokens.MAX_ROWS), len(fit_router.PENALTIES) * (1 - 1 / router_tokens.HELD_OUT)
    return 4 * rows * base.args.hidden_size * min(expert_ids, fit_router.MAX_CORRECTED) * (trials + 1)
