"""Training loop of one skill: one expert and the router, from the state's step to the end or an early stop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from dylora_mlx.config import Config
from dylora_mlx.data.packing import PackingStats
from dylora_mlx.data.stream import BatchPlan, Skill
from dylora_mlx.errors import Failure
from dylora_mlx.growth import phases
from dylora_mlx.growth.feature_statistics import FeatureScale
from dylora_mlx.growth.phases import RoutingSchedule
from dylora_mlx.growth.pool import Pool
from dylora_mlx.model.base import device
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.system import console, signals
from dylora_mlx.system.seeds import SeedStream, derived_seed
from dylora_mlx.training import failures, health
from dylora_mlx.training.callbacks import EvaluationEvent, StepEvent
from dylora_mlx.training.checkpoint.state import TrainerState, grow_best_rank, trainable_weights
from dylora_mlx.training.metrics import flops
from dylora_mlx.training.metrics.meter import StepMeter
from dylora_mlx.training.metrics.recorder import MetricsRecorder
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.skill.base_pass import BasePass
from dylora_mlx.training.skill.evaluations import evaluation_steps, warn_of_idle_options
from dylora_mlx.training.skill.prefetch import Prefetcher, StepWork
from dylora_mlx.training.skill.replay import prepare_replay
from dylora_mlx.training.step.optimizers import lr_schedule
from dylora_mlx.training.step.step import Step, StepMetrics
from dylora_mlx.training.weight_sync import sync_weights

RETRY_RATE = 0.1
"""Factor of the learning rates when a skill is trained again because its first training was undone."""


def learn_skill(
    run: TrainingRun,
    skill: Skill,
    base_pass: BasePass,
    expert_id: int,
    save: Callable[[TrainingRun], None] | None = None,
) -> None:
    """Train an expert and the router on a skill. Raises Failure if a frozen projection has changed.

    Args:
        run: the run. Training starts at `run.state.skill_step`.
        skill: the skill to learn.
        base_pass: the base pass over the skill.
        expert_id: the expert to train.
        save: writes a checkpoint. None if a stopped run resumes from before the skill, so that none is needed.
    """
    config, state, training = run.config, run.state, run.config.training
    record, prefetcher = run.pool.records[expert_id - 1], make_prefetcher(run, skill, base_pass)
    steps = count_steps(run.config, prefetcher.plan)
    log_packing(run.config, run.state, run.metrics, skill, prefetcher.plan.statistics(), steps)
    step, watched = None, {name: run.domains[name] for name in (skill.name, watched_domain(config, skill))}
    scale = FeatureScale.pooled(run.library.pooled_statistics(base_pass.statistics))
    run.measure_gather_threshold()
    # Each rank has fitted the router separately. Start from identical weights on all ranks.
    sync_weights(run.model, run.optimizers)
    steps_before, frozen_hash = record.steps - state.skill_step, run.pool.frozen_projections_hash(expert_id)
    meter = StepMeter(run.metrics, run.pool, run.optimizers, state, config.log.steps_per_report)
    final, watched_name = phases.final_schedule(config.growth), watched_domain(config, skill)
    if not state.skill_step:
        if not state.attempt:
            warn_of_idle_options(config, skill.name, steps, record, run.lora_ranks.largest)
        # The start competes, so that training that only does harm is undone. Rank growth compares with it too.
        start_loss = run.evaluate(watched, final)[watched_name].loss
        update_best(config, run.pool, state, start_loss)
        state.last_rank_check = (state.step, start_loss)
    evaluated_steps = set(evaluation_steps(config, steps))
    progress = console.progress(f"  {skill.name}", steps, state.skill_step)
    with progress as progress_bar, contextlib.closing(prefetcher.steps(state.skill_step, steps)) as work_items:
        for number, work in enumerate(work_items, state.skill_step):
            current_schedule = phases.routing_schedule(number, steps, config.growth, len(run.pool))
            record.phase = current_schedule.phase
            if step is None or (step.top_k, step.min_gate) != (current_schedule.top_k, current_schedule.min_gate):
                step = Step(
                    run.model,
                    run.optimizers,
                    training,
                    current_schedule.top_k,
                    expert_id,
                    run.compiled,
                    current_schedule.min_gate,
                    scale,
                )
            rate = lr_schedule(number, steps, training) * RETRY_RATE**state.attempt
            run.optimizers.set_learning_rates(rate, training)
            step_metrics = train_step(run, step, work, current_schedule)
            state.step, state.skill_step, record.steps = state.step + 1, number + 1, steps_before + number + 1
            meter.step(step_metrics, current_schedule, skill.name, run.compilations)
            health.warn_of_loss_spike(run.state, run.metrics, skill, step_metrics)
            progress_bar.advance(f"loss {meter.loss:.3f}")
            if run.callbacks:
                loss, learning_rate = float(np.array(step_metrics.terms.lm_loss)), training.learning_rate * rate
                run.callbacks.on_step(StepEvent(state.step, skill.name, number + 1, loss, learning_rate))
            is_last = number + 1 == steps
            if number + 1 in evaluated_steps:
                meter.pause()
                # Evaluation and steps need buffers of other sizes: each begins without what the other has freed.
                device.release_freed_memory()
                # A compiled step holds the old optimizer moments. If they were replaced, a new step is needed.
                step = None if sync_weights(run.model, run.optimizers) else step
                # Under the final routing in every phase: losses under different routing do not compare.
                evaluated = run.evaluate(watched, final)
                meter.evaluation(evaluated, skill.name)
                losses = {name: evaluation.loss for name, evaluation in evaluated.items()}
                run.callbacks.on_evaluation(EvaluationEvent(state.step, skill.name, losses, False))
                if len(run.pool) > 1:
                    health.warn_of_routing(run, skill, expert_id, run.expert_shares(final))
                watched_loss = evaluated[watched_name].loss
                if update_best(run.config, run.pool, run.state, watched_loss):
                    console.info(f"  stopped at step {number + 1}: {training.patience} evaluations without improvement")
                    break
                if not is_last and freeze_projections(run, expert_id):
                    step, frozen_hash = None, run.pool.frozen_projections_hash(expert_id)
                if not is_last and grow_rank(run, expert_id, watched_loss):
                    step = None
                device.release_freed_memory()
                meter.resume()
            # After the last step neither is needed: the run finishes the skill and saves a checkpoint then.
            must_stop = stop_requested(step_metrics) and not is_last
            save_due = must_stop or ((number + 1) % training.save_every == 0 and not is_last)
            if save_due and save is not None:
                save(run)
            if must_stop:
                signals.raise_interrupted(failures.resume_hint(run.folder, run.state))
    if run.pool.frozen_projections_hash(expert_id) != frozen_hash:
        raise Failure(f"a frozen projection changed while {skill.name} was learned; the run is stopped")
    restore_best(run.model, run.state)


def make_prefetcher(run: TrainingRun, skill: Skill, base_pass: BasePass) -> Prefetcher:
    """Return the prefetcher of a skill's steps, with the feature cache and the replay buffer."""
    config, state, plan = run.config, run.state, plan_batches(run, skill, run.state.skill_index)
    steps_before, tokens = state.step - state.skill_step, config.training.rehearsal_tokens
    return Prefetcher(
        plan, base_pass.features, run.library, tokens, config.seed, steps_before, run.model.window, prepare_replay(run),
        config.training.lora_dropout > 0,
    )  # fmt: skip


