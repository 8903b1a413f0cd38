"""The loop over a stream of skills: measure novelty, decide, grow, learn, freeze, evaluate."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx

from dylora_mlx.data.stream import Skill
from dylora_mlx.distributed.group import is_main_process, world
from dylora_mlx.errors import Failure
from dylora_mlx.growth import phases
from dylora_mlx.growth.decide import policy
from dylora_mlx.growth.decide.policy import Decision, Situation
from dylora_mlx.growth.library import LibraryEntry
from dylora_mlx.growth.novelty.measure import Novelty, measure_novelty
from dylora_mlx.growth.novelty.split import novel_fraction
from dylora_mlx.growth.phases import RoutingSchedule
from dylora_mlx.growth.pool import ExpertRecord
from dylora_mlx.model.routing.router import forced_routing
from dylora_mlx.reporting.continual import continual_metrics
from dylora_mlx.run import metadata, run_folder
from dylora_mlx.run.build import base_skill_entry
from dylora_mlx.run.cost import tables
from dylora_mlx.run.cost.estimate import actual_arrivals, estimate_as_decided, estimate_run
from dylora_mlx.system import console, signals
from dylora_mlx.system.files import write_json
from dylora_mlx.system.seeds import SeedStream, derived_seed
from dylora_mlx.training import failures, summary
from dylora_mlx.training.budget import residency
from dylora_mlx.training.budget.parameters import make_room
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.skill import fit_router, outcome, split_skill
from dylora_mlx.training.skill.base_pass import BasePass, run_base_pass
from dylora_mlx.training.skill.learn import learn_skill
from dylora_mlx.training.skill.probe import ProbeEvidence
from dylora_mlx.training.skill.refine import RefinementVerdict, refine_expert
from dylora_mlx.training.skill.replay import copy_gate
from dylora_mlx.training.step.evaluate import Evaluation, evaluate


class SkillResult(NamedTuple):
    """What learning a skill came to."""

    evaluated: dict[str, Evaluation] | None
    """The last evaluation of all domains, None where it no longer holds."""
    refined: RefinementVerdict | None = None


def learn_stream(run: TrainingRun, estimate_first: bool = False) -> None:
    """Learn every skill that is left, and finish the run. estimate_first: print what it will take before it starts.

    Raises Failure for what nobody did wrong, Interrupted when a signal asked to stop. The run can be resumed after both.
    """
    started = time.perf_counter()
    with signals.defer_signals(), failures.handle_failures(run):
        if estimate_first:
            announce_estimate(run)
        run.timers.start()
        train_stream(run)
        finish_run(run)
    console.info(f"took {time.perf_counter() - started:.0f} s")


def announce_estimate(run: TrainingRun) -> None:
    """Print what the run will take, and keep it for the comparison at its end."""
    run.estimate = estimate_run(run)
    tables.print_estimate(run.estimate)
    console.event("estimate", **run.estimate)


def train_stream(run: TrainingRun) -> None:
    """The loop over the stream of skills."""
    if not run.state.matrix:
        measure_base(run)
    elif new := {name: domain for name, domain in run.domains.items() if name not in run.state.matrix[-1]}:
        split_skill.add_domains(run, new)
    while run.state.skill_index < len(run.skills):
        skill, frozen = run.skills[run.state.skill_index], run.pool.frozen_hashes()
        with run.timers.time("reading"):
            base_pass = run_base_pass(run.model, skill, run.config, run.features_folder / f"{skill.name}.npy")
        decision = run.state.decision  # made already if the run was stopped while this skill was learned
        if decision is None:
            with run.timers.time("decisions"):
                if split_skill.split_if_mixed(run, skill, base_pass):
                    continue
                decision = run.state.decision = decide_action(run, skill, base_pass)
            log_decision(run, decision)
            frozen = run.pool.frozen_hashes()  # merging and evicting may have changed them
            if decision.creates:
                add_expert(run, skill, base_pass, decision)
        result = execute_decision(run, skill, base_pass, decision)
        finish_skill(run, skill, base_pass, decision, result, frozen)
        run.state.next_skill()
        run_folder.save_checkpoint(run)
        world().raise_if_stop_requested(failures.resume_hint(run.folder, run.state))


def measure_base(run: TrainingRun) -> None:
    """Before the first skill: the base's own losses, and what it knows as the library's first entry."""
    if run.base_skill is not None:
        with run.timers.time("reading"):
            run.library.add(base_skill_entry(run.config, run.model, run.base_skill))
    baseline = run.evaluate(schedule=RoutingSchedule("mature", None, 1.0))
    run.state.matrix.append({name: found.loss for name, found in baseline.items()})
    run.metrics.log(0, {f"eval_{name}_loss": found.loss for name, found in baseline.items()})
    run_folder.save_checkpoint(run)


def decide_action(run: TrainingRun, skill: Skill, base_pass: BasePass) -> Decision:
    """Measure the skill's novelty, ask the policy, and make room in the budget if it wants an expert."""
    growth, state, started = run.config.growth, run.state, time.perf_counter()
    measured = measure_novelty(base_pass.means, run.library, run.space, growth, run.config.seed)
    # All ranks go on with rank 0's numbers: which evidence is measured below depends on them.
    measured = Novelty(*world().broadcast_object(measured))
    since = None if state.last_creation is None else state.step - state.last_creation
    seed = derived_seed(run.config.seed, SeedStream.DECISION, state.skill_index)
    situation = Situation(
        skill.name, measured, skill.train.num_tokens, run.library.experts_of, len(run.pool), since, seed, *run.bandit
    )
    decision = policy.decide(situation, growth, ProbeEvidence(run, skill, base_pass))
    if decision.creates and (why := make_room(run, run.expert_rank(skill)[0])):
        # Merging may have changed the pool: measure what exists again.
        decision = policy.withhold(decision, ProbeEvidence(run, skill, base_pass).existing().best, why)
    elif decision.creates:
        decision = replace(decision, expert=len(run.pool) + 1)
    documents = novel_fraction(base_pass.means, run.library, run.space, growth)
    decision = replace(decision, seconds=time.perf_counter() - started, novel_documents=documents)
    return Decision.from_json(world().broadcast_object(decision.to_json()))


