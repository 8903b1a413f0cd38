"""Calibrate this device's throughput in FLOPs a second, by timing real passes over the run's own rows for about ten seconds.

If a pass over a full micro-batch would take too long, a smaller one is timed. Its FLOPs are counted, so that the rate applies
to a full micro-batch. Its memory is then that of a step on one whole row, times the rows.
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
from dylora_mlx.growth.feature_statistics import FeatureStatistics, StatisticsAccumulator
from dylora_mlx.growth.pool import ExpertRecord, Pool
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.kernels import chunked_loss, numerics
from dylora_mlx.run.build import make_decoder
from dylora_mlx.run.cost import count
from dylora_mlx.run.cost.count import PlannedSkill, Rate
from dylora_mlx.system import blas, console
from dylora_mlx.training.metrics.flops import base_pass_flops, step_flops
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.skill import fit_router
from dylora_mlx.training.skill.base_pass import iterate_states
from dylora_mlx.training.skill.router_tokens import SkillFeatures
from dylora_mlx.training.step.domains import Domain
from dylora_mlx.training.step.evaluate import Evaluator, evaluate
from dylora_mlx.training.step.losses import MicroBatch, RehearsalBatch, device_batch
from dylora_mlx.training.step.optimizers import make_optimizers
from dylora_mlx.training.step.step import Step

SECONDS, LONGEST = 10.0, 3.0
"""Approximate seconds of the whole calibration, and the maximum expected seconds of one pass."""
ROUNDS = 2
"""Minimum number of timed passes of each kind of work."""
FIRST_TOKENS, GROWTH_FACTOR = 64, 4
"""Tokens of the first pass, and the factor by which each next pass grows, up to a whole micro-batch."""
FEW_TARGETS = 64
"""Targets of the row whose memory is measured: the head takes half of a step's time but little memory."""
HEAD_TILES = 3
"""Tiles of logits of the head that come on top."""
MAX_BATCHES, MAX_MEMORIES, FIT_STEPS = 4, 4, 25
"""Maximum number of batches of a domain, of skills in a router fit, and steps of a router fit, in one timed pass."""

Size = tuple[int, int]
"""Rows and positions (sequence length) of a micro-batch."""


class TimedPass(NamedTuple):
    """A piece of work to time, and its FLOPs."""

    run: Callable[[], object]
    flops: int


class PassTime(NamedTuple):
    """Measurements of one pass."""

    seconds: float
    flops: int
    peak_bytes: int
    """Peak memory beyond what was held before the pass."""


class CalibrationSample(NamedTuple):
    """Calibration of one kind of work."""

    rate: float
    """Median FLOPs a second."""
    trace_seconds: float
    """Extra seconds of the first pass, which traces the compiled functions; 0 if nothing is compiled."""
    size: Size
    """Size of the timed micro-batches."""
    peak_bytes: int
    """Peak memory of as many full micro-batches as are computed concurrently; of other work than steps 0 if only a smaller
    size was timed."""


class SizedPasses(NamedTuple):
    """Passes of one kind of work, at the size that is timed."""

    passes: Iterator[TimedPass]
    size: Size
    first: list[PassTime]
    """The first passes of this size. The very first may include tracing, so these are not part of the median."""


def calibrate(run: TrainingRun, skills: Sequence[PlannedSkill]) -> dict[Rate, CalibrationSample]:
    """Time every kind of work with half of the planned experts, as in the middle of the stream. The run is not changed.

    The kinds are timed in turn and the median of each is taken, so that other load on the machine affects all kinds alike.
    """
    deadline = time.perf_counter() + SECONDS
    pool = _half_pool(run, skills)
    kinds: dict[Rate, Callable[[Size], Iterator[TimedPass]]] = {
        "reading": partial(_base_passes, run, pool),
        "evaluation": partial(_evaluation_passes, run, pool),
        "step": partial(_step_passes, run, pool, skills),
    }
    sized: dict[Rate, SizedPasses] = {
        kind: _grow_size(run.config, passes)
        for kind, passes in console.track(kinds.items(), "timing this device", len(kinds))
    }
    sized["router"] = SizedPasses(_router_fits(run.config, run.base, run.skills, pool), (1, 1), [])
    timed: dict[Rate, list[PassTime]] = {kind: [] for kind in sized}
    while time.perf_counter() < deadline or len(timed["router"]) < ROUNDS:
        for kind, sized_passes in sized.items():
            timed[kind].append(_time_pass(next(sized_passes.passes)))
    samples: dict[Rate, CalibrationSample] = {kind: _summarize(run, sized[kind], timed[kind]) for kind in sized}
    peak = max(samples["step"].peak_bytes, _peak_of_steps(run, pool, skills, samples["step"].size))
    samples["step"] = samples["step"]._replace(peak_bytes=peak)
    # The run reports its own peak memory later, without that of the calibration.
    mx.reset_peak_memory()
    return samples


