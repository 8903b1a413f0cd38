"""How fast this device is at what a run does: a few real passes over the run's own rows, some ten seconds of them.

Where a pass over a full row would take too long, a shorter one is timed; a count of operations carries it over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle, repeat
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx.config import Config
from dylora_mlx.data.packing import Batch
from dylora_mlx.data.stream import BatchShape, Skill
from dylora_mlx.growth import phases
from dylora_mlx.growth.gate_init import StatisticsAccumulator
from dylora_mlx.growth.pool import ExpertRecord, Pool
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.run.build import make_decoder
from dylora_mlx.run.cost import count
from dylora_mlx.run.cost.count import PlannedSkill, Rate
from dylora_mlx.system import blas, console
from dylora_mlx.training.metrics.flops import reading_flops, step_flops
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.skill import fit_router
from dylora_mlx.training.skill.base_pass import iterate_states
from dylora_mlx.training.step.evaluate import Domain, Evaluator, evaluate
from dylora_mlx.training.step.losses import MicroBatch, RehearsalBatch, device_batch
from dylora_mlx.training.step.optimizers import make_optimizers
from dylora_mlx.training.step.step import Step

SECONDS, LONGEST = 10.0, 3.0
"""What all of the timing takes, about, and one pass at most."""
ROUNDS = 2
"""How often each kind of work is timed, at least."""
SHORTEST, LONGER = 64, 4
"""Positions of the first pass, and how many times as many each next one has, up to those of a whole micro-batch."""
BATCHES, MEMORIES, FITTED = 4, 4, 25
"""Of a domain, skills and steps of a router's fit: as many are timed at once, at most."""

Size = tuple[int, int]
"""Rows and positions of a micro-batch."""


class TimedPass(NamedTuple):
    """A piece of work that is timed, and its FLOPs."""

    run: Callable[[], object]
    flops: int


class PassTime(NamedTuple):
    """What a pass took: seconds, its FLOPs, and the bytes that it needed beyond what was held before."""

    seconds: float
    flops: int
    peak: int


class CalibrationSample(NamedTuple):
    """What was timed. rate: FLOPs a second; first: seconds that tracing took, where passes are compiled; size: of the
    micro-batches; peak: the most bytes that a pass needed, which differ: lanes meet their largest moments together or not."""

    rate: float
    first: float
    size: Size
    peak: int


class SizedPasses(NamedTuple):
    """Passes of the size that is timed, and the first ones of them, of which the very first may trace."""

    passes: Iterator[TimedPass]
    size: Size
    first: list[PassTime]


def calibrate(run: TrainingRun, skills: Sequence[PlannedSkill]) -> dict[Rate, CalibrationSample]:
    """Time every kind of work as it is in the middle of the stream, with half of the experts. Nothing of the run changes.

    The kinds take turns and of each the median counts: what else the machine does meanwhile then hits none alone.
    """
    deadline = time.perf_counter() + SECONDS
    pool = _pool(run, skills)
    kinds: dict[Rate, Callable[[Size], Iterator[TimedPass]]] = {
        "reading": partial(_readings, run, pool),
        "evaluation": partial(_evaluations, run, pool),
        "step": partial(_steps, run, pool, skills),
    }
    sized: dict[Rate, SizedPasses] = {
        kind: _sized(run.config, passes)
        for kind, passes in console.track(kinds.items(), "timing this device", len(kinds))
    }
    sized["router"] = SizedPasses(_fits(run.config, run.base, run.skills, pool), (1, 1), [])
    timed: dict[Rate, list[PassTime]] = {kind: [] for kind in sized}
    while time.perf_counter() < deadline or len(timed["router"]) < ROUNDS:
        for kind, found in sized.items():
            timed[kind].append(_timed(next(found.passes)))
    mx.reset_peak_memory()
    return {kind: _sample(run.compiled, sized[kind], timed[kind]) for kind in sized}


def _sample(compiled: bool, found: SizedPasses, timed: Sequence[PassTime]) -> CalibrationSample:
    rate = float(np.median([each.flops / each.seconds for each in timed]))
    usual = float(np.median([each.seconds for each in timed]))
    traced = max(0.0, found.first[0].seconds - usual) if compiled and found.first else 0.0
    return CalibrationSample(rate, traced, found.size, max(each.peak for each in (*found.first, *timed)))