def log_decision(run: TrainingRun, decision: Decision) -> None:
    """Write the decision to decisions.jsonl, to the metrics and to the console."""
    state, values = run.state, decision.to_json()
    run.log.append({"step": state.step, "seed": run.config.seed, **values, "outcome": None})
    console.event("decision", step=state.step, **values)
    scores = {"similarity_scores_on_creation": decision.similarities} if decision.creates else {}
    run.metrics.log(state.step, {"skill": decision.skill, "novelty_threshold": decision.threshold, **scores})
    summary.print_decision(decision, state.skill_index + 1, len(run.skills))


def add_expert(run: TrainingRun, skill: Skill, base_pass: BasePass, decision: Decision) -> None:
    """Add an expert and its gate row, fit the router to all memories, and make room in the optimizers."""
    config, growth, training = run.config, run.config.growth, run.config.training
    rank, alpha = run.expert_rank(skill)
    if training.distillation_coef:
        run.state.teacher_gate = copy_gate(run.model)
    if growth.ridge_start and not len(run.pool):
        run.pool.init_null_row(run.library, base_pass.statistics)
    nearest: list[int] = []
    if growth.expert_init == "mean":  # as many as a token is routed to while routing is dense
        nearest = run.library.nearest_experts(decision.similarities, growth.dense_experts)
    key = mx.random.key(derived_seed(config.seed, SeedStream.EXPERT_INIT, len(run.pool)))
    record, statistics = ExpertRecord(skill.name, rank, alpha, run.state.step), base_pass.statistics
    run.pool.add(record, key, statistics if growth.ridge_start else None, run.library, nearest)
    memories = [*fit_router.remembered_features(run.library), (base_pass.memory, len(run.pool))]
    with run.timers.time("router"):
        before, after = fit_router.fit(run.model.router, memories, training.router_fit_steps, training.memory_tokens)
    console.info(f"  router fitted to {len(memories)} skills: cross-entropy {before:.3f} -> {after:.3f}")
    run.optimizers.init(run.model)
    run.state.last_creation = run.state.step


def execute_decision(run: TrainingRun, skill: Skill, base_pass: BasePass, decision: Decision) -> SkillResult:
    """Train the new expert, refine the matched one, or leave all as it is."""
    if decision.creates:
        with run.timers.time("steps"):
            return SkillResult(learn_skill(run, skill, base_pass, decision.expert, run_folder.save_checkpoint))
    if decision.action == "refine":
        return SkillResult(*refine_expert(run, skill, decision.expert))
    return SkillResult(None)


