"""Learn one skill: the steps of one expert and the router, from the state's cursor to the end or an early stop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import mlx.core as mx
from mlx.utils import tree_unflatten

from dylora_mlx.config import Config
from dylora_mlx.data.packing import PackingStats
from dylora_mlx.data.stream import BatchPlan, Skill
from dylora_mlx.errors import Failure
from dylora_mlx.growth import phases
from dylora_mlx.growth.phases import RoutingSchedule
from dylora_mlx.growth.pool import Pool
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.system import console, signals
from dylora_mlx.system.seeds import SeedStream, derived_seed
from dylora_mlx.training import failures, health
from dylora_mlx.training.checkpoint.state import BestState, TrainerState, grow_best_rank, trainable_weights
from dylora_mlx.training.metrics import flops
from dylora_mlx.training.metrics.meter import StepMeter
from dylora_mlx.training.metrics.recorder import MetricsRecorder
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.skill.base_pass import BasePass
from dylora_mlx.training.skill.prefetch import Prefetcher, StepWork
from dylora_mlx.training.skill.replay import prepare_replay
from dylora_mlx.training.step.evaluate import Evaluation
from dylora_mlx.training.step.optimizers import lr_schedule
from dylora_mlx.training.step.step import Step, StepMetrics
from dylora_mlx.training.weight_sync import sync_weights


def learn_skill(
    run: TrainingRun, skill: Skill, study: BasePass, expert_id: int, save: Callable[[TrainingRun], None] | None = None
) -> dict[str, Evaluation] | None:
    """Train the expert of `column` and the router on a skill.

    save: writes a checkpoint; None where a stopped run goes on from before the skill. Returns the last evaluation if it
    is still true: of the weights and the routing that the skill ends with.
    """
    config, state, training = run.config, run.state, run.config.training
    record, feed = run.pool.records[expert_id - 1], make_prefetcher(run, skill, study)
    steps = count_steps(run.config, feed.plan)
    log_packing(run.config, run.state, run.metrics, skill, feed.plan.statistics(), steps)
    step, evaluated, now = None, {}, phases.final_schedule(config.growth)
    run.measure_gather_threshold()
    sync_weights(run.model, run.optimizers)  # the router was fitted by each rank
    before, part = record.steps - state.skill_step, run.pool.frozen_projections_hash(expert_id)
    meter = StepMeter(run.metrics, run.pool, run.optimizers, state, config.log.steps_per_report)
    bar = console.progress(f"  {skill.name}", steps, state.skill_step)
    with bar as shown, contextlib.closing(feed.steps(state.skill_step, steps)) as works:
        for number, work in enumerate(works, state.skill_step):
            now = phases.routing_schedule(number, steps, config.growth, len(run.pool))
            record.phase = now.phase
            if step is None or (step.top_k, step.min_gate) != (now.top_k, now.min_gate):
                step = Step(run.model, run.optimizers, training, now.top_k, expert_id, run.compiled, now.min_gate)
            if state.best.phase != now.phase:  # losses under different routing do not compare
                state.best = BestState(phase=now.phase)
            run.optimizers.set_learning_rates(lr_schedule(number, steps, training), training)
            outcome = train_step(run, step, work, now)
            state.step, state.skill_step, record.steps = state.step + 1, number + 1, before + number + 1
            meter.step(outcome, now, skill.name, run.compilations)
            health.warn_of_loss_spike(run.state, run.metrics, skill, outcome)
            shown.advance(f"loss {meter.loss:.3f}")
            last = number + 1 == steps
            if (number + 1) % training.steps_per_eval == 0 or last:
                meter.pause()
                step = None if sync_weights(run.model, run.optimizers) else step
                evaluated = run.evaluate(schedule=now)
                meter.evaluation(evaluated, skill.name)
                health.warn_of_routing(run, skill, expert_id, evaluated)
                if update_best(run.config, run.pool, run.state, skill, evaluated):
                    console.info(f"  stopped at step {number + 1}: {training.patience} evaluations without improvement")
                    break
                if not last and freeze_projections(run, expert_id):
                    step, part = None, run.pool.frozen_projections_hash(expert_id)
                if not last and grow_rank(run, expert_id, evaluated[watched_domain(run.config, skill)].loss):
                    step = None
                meter.resume()
            asked = stop_requested(outcome) and not last
            due = asked or ((number + 1) % training.save_every == 0 and not last)
            if due and save is not None:
                save(run)
            if asked:
                signals.raise_interrupted(failures.resume_hint(run.folder, run.state))
    if run.pool.frozen_projections_hash(expert_id) != part:
        raise Failure(f"a frozen projection changed while {skill.name} was learned; the run is stopped")
    restored = restore_best(run.model, run.state)
    return None if restored or now._replace(min_gate=0.0) != phases.final_schedule(config.growth) else evaluated


def make_prefetcher(run: TrainingRun, skill: Skill, study: BasePass) -> Prefetcher:
    """What the skill's steps work on, from its first step on."""
    config, state, plan = run.config, run.state, plan_batches(run, skill, run.state.skill_index)
    before, tokens = state.step - state.skill_step, config.training.rehearsal_tokens
    return Prefetcher(
        plan, study.features, run.library, tokens, config.seed, before, run.model.window, prepare_replay(run)
    )


