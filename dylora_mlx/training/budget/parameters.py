"""Enforce the limits on parameters (growth.budget).

Before an expert is created, experts are merged, and then the least used ones are evicted, until the new one fits. A
merge or eviction that harms any domain is undone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx.config import Config, GrowthConfig, Source
from dylora_mlx.data.stream import Split
from dylora_mlx.distributed.group import world
from dylora_mlx.errors import UserError
from dylora_mlx.growth import merge
from dylora_mlx.growth.decide.decision_log import DecisionLog
from dylora_mlx.growth.pool import ExpertRecord, Pool
from dylora_mlx.model.routing.router import GateRow
from dylora_mlx.system import console
from dylora_mlx.system.seeds import SeedStream, derived_seed
from dylora_mlx.training.budget import archive
from dylora_mlx.training.checkpoint.state import TrainerState
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.skill import fit_router, solo
from dylora_mlx.training.skill.snapshot import restore_snapshot, take_snapshot
from dylora_mlx.training.step.evaluate import Evaluation
from dylora_mlx.training.weight_sync import sync_weights

Change = Callable[[TrainingRun, list[int]], tuple[dict[int, int], dict]]
"""A function that changes the pool. Returns {old: new} expert ids and the details to log."""


class Removal(NamedTuple):
    """One attempt to remove experts. Its fields are logged to decisions.jsonl."""

    action: str
    """merge or evict."""
    experts: list[int]
    """The experts' ids before the attempt."""
    kept: bool
    """Whether the change was accepted. If not, it was undone."""
    worst_domain: str
    """The domain whose loss rose most."""
    worst_rise: float
    """Rise of that domain's loss, in nats a token."""
    saved: int
    """Adapter parameters that the change saves."""
    expert_ids: dict[int, int]
    """{old: new} expert ids if the change was accepted, else empty."""
    details: dict
    """Action-specific details, the seconds it took, and the archive's name."""


def check_budget(growth: GrowthConfig, pool: Pool, skills: list[Source], rank: int) -> None:
    """Raise UserError before any training if a limit is too small for a single expert of some skill."""
    # An expert always trains with two gate rows at least, the null expert's and its own: weights and one bias each.
    gate_parameters = 2 * (pool.model.base.args.hidden_size + 1)
    for source in skills:
        size = pool.expert_parameters(source.rank or rank)
        for name, cap, needed in (
            ("adapters", growth.budget.adapters, size),
            ("trainable", growth.budget.trainable, size + gate_parameters),
        ):
            if cap is not None and needed > cap:
                raise UserError(
                    f"growth.budget.{name}: {cap} parameters cannot hold one expert of rank {source.rank or rank} for "
                    f"skill '{source.name}', which takes {needed}; raise the cap or lower the rank"
                )


def make_room(run: TrainingRun, rank: int) -> str:
    """Merge or evict experts until one more of this rank fits into the budget.

    Returns an empty string on success, else the reason why the expert does not fit.
    """
    budget, needed = run.config.growth.budget, run.pool.expert_parameters(rank)
    # Gate rows of the null expert, the existing experts and the new one. All of them are trained.
    gate_parameters = (len(run.pool) + 2) * (run.model.base.args.hidden_size + 1)
    if budget.trainable is not None and needed + gate_parameters > budget.trainable:
        return f"it would train {needed + gate_parameters} parameters and growth.budget.trainable is {budget.trainable}"
    while budget.adapters is not None and run.pool.num_parameters() + needed > budget.adapters:
        if not (_merge_nearest(run) or _evict_least_used(run)):
            return (
                f"{run.pool.num_parameters()} + {needed} parameters exceed growth.budget.adapters, {budget.adapters}, "
                "and no expert can be merged or evicted without harm"
            )
    return ""


def mean_usage(evaluated: dict[str, Evaluation]) -> np.ndarray:
    """Return the mean gate of every expert, float64 [experts], with equal weight for every domain. The null expert is
    left out, so index i is expert i + 1."""
    return np.mean([evaluation.usage for evaluation in evaluated.values()], axis=0)[1:]


