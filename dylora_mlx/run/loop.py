"""The continual-learning loop over a stream of skills: measure novelty, decide, add an expert, train, freeze, evaluate."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace

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
from dylora_mlx.model.base import device
from dylora_mlx.reporting.continual import continual_metrics, estimate_forgetting
from dylora_mlx.run import metadata, run_folder
from dylora_mlx.run.build import base_skill_entry
from dylora_mlx.run.cost import tables
from dylora_mlx.run.cost.estimate import actual_arrivals, estimate_as_decided, estimate_run
from dylora_mlx.system import console, signals
from dylora_mlx.system.files import write_json
from dylora_mlx.system.seeds import SeedStream, derived_seed
from dylora_mlx.training import failures, final_losses, summary
from dylora_mlx.training.budget import residency
from dylora_mlx.training.budget.parameters import make_room
from dylora_mlx.training.callbacks import DecisionEvent, EvaluationEvent, SkillEvent
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.skill import outcome, queue, split_skill
from dylora_mlx.training.skill.base_pass import BasePass, run_base_pass
from dylora_mlx.training.skill.create import CreationVerdict, add_expert, best_existing_expert, train_expert
from dylora_mlx.training.skill.probe import ProbeEvidence
from dylora_mlx.training.skill.refine import RefinementVerdict, refine_expert
from dylora_mlx.training.skill.selection import Selection, select_domains


def learn_stream(run: TrainingRun, estimate_first: bool = False) -> None:
    """Learn every skill that is left, and finish the run.

    Args:
        run: a fresh or resumed run.
        estimate_first: print an estimate of time, memory and disk before the first skill.

    Raises:
        Failure: the disk or memory is full, or another rank was lost. The run can be resumed.
        Interrupted: a signal requested a stop. The run can be resumed.
    """
    started = time.perf_counter()
    with signals.defer_signals(), failures.handle_failures(run):
        if not run.state.matrix:
            summary.print_preset(run.config)
        summary.print_data(run)
        if estimate_first:
            announce_estimate(run)
        run.timers.start()
        train_stream(run)
        finish_run(run)
    console.info(f"took {time.perf_counter() - started:.0f} s")


def announce_estimate(run: TrainingRun) -> None:
    """Estimate the run's time, memory and disk, print it, and keep it for the comparison at the end of the run."""
    run.estimate = estimate_run(run)
    tables.print_estimate(run.estimate)
    console.event("estimate", **run.estimate)


def train_stream(run: TrainingRun) -> None:
    """Learn the remaining skills of the stream one after the other, with a checkpoint after each."""
    if not run.state.matrix:
        measure_base(run)
    elif new := {name: domain for name, domain in run.domains.items() if name not in run.state.matrix[0]}:
        split_skill.add_domains(run, new)
    while run.state.skill_index < len(run.skills):
        if run.state.decision is None:
            queue.next_in_line(run)
        skill, frozen = run.skills[run.state.skill_index], run.pool.frozen_hashes()
        with run.timers.time("reading"):
            base_pass = run_base_pass(run.model, skill, run.config, run.features_folder / f"{skill.name}.npy")
        decision = run.state.decision  # already there if the run was stopped while this skill was learned
        if decision is None:
            with run.timers.time("decisions"):
                if split_skill.split_if_mixed(run, skill, base_pass):
                    continue
                run.select(None)  # until the decision is made: making room may harm any domain
                measure_arrival(run, skill)
                decision = decide_action(run, skill, base_pass)
                if queue.postpone(run, skill, decision):
                    run_folder.save_checkpoint(run)
                    continue
                run.state.decision = decision
            log_decision(run, decision)
            frozen = run.pool.frozen_hashes()  # merging and evicting may have changed them
            if decision.creates:
                add_expert(run, skill, base_pass, decision)
        selection = select_domains(run, skill, decision)
        run.select(None if selection is None else selection.names)
        device.release_freed_memory()  # of reading and fitting: steps need buffers of other sizes
        verdict = execute_decision(run, skill, base_pass, decision)
        finish_skill(run, skill, base_pass, decision, verdict, frozen, selection)
        run.state.next_skill()
        run_folder.save_checkpoint(run)
        world().raise_if_stop_requested(failures.resume_hint(run.folder, run.state))


