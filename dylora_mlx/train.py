"""Learn a stream of skills: python -m dylora_mlx.train [--config quickstart] [--section.option VALUE] [--resume RUN]"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from dylora_mlx import cli, runs
from dylora_mlx.data.packing import Packing
from dylora_mlx.data.stream import Skill, Stream
from dylora_mlx.growth import maturity, novelty, policy
from dylora_mlx.growth.library import Entry
from dylora_mlx.growth.maturity import Schedule
from dylora_mlx.growth.policy import Decision, Situation
from dylora_mlx.growth.pool import Record
from dylora_mlx.model.router import Routing
from dylora_mlx.runs import Run
from dylora_mlx.training import consolidate, display, metrics
from dylora_mlx.training import state as states
from dylora_mlx.training.evaluate import Domain, Evaluation, evaluate, evaluate_all
from dylora_mlx.training.feed import Feed, Work
from dylora_mlx.training.meter import Meter
from dylora_mlx.training.state import Best
from dylora_mlx.training.step import Step, StepMetrics, rate_factor
from dylora_mlx.training.study import Study, examine


def train(run: Run) -> None:
    """The loop over the stream."""
    if not run.state.matrix:
        start(run)
    for number in range(run.state.skill, len(run.skills)):
        skill = run.skills[number]
        frozen = run.pool.frozen_hashes()
        study = examine(run.model, skill, run.config, run.features / f"{skill.name}.npy")
        if run.state.decision is None:
            decision = decide(run, skill, study)
            run.state.decision = decision.record()
            run.record.decide({"step": run.state.step, **run.state.decision})
            seen = {"similarity_scores_on_creation": decision.similarities} if decision.creates else {}
            run.record.log(run.state.step, {"skill": skill.name, "novelty_threshold": decision.threshold, **seen})
            display.decision(decision, number + 1, len(run.skills))
            if decision.creates:
                grow(run, skill, study)
        evaluated = learn(run, skill, study) if run.state.decision["action"] == "create" else None
        settle(run, skill, study, frozen, evaluated)
        run.state.next_skill()
        runs.save(run)


def start(run: Run) -> None:
    """Before the first skill: the base's own losses, and what it knows as the library's first entry."""
    if run.known is not None:
        study = examine(run.model, run.known, run.config)
        run.library.add(Entry(run.known.name, 0, study.means, study.statistics, study.memory))
    baseline = evaluate_domains(run, run.domains, Schedule("mature", None, 1.0))
    run.state.matrix.append({name: found.loss for name, found in baseline.items()})
    run.record.log(0, {f"eval_{name}_loss": found.loss for name, found in baseline.items()})
    runs.save(run)


def decide(run: Run, skill: Skill, study: Study) -> Decision:
    """Measure the skill's novelty and ask the policy."""
    growth, state = run.config.growth, run.state
    seen = novelty.measure(study.means.astype(np.float64), run.library, run.reference, growth, run.config.seed)
    since = None if state.last_creation is None else state.step - state.last_creation
    experts_of = {entry.skill: entry.expert for entry in run.library.entries}
    situation = Situation(skill.name, seen, skill.train.tokens, experts_of, len(run.pool), since)
    return policy.by_threshold(situation, growth)


def grow(run: Run, skill: Skill, study: Study) -> None:
    """Add an expert with its gate row, and make room for it in the optimizers."""
    model = run.config.model
    rank, alpha = skill.source.rank or model.rank, skill.source.alpha or model.alpha
    if not len(run.pool):
        run.pool.start_null_row(run.library, study.statistics)
    key = mx.random.key(int(states.rng(run.config.seed, 2, len(run.pool)).integers(2**31)))
    run.pool.add(Record(skill.name, rank, alpha, run.state.step), key, study.statistics, run.library)
    training = run.config.training
    memory = (run.library, study.memory, len(run.pool))
    before, after = consolidate.fit(run.model.router, *memory, training.router_fit_steps, training.memory_tokens)
    display.say(f"  router fitted to {len(run.library) + 1} skills: cross-entropy {before:.3f} -> {after:.3f}")
    run.optimizers.init(run.model)
    run.state.last_creation = run.state.step