def _full_size(config: Config) -> Size:
    """Return the size of a micro-batch."""
    return config.training.batch_size, config.data.max_seq_length


def _peak_of_steps(run: TrainingRun, pool: Pool, skills: Sequence[PlannedSkill], size: Size) -> int:
    """Return the peak memory of a step on full micro-batches, from one that is computed alone.

    Micro-batches that are computed concurrently peak together at some step: each holds its activations until its head is
    done, which is most of the time.

    Args:
        run: the run.
        pool: the pool of the calibration.
        skills: the planned skills.
        size: the largest size whose time is bearable. If it is smaller than a micro-batch, one row is measured, without
            most of the head.
    """
    rows, length = _full_size(run.config)
    concurrent = min(blas.NUM_STREAMS, run.config.training.grad_accumulation_steps) if numerics.on_cpu() else 1
    positions, vocabulary = rows * length, run.base.args.vocab_size
    if size == (rows, length):
        return concurrent * _time_pass(next(_step_passes(run, pool, skills, size, positions))).peak_bytes
    row = next(_step_passes(run, pool, skills, (1, length), FEW_TARGETS))
    tile = 4 * positions * min(vocabulary, chunked_loss.tile_size(positions))  # float32
    return concurrent * (rows * _time_pass(row).peak_bytes + HEAD_TILES * tile)


def _summarize(run: TrainingRun, passes: SizedPasses, timed: Sequence[PassTime]) -> CalibrationSample:
    """Return the median rate of one kind of work, its tracing time and its peak memory."""
    rate = float(np.median([measured.flops / measured.seconds for measured in timed]))
    median_seconds = float(np.median([measured.seconds for measured in timed]))
    trace_seconds = max(0.0, passes.first[0].seconds - median_seconds) if run.compiled and passes.first else 0.0
    peak = max(measured.peak_bytes for measured in (*passes.first, *timed))
    return CalibrationSample(rate, trace_seconds, passes.size, peak if passes.size == _full_size(run.config) else 0)