def plan_batches(run: TrainingRun, skill: Skill, number: int) -> BatchPlan:
    """Plan the batches of the skill at index `number` of the stream."""
    config, training = run.config, run.config.training
    seed = derived_seed(config.seed, SeedStream.BATCH_ORDER, number)
    size = (training.epochs, training.batch_size, training.grad_accumulation_steps)
    return BatchPlan.plan(skill.train, config.data, *size, seed, fixed=run.compiled)


def count_steps(config: Config, plan: BatchPlan) -> int:
    """Return the number of steps to train: the length of the plan, capped by training.max_steps."""
    return min(len(plan), config.training.max_steps or len(plan))


def log_packing(
    config: Config, state: TrainerState, metrics: MetricsRecorder, skill: Skill, packing: PackingStats, steps: int
) -> None:
    """Print the number of steps and the padding. At the skill's first step, also log the packing as metrics."""
    if not state.skill_step:
        packing_metrics = {
            "padding_fraction": packing.padding_fraction,
            "packed_sequence_length_histogram": packing.histogram,
            "packed_sequence_length_edges": packing.edges,
        }
        metrics.log(state.step, {"skill": skill.name, **packing_metrics})
    rows = config.training.batch_size * config.training.grad_accumulation_steps
    console.detail(f"  {steps} steps of {rows} rows, padding {packing.padding_fraction:.2%}")