def _merge_nearest(run: TrainingRun) -> bool:
    """Merge the little-used experts whose updates are nearest to each other; return whether a merge was accepted.

    Candidates are the experts at or below growth.budget.low_usage times the mean usage, or all experts if fewer than
    two are. Groups of nearby candidates are tried in order of their mean distance.
    """
    growth, before = run.config.growth, run.evaluate()
    usage = mean_usage(before)
    candidates = [i for i in range(len(usage)) if usage[i] <= growth.budget.low_usage * usage.mean()]
    candidates = candidates if len(candidates) > 1 else list(range(len(usage)))
    distance = merge.distances(run.model.experts)
    groups = [g for g in merge.clusters(distance, candidates, growth.budget.merge_distance) if len(g) > 1]
    groups.sort(key=lambda group: distance[np.ix_(group, group)].sum() / (len(group) * (len(group) - 1)))
    # Usage and distances may differ in the last bits between ranks. All ranks must try the same groups in the same
    # order.
    groups = world().broadcast_object([[int(i) for i in group] for group in groups])
    return any(_try_removal(run, "merge", [i + 1 for i in group], before, _merge).kept for group in groups)


def _evict_least_used(run: TrainingRun) -> bool:
    """Evict the least used expert whose removal is accepted; return whether there was one."""
    before = run.evaluate()
    order = np.argsort(mean_usage(before), kind="stable")
    ranked = world().broadcast_object(order.tolist())
    return any(_try_removal(run, "evict", [i + 1], before, _evict).kept for i in ranked)


def try_hand_over(run: TrainingRun, expert_id: int, heir: int, before: dict[str, Evaluation]) -> Removal:
    """Remove an expert and give its skills to another one (0: the base), unless a domain loses more than growth.epsilon
    against `before`, the evaluations that losses are compared with.

    The attempt is logged and a removed expert is archived, as for a budget.
    """

    def hand_over(run: TrainingRun, experts: list[int]) -> tuple[dict[int, int], dict]:
        orphans = [entry for entry in run.library.entries if entry.expert in experts]
        for entry in orphans:
            entry.expert = heir
        expert_ids = run.pool.remove(experts)
        run.library.renumber_experts(expert_ids)
        _refit_router(run)
        return expert_ids, {"heirs": {entry.skill: expert_ids[heir] for entry in orphans}}

    return _try_removal(run, "evict", [expert_id], before, hand_over, "as another serves its skills")


def _try_removal(
    run: TrainingRun,
    action: str,
    experts: list[int],
    before: dict[str, Evaluation],
    change: Change,
    why: str = "to keep the budget",
) -> Removal:
    """Change the pool, and undo the change if the loss of any domain rises by more than growth.epsilon.

    Skills to come have no vote, not even the one that room is made for: no expert holds them yet.

    Either way the attempt is logged, with the reason for it.
    """
    start_time, snapshot, size = time.perf_counter(), take_snapshot(run), run.pool.num_parameters()
    skills = [run.pool.records[expert_id - 1].skill for expert_id in experts]
    # Before the change, which takes the experts out of the model and renumbers the others.
    folder = archive.store(run, experts, action)
    expert_ids, details = change(run, experts)
    after = run.evaluate()
    to_come = {skill.name for skill in run.skills[run.state.skill_index :]}
    rise = {name: after[name].loss - result.loss for name, result in before.items() if name not in to_come}
    worst_domain = max(rise, key=lambda name: rise[name])
    accepted = rise[worst_domain] <= run.config.growth.epsilon
    saved = size - run.pool.num_parameters()
    if not accepted:
        restore_snapshot(run, snapshot)
        archive.drop(folder)
    details |= {"seconds": time.perf_counter() - start_time, "archive": folder.name if accepted else None}
    result = Removal(
        action, experts, accepted, worst_domain, rise[worst_domain], saved, expert_ids if accepted else {}, details
    )
    _log_removal(run.config, run.state, run.log, result, skills, why)
    return result