def _pool(run: TrainingRun, skills: Sequence[PlannedSkill]) -> Pool:
    """Half of the experts that there will be, the last one learning."""
    created = [found.skill for found in skills if found.creates]
    pool = Pool(make_decoder(run.config, run.base))
    for number, skill in enumerate(created[: (len(created) + 1) // 2]):
        rank, alpha = run.expert_rank(skill)
        pool.add(ExpertRecord(skill.name, rank, alpha, 0), mx.random.key(number))
    for expert_id in range(1, len(pool)):
        pool.freeze(expert_id)
    return pool


def _sized(config: Config, kind: Callable[[Size], Iterator[TimedPass]]) -> SizedPasses:
    """Passes over rows that are as long as time allows, which has grown from short ones."""
    sizes = _sizes(config)
    for size, following in zip(sizes, [*sizes[1:], None], strict=True):
        passes = kind(size)
        first = [_timed(next(passes)), _timed(next(passes))]
        if following is None or first[-1].seconds * np.prod(following) / np.prod(size) > LONGEST:
            return SizedPasses(passes, size, first)
    raise AssertionError("the last size ends the loop")


def _sizes(config: Config) -> list[Size]:
    """From a short row to the micro-batch of the config."""
    rows, length = config.training.batch_size, config.data.max_seq_length
    found, tokens = [], SHORTEST
    while tokens < rows * length:
        found.append((max(1, tokens // length), min(tokens, length)))
        tokens *= LONGER
    return [*found, (rows, length)]


def _timed(work: TimedPass) -> PassTime:
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    began = time.perf_counter()
    work.run()
    return PassTime(time.perf_counter() - began, work.flops, mx.get_peak_memory() - held)


def _cut(batch: Batch, size: Size) -> Batch:
    """The beginning of a batch."""
    rows, length = size
    inputs, targets, segments, learn = (array[:rows, :length] for array in batch[:4])
    return Batch(inputs, targets, segments, learn, ())


def _domains(base: Base, model: RoutedDecoder, domains: dict[str, Domain], size: Size) -> Iterator[Domain]:
    """Some rows of held-out text of one domain after the other, without end, the states that the router reads being known."""
    dims = base.args.hidden_size
    for domain in cycle(domains.values()):
        batches = [_cut(batch, size) for batch in domain.batches[:BATCHES]]
        room = None if domain.max_targets is None else min(domain.max_targets, int(np.prod(size)))
        states = [mx.zeros((*batch.inputs.shape, dims), mx.float16) for batch in batches]
        mx.eval(states)
        yield Domain(domain.name, batches, room, states if model.router_layer == "final" else [])


def _readings(run: TrainingRun, pool: Pool, size: Size) -> Iterator[TimedPass]:
    """Passes of the base, as novelty and the router's statistics take them."""
    sums = StatisticsAccumulator(run.base.args.hidden_size)

    def read(batches: list[Batch]) -> None:
        for found in iterate_states(pool.model, batches):
            sums.add(found.features)

    for domain in _domains(run.base, run.model, run.domains, size):
        batches = domain.batches[: blas.NUM_STREAMS]
        flops = sum(reading_flops(run.model, len(b.inputs), b.inputs.shape[1]) for b in batches)
        yield TimedPass(partial(read, batches), flops)


def _evaluations(run: TrainingRun, pool: Pool, size: Size) -> Iterator[TimedPass]:
    """Losses of held-out text under the mixture."""
    routing, measure = phases.final_schedule(run.config.growth).routing, Evaluator(pool.model, run.compiled)
    adapters = pool.model.adapters(routing.top_k)
    mx.eval(adapters)
    ranks = sum(record.rank for record in pool.records)
    for domain in _domains(run.base, run.model, run.domains, size):
        flops = count.losses(run.model, count.shapes_of([domain]), ranks)
        yield TimedPass(partial(evaluate, pool.model, domain, routing, None, adapters, measure), flops)


def _steps(run: TrainingRun, pool: Pool, skills: Sequence[PlannedSkill], size: Size) -> Iterator[TimedPass]:
    """Steps of one skill after the other, of as many micro-batches as are computed side by side."""
    settled, training = phases.final_schedule(run.config.growth), run.config.training
    optimizers = make_optimizers(training)
    optimizers.init(pool.model)
    optimizers.set_learning_rates(0.0, training)
    step = Step(pool.model, optimizers, training, settled.top_k, len(pool), run.compiled, run.config.growth.min_gate)
    tokens, dims = training.rehearsal_tokens, run.base.args.hidden_size
    memory = RehearsalBatch(mx.zeros((tokens, dims)), mx.zeros(tokens, mx.int32), mx.zeros(tokens))
    mx.eval(step.state, memory)

    def taken(batches: list[MicroBatch]) -> None:
        mx.eval(step.state, step(batches, memory, mx.array(settled.temperature)))

    trained = [
        (found.plan, found.steps, count.kept(run.config, run.base, run.model, found.skill))
        for found in skills
        if found.plan is not None
    ]
    for number, (plan, steps, known) in enumerate(cycle(trained)):
        batches = [_cut(batch, size) for batch in plan.step(number % steps)[: blas.NUM_STREAMS]]
        room = None if plan.max_targets is None else min(plan.max_targets, int(np.prod(size)))
        states = [np.zeros((*batch.inputs.shape, dims), np.float16) if known else None for batch in batches]
        moved = [device_batch(b, run.model.window, s, room) for b, s in zip(batches, states, strict=True)]
        shapes = [BatchShape(len(batch.inputs), batch.inputs.shape[1], batch.target_positions.size) for batch in moved]
        flops = sum(step_flops(run.model, *shape, known, step.active_ranks) for shape in shapes)
        yield TimedPass(partial(taken, moved), flops)


def _fits(config: Config, base: Base, skills: list[Skill], pool: Pool) -> Iterator[TimedPass]:
    """Some steps of a router's fit."""
    rng, dims = np.random.default_rng(0), base.args.hidden_size
    tokens = [count.remembered_of(config, skill) for skill in skills[:MEMORIES]]
    expert_ids = len(pool) + 1
    memories = [(rng.standard_normal((each, dims), np.float32), n % expert_ids) for n, each in enumerate(tokens)]
    fit = partial(fit_router.fit, pool.model.router, memories, FITTED, config.training.memory_tokens)
    return repeat(TimedPass(fit, FITTED * count.fit_flops(base, sum(tokens), expert_ids)))