def _half_pool(run: TrainingRun, skills: Sequence[PlannedSkill]) -> Pool:
    """Build a pool with half of the planned experts. All are frozen but the last."""
    created = [planned.skill for planned in skills if planned.creates]
    pool = Pool(make_decoder(run.config, run.base))
    for index, skill in enumerate(created[: (len(created) + 1) // 2]):
        rank, alpha = run.expert_rank(skill)
        pool.add(ExpertRecord(skill.name, rank, alpha, 0), mx.random.key(index))
    for expert_id in range(1, len(pool)):
        pool.freeze(expert_id)
    return pool


def _grow_size(config: Config, kind: Callable[[Size], Iterator[TimedPass]]) -> SizedPasses:
    """Return passes of the largest size that fits the time limit. Sizes grow from short rows: no pass runs far over it."""
    sizes = _sizes(config)
    for size, following in zip(sizes, [*sizes[1:], None], strict=True):
        passes = kind(size)
        first = [_time_pass(next(passes)), _time_pass(next(passes))]
        if following is None or first[-1].seconds * np.prod(following) / np.prod(size) > LONGEST:
            return SizedPasses(passes, size, first)
    raise AssertionError("the last size ends the loop")


def _sizes(config: Config) -> list[Size]:
    """Return growing sizes, from one short row to the config's micro-batch."""
    (rows, length), sizes, tokens = _full_size(config), [], FIRST_TOKENS
    while tokens < rows * length:
        sizes.append((max(1, tokens // length), min(tokens, length)))
        tokens *= GROWTH_FACTOR
    return [*sizes, (rows, length)]


def _time_pass(work: TimedPass) -> PassTime:
    """Run a pass, and measure its time and its peak memory."""
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    began = time.perf_counter()
    work.run()
    return PassTime(time.perf_counter() - began, work.flops, mx.get_peak_memory() - held)


def _crop(batch: Batch, size: Size) -> Batch:
    """Return the first rows and positions of a batch."""
    rows, length = size
    inputs, targets, loss_mask, segment_ids = (array[:rows, :length] for array in batch[:4])
    segments = tuple(row[: ids.max()] for row, ids in zip(batch.rows, segment_ids, strict=False))
    return Batch(inputs, targets, loss_mask, segment_ids, segments)


def _cropped_domains(base: Base, model: RoutedDecoder, domains: dict[str, Domain], size: Size) -> Iterator[Domain]:
    """Yield cropped held-out batches of one domain after the other, endlessly.

    If the router reads final states, zeros stand in for the cached states.
    """
    dims = base.args.hidden_size
    for domain in cycle(domains.values()):
        batches = [_crop(batch, size) for batch in domain.batches[:MAX_BATCHES]]
        max_targets = None if domain.max_targets is None else min(domain.max_targets, int(np.prod(size)))
        states = [mx.zeros((*batch.inputs.shape, dims), mx.float16) for batch in batches]
        mx.eval(states)
        yield Domain(domain.name, batches, max_targets, states if model.router_layer == "final" else [])


def _base_passes(run: TrainingRun, pool: Pool, size: Size) -> Iterator[TimedPass]:
    """Yield base passes as a skill's base pass does them, with the router's feature statistics."""
    sums = StatisticsAccumulator(run.base.args.hidden_size)

    def read(batches: list[Batch]) -> None:
        for states in iterate_states(pool.model, batches):
            sums.add(states.features)

    for domain in _cropped_domains(run.base, run.model, run.domains, size):
        batches = domain.batches[: blas.NUM_STREAMS]
        flops = sum(base_pass_flops(run.model, len(b.inputs), b.inputs.shape[1]) for b in batches)
        yield TimedPass(partial(read, batches), flops)


def _evaluation_passes(run: TrainingRun, pool: Pool, size: Size) -> Iterator[TimedPass]:
    """Yield evaluations of held-out text under the mixture, in the mature phase."""
    routing, evaluator = phases.final_schedule(run.config.growth).routing, Evaluator(pool.model, run.compiled)
    adapters = pool.model.adapters(routing.top_k)
    mx.eval(adapters)
    ranks = sum(record.rank for record in pool.records)
    for domain in _cropped_domains(run.base, run.model, run.domains, size):
        flops = count.loss_flops(run.model, count.batch_shapes([domain]), ranks)
        yield TimedPass(partial(evaluate, pool.model, domain, routing, None, adapters, evaluator), flops)


def _step_passes(
    run: TrainingRun, pool: Pool, skills: Sequence[PlannedSkill], size: Size, targets: int | None = None
) -> Iterator[TimedPass]:
    """Yield training steps of one skill after the other, with as many micro-batches as the device computes concurrently.

    The learning rate is 0, and features and rehearsal memory are zeros: only their shapes matter. With `targets`, a step
    has one micro-batch, whose loss is that of its first so many targets.
    """
    schedule, training = phases.final_schedule(run.config.growth), run.config.training
    optimizers = make_optimizers(training)
    optimizers.init(pool.model)
    optimizers.set_learning_rates(0.0, training)
    step = Step(pool.model, optimizers, training, schedule.top_k, len(pool), run.compiled, run.config.growth.min_gate)
    tokens, dims = training.rehearsal_tokens, run.base.args.hidden_size
    memory = RehearsalBatch(mx.zeros((tokens, dims)), mx.zeros(tokens, mx.int32), mx.zeros(tokens))
    mx.eval(step.state, memory)

    def take_step(batches: list[MicroBatch]) -> None:
        mx.eval(step.state, step(batches, memory, mx.array(schedule.temperature)))

    trained = [
        (planned.plan, planned.steps, count.features_cached(run.config, run.base, run.model, planned.skill))
        for planned in skills
        if planned.plan is not None
    ]
    for index, (plan, steps, cached) in enumerate(cycle(trained)):
        batches = [_crop(batch, size) for batch in plan.step(index % steps)[: blas.NUM_STREAMS]]
        if targets is not None:
            mask = batches[0].loss_mask
            batches = [batches[0]._replace(loss_mask=mask & (np.cumsum(mask).reshape(mask.shape) <= targets))]
        max_targets = None if plan.max_targets is None else min(plan.max_targets, int(np.prod(size)))
        states = [np.zeros((*batch.inputs.shape, dims), np.float16) if cached else None for batch in batches]
        micro_batches = [
            device_batch(b, run.model.window, s, max_targets) for b, s in zip(batches, states, strict=True)
        ]
        shapes = [
            BatchShape(len(batch.inputs), batch.inputs.shape[1], batch.target_positions.size) for batch in micro_batches
        ]
        flops = sum(step_flops(run.model, *shape, cached, step.active_ranks) for shape in shapes)
        yield TimedPass(partial(take_step, micro_batches), flops)


def _router_fits(config: Config, base: Base, skills: list[Skill], pool: Pool) -> Iterator[TimedPass]:
    """Yield the same few steps of a router fit, on random features."""
    rng, dims = np.random.default_rng(0), base.args.hidden_size
    tokens = [count.remembered_tokens(config, skill) for skill in skills[:MAX_MEMORIES]]
    expert_ids = len(pool) + 1
    memories = [rng.standard_normal((num_tokens, dims), np.float32) for num_tokens in tokens]
    skills_features = [
        SkillFeatures(FeatureStatistics.from_features(memory), memory, n % expert_ids)
        for n, memory in enumerate(memories)
    ]
    fit = partial(fit_router.fit, pool.model.router, skills_features, FIT_STEPS, config.training.memory_tokens)
    return repeat(TimedPass(fit, round(FIT_STEPS * count.fit_flops(base, sum(tokens), expert_ids))))