def measure_base(run: TrainingRun) -> None:
    """Evaluate the base before the first skill, as row 0 of the loss matrix, and add the base skill to the library."""
    if run.base_skill is not None:
        with run.timers.time("reading"):
            run.library.add(base_skill_entry(run.config, run.model, run.base_skill))
    baseline = run.evaluate(schedule=RoutingSchedule("mature", None, 1.0))
    run.state.matrix.append({name: evaluation.loss for name, evaluation in baseline.items()})
    run.metrics.log(0, {f"eval_{name}_loss": loss for name, loss in run.state.matrix[0].items()})
    run.callbacks.on_evaluation(EvaluationEvent(0, None, dict(run.state.matrix[0]), True))
    run_folder.save_checkpoint(run)


def measure_arrival(run: TrainingRun, skill: Skill) -> None:
    """Evaluate a skill that arrives, unless the evaluation after the last skill has: `eval.total_tokens` may leave it out."""
    if skill.name not in run.state.matrix[-1]:
        evaluated = run.evaluate({skill.name: run.domains[skill.name]})
        run.state.matrix[-1][skill.name] = evaluated[skill.name].loss


def decide_action(run: TrainingRun, skill: Skill, base_pass: BasePass) -> Decision:
    """Measure the skill's novelty, let the policy decide, and make room in the parameter budget for a new expert.

    Returns rank 0's decision on all ranks.
    """
    growth, state, started = run.config.growth, run.state, time.perf_counter()
    novelty = measure_novelty(base_pass.means, run.library, run.space, growth, run.config.seed)
    # All ranks use rank 0's numbers: which evidence is measured below depends on them, and all ranks must measure the same.
    novelty = Novelty(*world().broadcast_object(novelty))
    # The cooldown ends with the stream: a skill that is still waiting then would wait for ever.
    created = None if queue.nothing_else_trains(run) else state.last_creation
    steps_since_creation = None if created is None else state.step - created
    seed = derived_seed(run.config.seed, SeedStream.DECISION, state.skill_index)
    situation = Situation(
        skill.name,
        novelty,
        skill.train.num_tokens,
        run.library.experts_of,
        len(run.pool),
        steps_since_creation,
        seed,
        *run.bandit,
    )
    decision = policy.decide(situation, growth, ProbeEvidence(run, skill, base_pass, novelty.similarities))
    if decision.creates and (refusal := make_room(run, run.expert_rank(skill)[0])):
        decision = policy.withhold(decision, best_existing_expert(run, skill, decision), refusal)
    elif decision.novel and not decision.creates:
        # The library must not say that an expert holds what it does not know: the best by loss serves the skill.
        why = policy.why_withheld(decision.num_experts, decision.cooldown_left, growth)
        decision = policy.withhold(decision, best_existing_expert(run, skill, decision), why)
    elif decision.creates:
        decision = replace(decision, expert=len(run.pool) + 1)
    fraction = novel_fraction(base_pass.means, run.library, run.space, growth)
    decision = replace(decision, seconds=time.perf_counter() - started, novel_documents=fraction)
    return Decision.from_json(world().broadcast_object(decision.to_json()))


def log_decision(run: TrainingRun, decision: Decision) -> None:
    """Write the decision to decisions.jsonl, to the metrics and to the console. Its outcome is added by `finish_skill`."""
    state, values = run.state, decision.to_json()
    run.log.append({"step": state.step, "seed": run.config.seed, **values, "outcome": None})
    console.event("decision", step=state.step, **values)
    scores = {"similarity_scores_on_creation": decision.similarities} if decision.creates else {}
    run.metrics.log(state.step, {"skill": decision.skill, "novelty_threshold": decision.threshold, **scores})
    summary.print_decision(decision, state.skill_index + 1, len(run.skills))
    run.callbacks.on_decision(DecisionEvent(state.step, decision))