def plan_batches(run: TrainingRun, skill: Skill, number: int) -> BatchPlan:
    """The steps of a skill that comes as the stream's `number`th, from 0."""
    config, training = run.config, run.config.training
    seed = derived_seed(config.seed, SeedStream.BATCH_ORDER, number)
    size = (training.epochs, training.batch_size, training.grad_accumulation_steps)
    return BatchPlan.plan(skill.train, config.data, *size, seed, fixed=run.compiled)


def count_steps(config: Config, plan: BatchPlan) -> int:
    """How many of a plan's steps are trained, at most."""
    return min(len(plan), config.training.max_steps or len(plan))


def log_packing(
    config: Config, state: TrainerState, metrics: MetricsRecorder, skill: Skill, packing: PackingStats, steps: int
) -> None:
    if not state.skill_step:
        shown = {"padding_fraction": packing.padding_fraction, "packed_sequence_length_histogram": packing.histogram}
        metrics.log(state.step, {"skill": skill.name, **shown})
    rows = config.training.batch_size * config.training.grad_accumulation_steps
    console.info(f"  {steps} steps of {rows} rows, padding {packing.padding_fraction:.2%}")


def train_step(run: TrainingRun, step: Step, work: StepWork, now: RoutingSchedule) -> StepMetrics:
    """One optimisation step on the device."""
    before, kept = step.compilations, step.snapshot()
    outcome = step(work.batches, work.memory, mx.array(now.temperature), work.replayed, work.global_counts)
    run.step_traces += step.compilations - before
    mx.eval(step.state, outcome)
    health.skip_nonfinite_update(run, outcome, work.batches, step, kept)
    run.state.flops += _flops(run.model, step, work)
    return outcome


def stop_requested(outcome: StepMetrics) -> bool:
    """Whether this process was asked to leave or, as all of them must know it of the same step, any rank of several."""
    return signals.stop_requested() if outcome.ranks_asked_to_stop is None else bool(outcome.ranks_asked_to_stop.item())


def watched_domain(config: Config, skill: Skill) -> str:
    """The domain whose loss decides which state is kept."""
    domain = config.training.early_stop_domain
    return skill.name if domain == "current" else domain


def update_best(
    config: Config, pool: Pool, state: TrainerState, skill: Skill, evaluated: dict[str, Evaluation]
) -> bool:
    """Keep the weights if the watched domain improved; return whether patience has run out."""
    training, best = config.training, state.best
    loss = evaluated[watched_domain(config, skill)].loss
    if best.loss is None or loss < best.loss - training.min_improvement:
        best.loss, best.step, best.evals_since_best, best.weights = loss, state.step, 0, trainable_weights(pool)
    else:
        best.evals_since_best += 1
    return best.evals_since_best >= training.patience


def freeze_projections(run: TrainingRun, expert_id: int) -> bool:
    """Freeze the projections that go first if the watched loss has not improved for long; return whether that was done."""
    growth, record, waited = run.config.growth, run.pool.records[expert_id - 1], run.state.best.evals_since_best
    if not growth.freeze_after or waited < growth.freeze_after or record.frozen_projections or record.phase != "mature":
        return False
    run.pool.freeze_projections(expert_id, growth.freeze_first)
    names = ", ".join(growth.freeze_first)
    console.info(f"  {names} frozen at step {run.state.step}: {waited} evaluations without improvement")
    run.metrics.log(run.state.step, {"frozen_projections": growth.freeze_first, "expert": expert_id})
    return True


def grow_rank(run: TrainingRun, expert_id: int, loss: float) -> bool:
    """Double the expert's rank if the watched loss hardly improved since the last look; return whether that was done."""
    options, state, record = run.config.growth.rank, run.state, run.pool.records[expert_id - 1]
    if not options.epsilon or record.frozen_projections or record.rank * 2 > run.lora_ranks.largest:
        return False
    if state.last_rank_check is None:
        state.last_rank_check = (state.step, loss)
    if state.step - state.last_rank_check[0] < options.steps:
        return False
    gained, state.last_rank_check = state.last_rank_check[1] - loss, (state.step, loss)
    if gained >= options.epsilon:
        return False
    key = mx.random.key(derived_seed(run.config.seed, SeedStream.RANK_GROWTH, state.step))
    run.pool.grow_rank(expert_id, record.rank * 2, key)
    run.optimizers.grow_moments(run.model)
    grow_best_rank(state.best, run.pool)
    console.info(
        f"  rank {record.rank // 2} -> {record.rank} at step {state.step}: {gained:+.4f} nats since the last look"
    )
    run.metrics.log(state.step, {"rank_growth": record.rank, "expert": expert_id, "improvement": gained})
    return True


def restore_best(model: RoutedDecoder, state: TrainerState) -> bool:
    """Go back to the best weights of the last phase; return whether they differ from the last ones."""
    best = state.best
    if not best.weights or best.step == state.step:
        return False
    model.update(tree_unflatten(list(best.weights.items())))
    console.info(f"  went back to step {best.step}, where the watched loss was lowest ({best.loss:.3f})")
    return True


def _flops(model: RoutedDecoder, step: Step, work: StepWork) -> int:
    """Of everything that the step computed on all ranks, what fills up included."""
    return sum(flops.step_flops(model, *size, step.active_ranks) for size in work.sizes)
