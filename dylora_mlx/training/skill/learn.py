"""Learn one skill: the steps of one expert and the router, from the state's cursor to the end or an early stop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import mlx.core as mx
from mlx.utils import tree_unflatten

from dylora_mlx.data.packing import Packing
from dylora_mlx.data.stream import Skill, Stream
from dylora_mlx.errors import Failure
from dylora_mlx.growth import phases as maturity
from dylora_mlx.growth.phases import Schedule
from dylora_mlx.system import console
from dylora_mlx.system import signals as interrupts
from dylora_mlx.system.seeds import SeedStream, derived_seed
from dylora_mlx.training import failures as faults
from dylora_mlx.training import health as alarms
from dylora_mlx.training import health as guards
from dylora_mlx.training import weight_sync as drift
from dylora_mlx.training.checkpoint import state as states
from dylora_mlx.training.checkpoint.state import Best
from dylora_mlx.training.metrics import flops
from dylora_mlx.training.metrics.meter import Meter
from dylora_mlx.training.run import Run
from dylora_mlx.training.skill import replay as recall
from dylora_mlx.training.skill.base_pass import Study
from dylora_mlx.training.skill.prefetch import Feed, Work
from dylora_mlx.training.step.evaluate import Evaluation
from dylora_mlx.training.step.optimizers import rate_factor
from dylora_mlx.training.step.step import Step, StepMetrics


def learn(
    run: Run, skill: Skill, study: Study, column: int, save: Callable[[Run], None]
) -> dict[str, Evaluation] | None:
    """Train the expert of `column` and the router on a skill.

    save: writes a checkpoint. Returns the last evaluation if it is still true: of the weights and the routing that the
    skill ends with.
    """
    config, state, training = run.config, run.state, run.config.training
    record, feed = run.pool.records[column - 1], feed_of(run, skill, study)
    steps = steps_of(run, feed.plan)
    announce(run, skill, feed.plan.statistics(), steps)
    step, evaluated, now = None, {}, maturity.settled(config.growth)
    run.settle_lookup()
    drift.mend(run)  # the router was fitted by each rank
    before, part = record.steps - state.skill_step, run.pool.part_hash(column)
    meter = Meter(run.record, run.pool, run.optimizers, state, config.log.every)
    bar = console.phase(f"  {skill.name}", steps, state.skill_step)
    with bar as shown, contextlib.closing(feed.steps(state.skill_step, steps)) as works:
        for number, work in enumerate(works, state.skill_step):
            now = maturity.schedule(number, steps, config.growth, len(run.pool))
            record.phase = now.phase
            if step is None or (step.top_k, step.floor) != (now.top_k, now.floor):
                step = Step(run.model, run.optimizers, training, now.top_k, column, run.compiled, now.floor)
            if state.best.phase != now.phase:  # losses under different routing do not compare
                state.best = Best(phase=now.phase)
            run.optimizers.set_rates(rate_factor(number, steps, training), training)
            outcome = advance(run, step, work, now)
            state.step, state.skill_step, record.steps = state.step + 1, number + 1, before + number + 1
            meter.step(outcome, now, skill.name, run.compilations)
            alarms.warn_of_loss_spike(run, skill, outcome)
            shown.advance(f"loss {meter.loss:.3f}")
            last = number + 1 == steps
            if (number + 1) % training.eval_every == 0 or last:
                meter.pause()
                step = None if drift.mend(run) else step
                evaluated = run.evaluate(now=now)
                meter.evaluation(evaluated, skill.name)
                alarms.warn_of_routing(run, skill, column, evaluated)
                if keep_best(run, skill, evaluated):
                    console.say(f"  stopped at step {number + 1}: {training.patience} evaluations without improvement")
                    break
                if not last and freeze_part(run, column):
                    step, part = None, run.pool.part_hash(column)
                if not last and widen(run, column, evaluated[watched(run, skill)].loss):
                    step = None
                meter.resume()
            asked = leaving(outcome) and not last
            if asked or ((number + 1) % training.checkpoint_every == 0 and not last):
                save(run)
            if asked:
                interrupts.leave(faults.left(run))
    if run.pool.part_hash(column) != part:
        raise Failure(f"a frozen projection changed while {skill.name} was learned; the run is stopped")
    restored = restore_best(run)
    return None if restored or now._replace(floor=0.0) != maturity.settled(config.growth) else evaluated


def feed_of(run: Run, skill: Skill, study: Study) -> Feed:
    """What the skill's steps work on, from its first step on."""
    config, state, plan = run.config, run.state, plan_of(run, skill, run.state.skill)
    before, tokens = state.step - state.skill_step, config.training.rehearsal_tokens
    return Feed(plan, study.features, run.library, tokens, config.seed, before, run.model.window, recall.prepare(run))