def execute_decision(
    run: TrainingRun, skill: Skill, base_pass: BasePass, decision: Decision
) -> CreationVerdict | RefinementVerdict | None:
    """Carry out the decision: train the new expert, refine the matched one, or change nothing.

    Returns the verdict on what was trained, None if nothing was.
    """
    if decision.creates:
        return train_expert(run, skill, base_pass, decision, run_folder.save_checkpoint)
    return refine_expert(run, skill, decision.expert) if decision.action == "refine" else None


def finish_skill(
    run: TrainingRun,
    skill: Skill,
    base_pass: BasePass,
    decision: Decision,
    verdict: CreationVerdict | RefinementVerdict | None,
    frozen: dict[int, str],
    selection: Selection | None,
) -> None:
    """Add the skill to the library, evaluate the selected domains, and record the outcome.

    Args:
        verdict: verdict on a new expert or a refinement.
        frozen: hashes of the frozen experts before the skill was learned, by expert_id.
        selection: the domains to evaluate; None for all.

    Raises:
        Failure: a frozen expert has changed, other than one whose refinement was accepted.
    """
    state, expert_id = run.state, decision.expert
    if isinstance(verdict, CreationVerdict) and not verdict.kept:
        expert_id = best_existing_expert(run, skill, decision)
    elif not decision.creates and decision.nearest and not decision.novel:
        run.library.record_known(decision.nearest, expert_id, base_pass.means, run.config.growth.moving_average)
    run.library.add(
        LibraryEntry(
            skill.name, expert_id, base_pass.means, base_pass.statistics, base_pass.memory,
            exemplars=split_skill.skill_exemplars(run.config, skill), format=str(skill.format),
        )
    )  # fmt: skip
    allowed = {expert_id} if isinstance(verdict, RefinementVerdict) and verdict.kept else set()
    hashes = run.pool.frozen_hashes()
    if any(hashes[frozen_id] != old_hash for frozen_id, old_hash in frozen.items() if frozen_id not in allowed):
        raise Failure(f"a frozen expert changed while {skill.name} was learned; the run is stopped")
    residency.offload_frozen(run)
    evaluated = run.evaluate()
    loss_before = state.matrix[-1][skill.name]
    state.matrix.append({name: evaluation.loss for name, evaluation in evaluated.items()})
    outcome.record_outcome(run, skill, decision, verdict, expert_id, loss_before)
    losses = {f"eval_{name}_loss": evaluation.loss for name, evaluation in evaluated.items()}
    usage = {name: listed_gates(evaluation.usage) for name, evaluation in evaluated.items()}
    record = {"skill": skill.name, "after_skill": True, "num_experts": len(run.pool), "usage": usage}
    if selection is not None:
        record |= log_forgetting(run, selection)
    run.metrics.log(state.step, {**record, **losses})
    run.callbacks.on_evaluation(EvaluationEvent(state.step, skill.name, dict(state.matrix[-1]), True))
    if summary.report_is_due(run) or state.skill_index + 1 == len(run.skills):
        with run.timers.time("report"):
            summary.write_samples(run)
    run.metrics.trackers.log_charts(state.step)
    # The feature cache serves this skill only.
    if base_pass.features is not None:
        base_pass.features.delete()
    loss, base_loss = state.matrix[-1][skill.name], state.matrix[0][skill.name]
    console.info(f"  {skill.name}: {base_loss:.3f} -> {loss:.3f} ({loss - base_loss:+.3f} nats against the base)")
    run.callbacks.on_skill(SkillEvent(state.step, skill.name, decision.action, expert_id, base_loss, loss))


MAX_COLUMNS = 64
"""Largest number of gates that metrics.jsonl lists in full; of more, those that matter."""


def listed_gates(usage: list[float]) -> list[float] | dict[str, float]:
    """Return the mean gates of all experts, or of a large pool a dict with those of at least 0.001."""
    if len(usage) <= MAX_COLUMNS:
        return [round(gate, 4) for gate in usage]
    return {str(expert_id): round(gate, 4) for expert_id, gate in enumerate(usage) if gate >= 0.001}