def learn(run: Run, skill: Skill, study: Study) -> dict[str, Evaluation] | None:
    """Train the newest expert and the router on one skill, from the state's cursor to the end or an early stop.

    Returns the last evaluation if it is still true: of the weights and the routing that the skill ends with.
    """
    config, state, training = run.config, run.state, run.config.training
    record, feed = run.pool.records[-1], feed_of(run, skill, study)
    steps = min(len(feed.plan), training.max_steps or len(feed.plan))
    announce(run, skill, feed.plan.statistics(), steps)
    step, evaluated, now = None, {}, maturity.settled(config.growth)
    meter = Meter(run.record, run.pool, run.optimizers, state, config.log.every)
    with display.progress() as bar, contextlib.closing(feed.steps(state.skill_step, steps)) as works:
        task = bar.add_task(f"  {skill.name}", total=steps, completed=state.skill_step, note="")
        for number, work in enumerate(works, state.skill_step):
            now = maturity.schedule(number, steps, config.growth)
            record.phase = now.phase
            if step is None or step.top_k != now.top_k:
                step = Step(run.model, run.optimizers, training, now.top_k, len(run.pool), run.compiled)
            if state.best.phase != now.phase:  # losses under different routing do not compare
                state.best = Best(phase=now.phase)
            run.optimizers.set_rates(rate_factor(number, steps, training), training)
            outcome = advance(run, step, work, now)
            state.step, state.skill_step, record.steps = state.step + 1, number + 1, number + 1
            state.flops += _flops(run, work)
            meter.step(outcome, now, skill.name, run.compilations)
            bar.update(task, completed=number + 1, note=f"loss {meter.loss:.3f}")
            last = number + 1 == steps
            if (number + 1) % training.eval_every == 0 or last:
                meter.pause()
                evaluated = evaluate_domains(run, run.domains, now)
                meter.evaluation(evaluated, skill.name)
                if keep_best(run, skill, evaluated):
                    display.say(f"  stopped at step {number + 1}: {training.patience} evaluations without improvement")
                    break
                meter.resume()
            if (number + 1) % training.checkpoint_every == 0 and not last:
                runs.save(run)
    restored = restore_best(run)
    return None if restored or now != maturity.settled(config.growth) else evaluated


def feed_of(run: Run, skill: Skill, study: Study) -> Feed:
    """What the skill's steps work on, from its first step on."""
    config, training, state = run.config, run.config.training, run.state
    seed = int(states.rng(config.seed, 3, state.skill).integers(2**31))
    size = (training.epochs, training.batch_rows, training.accumulation)
    plan = Stream.of(skill.train, config.data, *size, seed, fixed=run.compiled)
    before = state.step - state.skill_step
    return Feed(plan, study.features, run.library, training.rehearsal_tokens, config.seed, before, run.model.window)


def announce(run: Run, skill: Skill, packing: Packing, steps: int) -> None:
    if not run.state.skill_step:
        shown = {"padding_fraction": packing.padding_fraction, "packed_sequence_length_histogram": packing.histogram}
        run.record.log(run.state.step, {"skill": skill.name, **shown})
    rows = run.config.training.batch_rows * run.config.training.accumulation
    display.say(f"  {steps} steps of {rows} rows, padding {packing.padding_fraction:.2%}")


def advance(run: Run, step: Step, work: Work, now: Schedule) -> StepMetrics:
    """One optimisation step on the device."""
    before = step.compilations
    outcome = step(work.batches, work.memory, mx.array(now.temperature))
    run.traced += step.compilations - before
    mx.eval(run.model.state, run.optimizers.state, outcome)
    return outcome


def evaluate_domains(run: Run, domains: dict[str, Domain], now: Schedule) -> dict[str, Evaluation]:
    return evaluate_all(run.measure, domains, Routing(now.top_k, mx.array(now.temperature)))


def keep_best(run: Run, skill: Skill, evaluated: dict[str, Evaluation]) -> bool:
    """Keep the weights if the watched domain improved; return whether patience has run out."""
    training, best = run.config.training, run.state.best
    watched = skill.name if training.early_stop_domain == "current" else training.early_stop_domain
    loss = evaluated[watched].loss
    if best.loss is None or loss < best.loss - training.min_improvement:
        best.loss, best.step, best.waited, best.weights = loss, run.state.step, 0, states.trainable_weights(run.pool)
    else:
        best.waited += 1
    return best.waited >= training.patience