def finish_skill(
    run: TrainingRun,
    skill: Skill,
    base_pass: BasePass,
    decision: Decision,
    result: SkillResult,
    frozen: dict[int, str],
) -> None:
    """Freeze a new expert, remember the skill, evaluate every domain, and check that no frozen expert has changed.

    frozen: hashes of the frozen experts before the skill was learned, by id.
    """
    state, expert_id = run.state, decision.expert
    if decision.creates:
        run.pool.freeze(expert_id)
    elif decision.nearest and not decision.novel:
        known = run.library.find(decision.nearest)
        known.record_arrival(base_pass.means, decision.similarities[known.skill], run.config.growth.moving_average)
    run.library.add(
        LibraryEntry(
            skill.name, expert_id, base_pass.means, base_pass.statistics, base_pass.memory,
            exemplars=split_skill.skill_exemplars(run.config, skill),
        )
    )  # fmt: skip
    allowed = {expert_id} if result.refined is not None and result.refined.kept else set()
    now = run.pool.frozen_hashes()
    if any(now[each] != before for each, before in frozen.items() if each not in allowed):
        raise Failure(f"a frozen expert changed while {skill.name} was learned; the run is stopped")
    residency.offload_frozen(run)
    evaluated = result.evaluated or run.evaluate()
    loss_before = state.matrix[-1][skill.name]
    state.matrix.append({name: found.loss for name, found in evaluated.items()})
    outcome.record_outcome(run, skill, decision, result.refined, loss_before)
    losses = {f"eval_{name}_loss": found.loss for name, found in evaluated.items()}
    usage = {name: [round(gate, 4) for gate in found.usage] for name, found in evaluated.items()}
    record = {"skill": skill.name, "after_skill": True, "num_experts": len(run.pool), "usage": usage}
    run.metrics.log(state.step, {**record, **losses})
    with run.timers.time("report"):
        summary.write_samples(run)
    run.metrics.tracker.log_charts(state.step)
    if base_pass.features is not None:
        base_pass.features.delete()
    own, base = state.matrix[-1][skill.name], state.matrix[0][skill.name]
    console.info(f"  {skill.name}: {base:.3f} -> {own:.3f} ({own - base:+.3f} nats against the base)")


def finish_run(run: TrainingRun) -> None:
    """The matrix, the test losses, the final checkpoint, and what to do next."""
    state, settled = run.state, phases.final_schedule(run.config.growth)
    names = [skill.name for skill in run.skills]
    console.info("")
    summary.print_loss_matrix(state.matrix, names, list(run.domains))
    continual = continual_metrics(state.matrix, names)
    summary.print_continual_metrics(continual)
    experts_of = run.library.experts_of
    routed, base, own = run.evaluate(run.tests), {}, {}
    together = (run.model.adapters(1), run.evaluator)
    for name, domain in run.tests.items():
        routing = forced_routing()
        with run.timers.time("evaluations"):
            base[name] = evaluate(run.model, domain, routing, 0, *together).loss
            own[name] = evaluate(run.model, domain, routing, experts_of.get(name, 0), *together).loss
    summary.print_test_losses(base, {name: found.loss for name, found in routed.items()}, own, experts_of)
    results = {
        # In the domains' order: a checkpoint that was read in between has sorted them by name.
        "matrix": [{name: row[name] for name in run.domains if name in row} for row in state.matrix],
        "skills": names,
        "continual": continual._asdict(),
        "test": {n: {"base": base[n], "mixture": routed[n].loss, "own_expert": own[n]} for n in run.tests},
        "experts": run.pool.describe(),
        "steps": state.step,
    }
    if is_main_process():
        write_json(run.folder / "results.json", results)
    run_folder.save_checkpoint(run, run_folder.FINAL)  # from here on the run is finished
    for passing in (run.features_folder, run.experts_folder):
        shutil.rmtree(passing, ignore_errors=True)
    taken = metadata.write_metadata(run, "finished")
    summary.write_report(run)
    final = {f"final_eval_{name}_loss": value for name, value in state.matrix[-1].items()}
    run.metrics.tracker.finish({**final, **results["continual"]}, state.matrix, ["base", *names])
    created = len(run.pool)
    top_k = settled.top_k or created + 1
    routing_kind = f"top-{top_k}" if top_k <= created else "dense"
    console.info(
        f"{created} expert{'s' * (created != 1)} in {state.step} steps; routing {routing_kind}. The run is in {run.folder}"
    )
    console.info(f"in pictures: {run.folder / 'report.html'}")
    if created:
        console.info(f"next: python -m dylora_mlx.generate {run.folder} --show-experts")
        console.info(f"      dylora export {run.folder} --out {run.folder}-peft")
    console.event("finished", run=str(run.folder), **results)
    if run.estimate is not None:
        tables.print_comparison(
            run.estimate, estimate_as_decided(run, actual_arrivals(run.folder, run.skills), run.estimate), taken
        )
        console.event("resources", **taken)