def plan_of(run: Run, skill: Skill, number: int) -> Stream:
    """The steps of a skill that comes as the stream's `number`th, from 0."""
    config, training = run.config, run.config.training
    seed = derived_seed(config.seed, SeedStream.BATCH_ORDER, number)
    size = (training.epochs, training.batch_rows, training.accumulation)
    return Stream.of(skill.train, config.data, *size, seed, fixed=run.compiled)


def steps_of(run: Run, plan: Stream) -> int:
    """How many of a plan's steps are trained, at most."""
    return min(len(plan), run.config.training.max_steps or len(plan))


def announce(run: Run, skill: Skill, packing: Packing, steps: int) -> None:
    if not run.state.skill_step:
        shown = {"padding_fraction": packing.padding_fraction, "packed_sequence_length_histogram": packing.histogram}
        run.record.log(run.state.step, {"skill": skill.name, **shown})
    rows = run.config.training.batch_rows * run.config.training.accumulation
    console.say(f"  {steps} steps of {rows} rows, padding {packing.padding_fraction:.2%}")


def advance(run: Run, step: Step, work: Work, now: Schedule) -> StepMetrics:
    """One optimisation step on the device."""
    before, kept = step.compilations, step.keep()
    outcome = step(work.batches, work.memory, mx.array(now.temperature), work.recalled, work.whole)
    run.traced += step.compilations - before
    mx.eval(step.state, outcome)
    guards.skip_nonfinite_update(run, outcome, work.batches, step, kept)
    run.state.flops += _flops(run, step, work)
    return outcome


def leaving(outcome: StepMetrics) -> bool:
    """Whether this process was asked to leave or, as all of them must know it of the same step, any rank of several."""
    return interrupts.asked() if outcome.asked is None else bool(outcome.asked.item())


def watched(run: Run, skill: Skill) -> str:
    """The domain whose loss decides which state is kept."""
    domain = run.config.training.early_stop_domain
    return skill.name if domain == "current" else domain


def keep_best(run: Run, skill: Skill, evaluated: dict[str, Evaluation]) -> bool:
    """Keep the weights if the watched domain improved; return whether patience has run out."""
    training, best = run.config.training, run.state.best
    loss = evaluated[watched(run, skill)].loss
    if best.loss is None or loss < best.loss - training.min_improvement:
        best.loss, best.step, best.waited, best.weights = loss, run.state.step, 0, states.trainable_weights(run.pool)
    else:
        best.waited += 1
    return best.waited >= training.patience


def freeze_part(run: Run, column: int) -> bool:
    """Freeze the projections that go first if the watched loss has not improved for long; return whether that was done."""
    growth, record, waited = run.config.growth, run.pool.records[column - 1], run.state.best.waited
    if not growth.freeze_after or waited < growth.freeze_after or record.partly or record.phase != "mature":
        return False
    run.pool.freeze_part(column, growth.freeze_first)
    names = ", ".join(growth.freeze_first)
    console.say(f"  {names} frozen at step {run.state.step}: {waited} evaluations without improvement")
    run.record.log(run.state.step, {"frozen_projections": growth.freeze_first, "expert": column})
    return True


def widen(run: Run, column: int, loss: float) -> bool:
    """Double the expert's rank if the watched loss hardly improved since the last look; return whether that was done."""
    options, state, record = run.config.growth.rank, run.state, run.pool.records[column - 1]
    if not options.epsilon or record.partly or record.rank * 2 > run.ranks.largest:
        return False
    if state.looked is None:
        state.looked = (state.step, loss)
    if state.step - state.looked[0] < options.steps:
        return False
    gained, state.looked = state.looked[1] - loss, (state.step, loss)
    if gained >= options.epsilon:
        return False
    key = mx.random.key(derived_seed(run.config.seed, SeedStream.RANK_GROWTH, state.step))
    run.pool.widen(column, record.rank * 2, key)
    run.optimizers.widen(run.model)
    states.widen(state.best, run.pool)
    console.say(
        f"  rank {record.rank // 2} -> {record.rank} at step {state.step}: {gained:+.4f} nats since the last look"
    )
    run.record.log(state.step, {"rank_growth": record.rank, "expert": column, "improvement": gained})
    return True


def restore_best(run: Run) -> bool:
    """Go back to the best weights of the last phase; return whether they differ from the last ones."""
    best = run.state.best
    if not best.weights or best.step == run.state.step:
        return False
    run.model.update(tree_unflatten(list(best.weights.items())))
    console.say(f"  went back to step {best.step}, where the watched loss was lowest ({best.loss:.3f})")
    return True


def _flops(run: Run, step: Step, work: Work) -> int:
    """Of everything that the step computed on all ranks, what fills up included."""
    return sum(flops.step_flops(run.model, *size, step.ranks) for size in work.sizes)