def restore_best(run: Run) -> bool:
    """Go back to the best weights of the last phase; return whether they differ from the last ones."""
    best = run.state.best
    if not best.weights or best.step == run.state.step:
        return False
    run.model.update(tree_unflatten(list(best.weights.items())))
    display.say(f"  went back to step {best.step}, where the watched loss was lowest ({best.loss:.3f})")
    return True


def settle(
    run: Run, skill: Skill, study: Study, frozen: dict[int, str], evaluated: dict[str, Evaluation] | None
) -> None:
    """Freeze a new expert, remember the skill, evaluate every domain, and check that no frozen expert has changed."""
    decision, state = run.state.decision, run.state
    assert decision is not None
    if decision["action"] == "create":
        record = run.pool.records[decision["expert"] - 1]
        record.phase = "mature"
        run.pool.freeze(decision["expert"])
    run.library.add(Entry(skill.name, decision["expert"], study.means, study.statistics, study.memory))
    now = run.pool.frozen_hashes()
    if any(now[column] != before for column, before in frozen.items()):
        raise RuntimeError(f"a frozen expert changed while {skill.name} was learned; the run is stopped")
    evaluated = evaluated or evaluate_domains(run, run.domains, maturity.settled(run.config.growth))
    state.matrix.append({name: found.loss for name, found in evaluated.items()})
    losses = {f"eval_{name}_loss": found.loss for name, found in evaluated.items()}
    run.record.log(state.step, {"skill": skill.name, "after_skill": True, "num_experts": len(run.pool), **losses})
    if study.features is not None:
        study.features.delete()
    own, before = state.matrix[-1][skill.name], state.matrix[0][skill.name]
    display.say(f"  {skill.name}: {before:.3f} -> {own:.3f} ({own - before:+.3f} nats against the base)")


def _flops(run: Run, work: Work) -> int:
    """Of everything that the step computed, what fills up included."""
    total = 0
    for batch in work.batches:
        rows, length = batch.inputs.shape
        total += metrics.step_flops(run.model, rows, length, batch.positions.size, batch.features is not None)
    return total


def finish(run: Run) -> None:
    """The matrix, the test losses, the final checkpoint, and what to do next."""
    state, settled = run.state, maturity.settled(run.config.growth)
    names = [skill.name for skill in run.skills]
    display.say("")
    display.matrix(state.matrix, names, list(run.domains))
    summary = metrics.continual(state.matrix, names)
    display.continual(summary)
    experts_of = {entry.skill: entry.expert for entry in run.library.entries}
    routed, base, own = evaluate_domains(run, run.tests, settled), {}, {}
    together = (run.model.adapters(), run.measure)
    for name, domain in run.tests.items():
        routing = Routing(None, mx.array(1.0))
        base[name] = evaluate(run.model, domain, routing, 0, *together).loss
        own[name] = evaluate(run.model, domain, routing, experts_of.get(name, 0), *together).loss
    display.tests(base, {name: found.loss for name, found in routed.items()}, own, experts_of)
    runs.save(run, "final")
    shutil.rmtree(run.features, ignore_errors=True)
    results = {
        "matrix": state.matrix,
        "skills": names,
        "continual": summary._asdict(),
        "test": {n: {"base": base[n], "mixture": routed[n].loss, "own_expert": own[n]} for n in run.tests},
        "experts": run.pool.describe(),
        "steps": state.step,
    }
    runs.write_json(run.folder / "results.json", results)
    runs.describe(run, "finished")
    run.record.finish({f"final_eval_{name}_loss": value for name, value in state.matrix[-1].items()})
    created = len(run.pool)
    top_k = settled.top_k or created + 1
    routing_kind = f"top-{top_k}" if top_k <= created else "dense"
    display.say(
        f"{created} expert{'s' * (created != 1)} in {state.step} steps; routing {routing_kind}. The run is in {run.folder}"
    )
    if created:
        display.say(f"next: python tools/export_peft.py {run.folder} --expert all --out {run.folder}-peft")


def command(argv: list[str]) -> int:
    options = cli.parse(argv)
    started = time.perf_counter()
    run = runs.resume(options.folder) if options.resume else runs.begin(options)
    train(run)
    finish(run)
    display.say(f"took {time.perf_counter() - started:.0f} s")
    return 0


def main(argv: list[str] | None = None) -> int:
    return cli.guarded(command, argv)


if __name__ == "__main__":
    sys.exit(main())