def log_forgetting(run: TrainingRun, selection: Selection) -> dict[str, float | int]:
    """Print and return the estimate of forgetting after a skill of which only a selection of domains was evaluated."""
    learned = [skill.name for skill in run.skills[: run.state.skill_index + 1]]
    estimate = estimate_forgetting(run.state.matrix, learned, selection.sample)
    console.detail(
        f"  evaluated {len(selection.names)} of {len(run.domains)} domains (eval.total_tokens); forgetting over all skills "
        f"{estimate.mean:+.4f} ({estimate.low:+.4f} to {estimate.high:+.4f})"
    )
    figures = {"forgetting": estimate.mean, "forgetting_low": estimate.low, "forgetting_high": estimate.high}
    return {**figures, "evaluated_domains": len(selection.names)}


def finish_run(run: TrainingRun) -> None:
    """Print the loss matrix and the test losses, write results.json, the final checkpoint and the report, and end the log."""
    state, settled = run.state, phases.final_schedule(run.config.growth)
    names = [skill.name for skill in run.skills]
    run.select(None)
    state.matrix[-1] |= {name: evaluation.loss for name, evaluation in run.evaluate().items()}
    continual = continual_metrics(state.matrix, names)
    validation, test = final_losses.validation_losses(run), final_losses.test_losses(run)
    full = final_losses.full_validation_losses(run) if run.config.eval.full else {}
    console.info("")
    if console.is_verbose():
        summary.print_loss_matrix(state.matrix, names, validation)
    else:
        summary.print_outcome(state.matrix, names, validation, test, run.library.experts_of)
    summary.print_continual_metrics(continual)
    if full:
        summary.print_losses("validation loss on all documents (nats per token)", full, run.library.experts_of)
    if console.is_verbose():
        summary.print_losses("test loss (nats per token)", test, run.library.experts_of)
    if not run.config.eval.full and not all(d.is_complete for d in (*run.domains.values(), *run.tests.values())):
        console.info("--eval.full true evaluates all documents at the end of a run")
    results = {
        # In the order of the domains: a checkpoint sorts them by name, so a resumed run would differ here.
        "matrix": [{name: row[name] for name in run.domains if name in row} for row in state.matrix],
        "skills": names,
        "continual": continual._asdict(),
        "validation": {name: losses.to_json() for name, losses in validation.items()},
        **({"validation_full": {name: losses.to_json() for name, losses in full.items()}} if full else {}),
        "test": {name: losses.to_json() for name, losses in test.items()},
        "experts": run.pool.describe(),
        "steps": state.step,
    }
    if is_main_process():
        write_json(run.folder / "results.json", results)
    run_folder.save_checkpoint(run, run_folder.FINAL)  # with this checkpoint the run counts as finished
    for temporary in (run.features_folder, run.experts_folder):
        shutil.rmtree(temporary, ignore_errors=True)
    resources = metadata.write_metadata(run, "finished")
    summary.write_report(run)
    final = {f"final_eval_{name}_loss": value for name, value in state.matrix[-1].items()}
    run.metrics.trackers.finish({**final, **results["continual"]}, state.matrix, ["base", *names])
    created = len(run.pool)
    top_k = settled.top_k or created + 1
    routing_kind = f"top-{top_k}" if top_k <= created else "dense"
    console.info(
        f"{created} expert{'s' * (created != 1)} in {state.step} steps; routing {routing_kind}. The run is in {run.folder}"
    )
    console.info(f"in pictures: {run.folder / 'report.html'}; in words: dylora explain {run.folder}")
    if created:
        console.info(f"next: python -m dylora_mlx.generate {run.folder} --show-experts")
        console.info(f"      dylora export {run.folder} --out {run.folder}-peft")
    console.event("finished", run=str(run.folder), **results)
    if run.estimate is not None:
        tables.print_comparison(
            run.estimate, estimate_as_decided(run, actual_arrivals(run.folder, run.skills), run.estimate), resources
        )
        console.event("resources", **resources)