def _merge(run: TrainingRun, experts: list[int]) -> tuple[dict[int, int], dict]:
    """Replace experts by one that approximates the mean of their updates, weighted by their training steps.

    The new expert has the largest rank and the largest alpha among them. It is then trained on their skills and frozen,
    and the router is fitted again. Returns {old: new} expert ids and the details to log.
    """
    pool, merged_experts = run.pool, [run.model.experts[expert_id - 1] for expert_id in experts]
    records = [pool.records[expert_id - 1] for expert_id in experts]
    steps = np.array([max(1, record.steps) for record in records], np.float64)
    rank, alpha = max(record.rank for record in records), max(record.alpha for record in records)
    factors = merge.merge_factors(merged_experts, (steps / steps.sum()).tolist(), rank, alpha)
    key = mx.random.key(derived_seed(run.config.seed, SeedStream.MERGE_INIT, run.state.step, *experts))
    expert = merge.expert_from_factors(factors, run.model.shapes, key)
    rows = [run.model.router.rows[expert_id] for expert_id in experts]
    row = GateRow(run.model.base.args.hidden_size)
    row.weight = mx.mean(mx.stack([item.weight for item in rows]), axis=0)
    # In a softmax the exponentials of logits add up: the new row takes about as many tokens as the old ones together.
    row.bias = mx.logsumexp(mx.concatenate([item.bias for item in rows]), keepdims=True)
    expert_ids = pool.remove(experts)
    name = "+".join(record.skill for record in records)
    record = ExpertRecord(
        name, rank, alpha, min(item.created_at for item in records), sum(item.steps for item in records), "mature", True
    )
    expert_id = pool.append(expert, record, row)
    expert_ids |= dict.fromkeys(experts, expert_id)
    run.library.renumber_experts(expert_ids)
    _train_merged(run, expert_id)
    # Before freezing, because only trainable weights are compared between ranks.
    sync_weights(run.model, run.optimizers)
    pool.freeze(expert_id)
    _refit_router(run)
    return expert_ids, {"into": expert_id, "error": factors.error, "tuned_steps": run.config.growth.budget.merge_steps}


def _train_merged(run: TrainingRun, expert_id: int) -> None:
    """Train an expert for growth.budget.merge_steps on the skills assigned to it, with every token routed to it."""
    skills_held = {entry.skill for entry in run.library.entries if entry.expert == expert_id}
    segments = [segment for skill in run.skills if skill.name in skills_held for segment in skill.train.segments]
    steps = run.config.growth.budget.merge_steps
    if not (segments and steps):
        return
    model = solo.solo_model(run.base, run.config, run.model.experts[expert_id - 1])
    seed = derived_seed(run.config.seed, SeedStream.MERGE_TRAINING, run.state.step)
    solo.train_solo(model, run.config, Split(segments, len(segments)), None, steps, seed, run.compiled)


def _evict(run: TrainingRun, experts: list[int]) -> tuple[dict[int, int], dict]:
    """Remove experts. Each of their skills is reassigned to the remaining expert, or the base, with the lowest loss on
    it."""
    expert_ids = run.pool.remove(experts)
    orphans = [entry for entry in run.library.entries if entry.expert in experts]
    run.library.renumber_experts(expert_ids)
    heirs = {}
    for entry in orphans:
        losses = {c: run.evaluate_expert(entry.skill, c).loss for c in range(len(run.pool) + 1)}
        entry.expert = heirs[entry.skill] = min(losses, key=lambda expert_id: losses[expert_id])
    _refit_router(run)
    return expert_ids, {"heirs": heirs}


def _refit_router(run: TrainingRun) -> None:
    """Fit the router's rows to all remembered features. Reset optimizer moments, because expert ids have changed."""
    fit_router.fit_to_library(run.model, run.library, run.config)
    run.reset_optimizers()


def _log_removal(
    config: Config, state: TrainerState, log: DecisionLog, removal: Removal, skills: list[str], why: str
) -> None:
    verb = {"merge": "merged", "evict": "evicted"}[removal.action]
    outcome = f"{verb}, {removal.saved} parameters saved" if removal.kept else f"not {verb}, all is as it was"
    allowed = config.growth.epsilon
    reason = f"{why}: {removal.worst_domain} loses {removal.worst_rise:+.3f} nats ({allowed:.3f} allowed), {outcome}"
    expert_id = removal.expert_ids.get(removal.experts[0], removal.experts[0])
    log.append({
        "step": state.step, "skill": "+".join(skills), "action": removal.action, "expert": expert_id,
        "similarities": {}, "interval": None, "threshold": None, "samples": 0, "tokens": 0, "reason": reason,
        **removal._asdict(),
    })  # fmt: skip
    console.info(f"  {removal.action} {', '.join(skills)}: {reason}")
