"""The loop over a stream of skills: measure novelty, decide, grow, learn, freeze, evaluate."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace

import mlx.core as mx

from dylora_mlx.data.stream import Skill
from dylora_mlx.distributed import group as ranks
from dylora_mlx.errors import Failure
from dylora_mlx.growth import phases as maturity
from dylora_mlx.growth.decide import policy
from dylora_mlx.growth.decide.policy import Decision, Situation
from dylora_mlx.growth.library import Entry
from dylora_mlx.growth.novelty import measure as novelty
from dylora_mlx.growth.novelty import split as mixture
from dylora_mlx.growth.novelty.measure import Novelty
from dylora_mlx.growth.phases import Schedule
from dylora_mlx.growth.pool import Record
from dylora_mlx.model.routing.router import Routing
from dylora_mlx.reporting.continual import continual
from dylora_mlx.run import build as assembly
from dylora_mlx.run import folder as runs
from dylora_mlx.run import metadata as identity
from dylora_mlx.run.cost import estimate
from dylora_mlx.run.cost import tables as show
from dylora_mlx.system import console
from dylora_mlx.system import signals as interrupts
from dylora_mlx.system.files import write_json
from dylora_mlx.system.seeds import SeedStream, derived_seed
from dylora_mlx.training import failures as faults
from dylora_mlx.training import summary as display
from dylora_mlx.training import summary as report
from dylora_mlx.training.budget import parameters as budget
from dylora_mlx.training.budget import residency
from dylora_mlx.training.run import Run
from dylora_mlx.training.skill import fit_router as consolidate
from dylora_mlx.training.skill import outcome
from dylora_mlx.training.skill import replay as recall
from dylora_mlx.training.skill import split_skill as arrival
from dylora_mlx.training.skill.base_pass import Study, examine
from dylora_mlx.training.skill.learn import learn
from dylora_mlx.training.skill.probe import Probe
from dylora_mlx.training.skill.refine import refine
from dylora_mlx.training.step.evaluate import Evaluation, evaluate


def learn_stream(run: Run, estimated: bool = False) -> None:
    """The whole of a run: every skill that is left, and what is said at the end. estimated: say first what it will take.

    Raises Failure for what nobody did wrong, Interrupted when a signal asked to leave; the run can be resumed after both.
    """
    started = time.perf_counter()
    with interrupts.heard(), faults.told(run):
        if estimated:
            foresee(run)
        run.clock.start()
        train(run)
        finish(run)
    console.say(f"took {time.perf_counter() - started:.0f} s")


def foresee(run: Run) -> None:
    """Say what the run will take, and keep it for its end."""
    run.estimate = estimate.estimate(run)
    show.estimate(run.estimate)
    console.event("estimate", **run.estimate)


def train(run: Run) -> None:
    """The loop over the stream."""
    if not run.state.matrix:
        start(run)
    elif new := {name: domain for name, domain in run.domains.items() if name not in run.state.matrix[-1]}:
        arrival.enter(run, new)
    while run.state.skill < len(run.skills):
        skill, frozen = run.skills[run.state.skill], run.pool.frozen_hashes()
        with run.clock.on("reading"):
            study = examine(run.model, skill, run.config, run.features / f"{skill.name}.npy")
        if run.state.decision is None:
            with run.clock.on("decisions"):
                if arrival.split(run, skill, study):
                    continue
                decision = decide(run, skill, study)
            run.state.decision = decision.record()
            record(run, decision)
            frozen = run.pool.frozen_hashes()  # merging and evicting may have changed them
            if decision.creates:
                grow(run, skill, study)
        evaluated = follow(run, skill, study)
        settle(run, skill, study, frozen, evaluated)
        run.state.next_skill()
        runs.save(run)
        ranks.group().check(faults.left(run))


def start(run: Run) -> None:
    """Before the first skill: the base's own losses, and what it knows as the library's first entry."""
    if run.known is not None:
        with run.clock.on("reading"):
            run.library.add(assembly.first_entry(run))
    baseline = run.evaluate(now=Schedule("mature", None, 1.0))
    run.state.matrix.append({name: found.loss for name, found in baseline.items()})
    run.record.log(0, {f"eval_{name}_loss": found.loss for name, found in baseline.items()})
    runs.save(run)


def decide(run: Run, skill: Skill, study: Study) -> Decision:
    """Measure the skill's novelty, ask the policy, and make room if it wants an expert."""
    growth, state, started = run.config.growth, run.state, time.perf_counter()
    seen = novelty.measure(study.means, run.library, run.space, growth, run.config.seed)
    seen = Novelty(*ranks.group().first(seen))  # as rank 0 has it: what is asked for below depends on it
    since = None if state.last_creation is None else state.step - state.last_creation
    seed = derived_seed(run.config.seed, SeedStream.DECISION, state.skill)
    situation = Situation(
        skill.name, seen, skill.train.tokens, run.library.experts_of, len(run.pool), since, seed, *run.learned
    )
    evidence = Probe(run, skill, study)
    decision = policy.decide(situation, growth, evidence)
    if decision.creates and (why := budget.make_room(run, run.rank(skill)[0])):
        decision = policy.withheld(decision, Probe(run, skill, study).existing().best, why)
    elif decision.creates:
        decision = replace(decision, expert=len(run.pool) + 1)
    documents = mixture.novelty(study.means, run.library, run.space, growth)
    decision = replace(decision, seconds=time.perf_counter() - started, novel_documents=documents)
    return Decision(**ranks.group().first(decision.record()))