def train_step(run: TrainingRun, step: Step, work: StepWork, schedule: RoutingSchedule) -> StepMetrics:
    """Run one optimization step and evaluate it on the device. An update that is not finite is undone."""
    compilations_before, snapshot = step.compilations, step.snapshot()
    step_metrics = step(work.batches, work.memory, mx.array(schedule.temperature), work.replayed, work.global_counts)
    run.step_traces += step.compilations - compilations_before
    mx.eval(step.state, step_metrics)
    health.skip_nonfinite_update(run, step_metrics, work.batches, step, snapshot)
    run.state.flops += _flops(run.model, step, work)
    return step_metrics


def stop_requested(step_metrics: StepMetrics) -> bool:
    """Return whether this process or, with several ranks, any rank was asked to stop.

    All ranks must stop at the same step, so the ranks' flags are summed within the step.
    """
    return (
        signals.stop_requested()
        if step_metrics.ranks_asked_to_stop is None
        else bool(step_metrics.ranks_asked_to_stop.item())
    )


def watched_domain(config: Config, skill: Skill) -> str:
    """Return the domain whose loss drives early stopping and the choice of the best weights."""
    domain = config.training.early_stop_domain
    return skill.name if domain == "current" else domain


def update_best(config: Config, pool: Pool, state: TrainerState, loss: float) -> bool:
    """Keep a copy of the weights if the watched domain's loss has improved. Returns whether patience has run out."""
    training, best = config.training, state.best
    if best.loss is None or loss < best.loss - training.min_improvement:
        best.loss, best.step, best.evals_since_best, best.weights = loss, state.step, 0, trainable_weights(pool)
    else:
        best.evals_since_best += 1
    return best.evals_since_best >= training.patience


def freeze_projections(run: TrainingRun, expert_id: int) -> bool:
    """Freeze the projections growth.freeze_first after growth.freeze_after evaluations without improvement.

    Only a mature expert without frozen projections is considered. Returns whether it was done.
    """
    growth, record, stale_evals = run.config.growth, run.pool.records[expert_id - 1], run.state.best.evals_since_best
    if (
        not growth.freeze_after
        or stale_evals < growth.freeze_after
        or record.frozen_projections
        or record.phase != "mature"
    ):
        return False
    run.pool.freeze_projections(expert_id, growth.freeze_first)
    names = ", ".join(growth.freeze_first)
    console.info(f"  {names} frozen at step {run.state.step}: {stale_evals} evaluations without improvement")
    run.metrics.log(run.state.step, {"frozen_projections": growth.freeze_first, "expert": expert_id})
    return True


def grow_rank(run: TrainingRun, expert_id: int, loss: float) -> bool:
    """Double an expert's LoRA rank if the watched loss has improved by less than growth.rank.epsilon in
    growth.rank.steps.

    Returns whether it was done. Ranks stay within `run.lora_ranks.largest`.
    """
    options, state, record = run.config.growth.rank, run.state, run.pool.records[expert_id - 1]
    if not options.epsilon or record.frozen_projections or record.rank * 2 > run.lora_ranks.largest:
        return False
    if state.last_rank_check is None:  # resumed from a version that had no check at the start of a skill
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


def restore_best(model: RoutedDecoder, state: TrainerState) -> None:
    """Restore the weights with the lowest watched loss."""
    best = state.best
    if not best.weights or best.step == state.step:
        return
    model.update(tree_unflatten(list(best.weights.items())))
    if best.step == state.step - state.skill_step:
        console.info(f"  went back to the start: training did not lower the watched loss ({best.loss:.3f})")
        return
    console.info(f"  went back to step {best.step}, where the watched loss was lowest ({best.loss:.3f})")


def _flops(model: RoutedDecoder, step: Step, work: StepWork) -> int:
    """Return the FLOPs of a step on all ranks, padding included."""
    return sum(flops.step_flops(model, *size, step.active_ranks) for size in work.sizes)