def record(run: Run, decision: Decision) -> None:
    """Write the decision to the ledger, the metrics and the console."""
    state = run.state
    run.ledger.write({"step": state.step, "seed": run.config.seed, **decision.record(), "outcome": None})
    console.event("decision", step=state.step, **decision.record())
    seen = {"similarity_scores_on_creation": decision.similarities} if decision.creates else {}
    run.record.log(state.step, {"skill": decision.skill, "novelty_threshold": decision.threshold, **seen})
    display.print_decision(decision, state.skill + 1, len(run.skills))


def grow(run: Run, skill: Skill, study: Study) -> None:
    """Add an expert with its gate row, and make room for it in the optimizers."""
    rank, alpha = run.rank(skill)
    if run.config.training.distillation:
        run.state.mature = recall.mature_gate(run.model)
    start = run.config.growth.ridge_start
    if start and not len(run.pool):
        run.pool.start_null_row(run.library, study.statistics)
    key = mx.random.key(derived_seed(run.config.seed, SeedStream.EXPERT_INIT, len(run.pool)))
    record, kin = Record(skill.name, rank, alpha, run.state.step), kin_of(run)
    run.pool.add(record, key, study.statistics if start else None, run.library, kin)
    training = run.config.training
    memories = [*consolidate.remembered(run.library), (study.memory, len(run.pool))]
    with run.clock.on("router"):
        before, after = consolidate.fit(run.model.router, memories, training.router_fit_steps, training.memory_tokens)
    console.say(f"  router fitted to {len(memories)} skills: cross-entropy {before:.3f} -> {after:.3f}")
    run.optimizers.init(run.model)
    run.state.last_creation = run.state.step


def kin_of(run: Run) -> list[int]:
    """The experts that a new one starts from: those nearest to its skill, as many as a token of it is routed to."""
    decision, growth = run.state.decision, run.config.growth
    assert decision is not None
    return run.library.nearest(decision["similarities"], growth.dense_experts) if growth.start == "mean" else []


def follow(run: Run, skill: Skill, study: Study) -> dict[str, Evaluation] | None:
    """Do what was decided; return the last evaluation of all domains if it is still true."""
    decision = run.state.decision
    assert decision is not None
    if decision["action"] == "create":
        with run.clock.on("steps"):
            return learn(run, skill, study, decision["expert"], runs.save)
    return refine(run, skill) if decision["action"] == "refine" else None


def settle(
    run: Run, skill: Skill, study: Study, frozen: dict[int, str], evaluated: dict[str, Evaluation] | None
) -> None:
    """Freeze a new expert, remember the skill, evaluate every domain, and check that no frozen expert has changed."""
    decision, state, growth = run.state.decision, run.state, run.config.growth
    assert decision is not None
    column = decision["expert"]
    if decision["action"] == "create":
        run.pool.freeze(column)
    elif decision["nearest"] and not decision["novel"]:
        known = run.library.find(decision["nearest"])
        known.see(study.means, decision["similarities"][known.skill], growth.moving_average)
    kept = arrival.exemplars_of(run.config, skill)
    run.library.add(Entry(skill.name, column, study.means, study.statistics, study.memory, exemplars=kept))
    now = run.pool.frozen_hashes()
    refined = decision.get("refined", {}).get("kept", False)
    if any(now[c] != before for c, before in frozen.items() if not (refined and c == column)):
        raise Failure(f"a frozen expert changed while {skill.name} was learned; the run is stopped")
    residency.put_down(run)
    evaluated = evaluated or run.evaluate()
    before = state.matrix[-1][skill.name]
    state.matrix.append({name: found.loss for name, found in evaluated.items()})
    outcome.settle(run, skill, before)
    losses = {f"eval_{name}_loss": found.loss for name, found in evaluated.items()}
    usage = {name: [round(gate, 4) for gate in found.usage] for name, found in evaluated.items()}
    settled = {"skill": skill.name, "after_skill": True, "num_experts": len(run.pool), "usage": usage}
    run.record.log(state.step, {**settled, **losses})
    with run.clock.on("report"):
        report.write_samples(run)
    run.record.tracker.pictures(state.step)
    if study.features is not None:
        study.features.delete()
    own, base = state.matrix[-1][skill.name], state.matrix[0][skill.name]
    console.say(f"  {skill.name}: {base:.3f} -> {own:.3f} ({own - base:+.3f} nats against the base)")


def finish(run: Run) -> None:
    """The matrix, the test losses, the final checkpoint, and what to do next."""
    state, settled = run.state, maturity.settled(run.config.growth)
    names = [skill.name for skill in run.skills]
    console.say("")
    display.print_loss_matrix(state.matrix, names, list(run.domains))
    summary = continual(state.matrix, names)
    display.print_continual_metrics(summary)
    experts_of = run.library.experts_of
    routed, base, own = run.evaluate(run.tests), {}, {}
    together = (run.model.adapters(1), run.measure)
    for name, domain in run.tests.items():
        routing = Routing(1, mx.array(1.0))
        with run.clock.on("evaluations"):
            base[name] = evaluate(run.model, domain, routing, 0, *together).loss
            own[name] = evaluate(run.model, domain, routing, experts_of.get(name, 0), *together).loss
    display.print_test_losses(base, {name: found.loss for name, found in routed.items()}, own, experts_of)
    results = {
        # In the domains' order: a checkpoint that was read in between has sorted them by name.
        "matrix": [{name: row[name] for name in run.domains if name in row} for row in state.matrix],
        "skills": names,
        "continual": summary._asdict(),
        "test": {n: {"base": base[n], "mixture": routed[n].loss, "own_expert": own[n]} for n in run.tests},
        "experts": run.pool.describe(),
        "steps": state.step,
    }
    if ranks.leads():
        write_json(run.folder / "results.json", results)
    runs.save(run, runs.FINAL)  # from here on the run is finished
    for passing in (run.features, run.experts):
        shutil.rmtree(passing, ignore_errors=True)
    taken = identity.describe(run, "finished")
    report.write_report(run)
    final = {f"final_eval_{name}_loss": value for name, value in state.matrix[-1].items()}
    run.record.tracker.finish({**final, **results["continual"]}, state.matrix, ["base", *names])
    created = len(run.pool)
    top_k = settled.top_k or created + 1
    routing_kind = f"top-{top_k}" if top_k <= created else "dense"
    console.say(
        f"{created} expert{'s' * (created != 1)} in {state.step} steps; routing {routing_kind}. The run is in {run.folder}"
    )
    console.say(f"in pictures: {run.folder / 'report.html'}")
    if created:
        console.say(f"next: python -m dylora_mlx.generate {run.folder} --show-experts")
        console.say(f"      python tools/export_peft.py {run.folder} --out {run.folder}-peft")
    console.event("finished", run=str(run.folder), **results)
    if run.estimate is not None:
        show.beside(run.estimate, estimate.as_decided(run, estimate.decided(run), run.estimate), taken)
        console.event("taken", **taken)
