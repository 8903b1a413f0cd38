"""Keep the caps on parameters: before an expert is created, merge experts, then evict the least used, if none is harmed."""

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
"""Changes the pool; returns {old: new} columns and what to note."""


class Removal(NamedTuple):
    """One attempt to make room: what was tried, which experts (by column, before), and what it did to every domain.

    worst: the domain that lost most, rise: by how many nats; saved: parameters; columns: {old: new} if it was kept.
    """

    action: str
    experts: list[int]
    kept: bool
    worst_domain: str
    worst_rise: float
    saved: int
    expert_ids: dict[int, int]
    details: dict


def check_budget(growth: GrowthConfig, pool: Pool, skills: list[Source], rank: int) -> None:
    """Raise UserError for a cap that cannot hold one expert, before any training."""
    router = 2 * (pool.model.base.args.hidden_size + 1)
    for source in skills:
        size = pool.expert_parameters(source.rank or rank)
        for name, cap, need in (
            ("adapters", growth.budget.adapters, size),
            ("trainable", growth.budget.trainable, size + router),
        ):
            if cap is not None and need > cap:
                raise UserError(
                    f"growth.budget.{name}: {cap} parameters cannot hold one expert of rank {source.rank or rank} for skill "
                    f"'{source.name}', which takes {need}; raise the cap or lower the rank"
                )


def make_room(run: TrainingRun, rank: int) -> str:
    """Merge or evict until one more expert of this rank fits; return why it does not, or nothing."""
    budget, need = run.config.growth.budget, run.pool.expert_parameters(rank)
    routed = (len(run.pool) + 2) * (run.model.base.args.hidden_size + 1)
    if budget.trainable is not None and need + routed > budget.trainable:
        return f"it would train {need + routed} parameters and growth.budget.trainable is {budget.trainable}"
    while budget.adapters is not None and run.pool.num_parameters() + need > budget.adapters:
        if not (_merge_nearest(run) or _evict_least_used(run)):
            return (
                f"{run.pool.num_parameters()} + {need} parameters exceed growth.budget.adapters, {budget.adapters}, and no expert "
                "can be merged or evicted without harm"
            )
    return ""


def mean_usage(evaluated: dict[str, Evaluation]) -> np.ndarray:
    """Mean gate of every expert over all domains, each alike, float64 [experts]."""
    return np.mean([found.usage for found in evaluated.values()], axis=0)[1:]


def _merge_nearest(run: TrainingRun) -> bool:
    """Merge the two or more little-used experts whose updates are nearest; return whether it was accepted."""
    growth, before = run.config.growth, run.evaluate()
    used = mean_usage(before)
    low = [i for i in range(len(used)) if used[i] <= growth.budget.low_usage * used.mean()]
    low = low if len(low) > 1 else list(range(len(used)))
    distance = merge.distances(run.model.experts)
    groups = [g for g in merge.clusters(distance, low, growth.budget.merge_distance) if len(g) > 1]
    groups.sort(key=lambda group: distance[np.ix_(group, group)].sum() / (len(group) * (len(group) - 1)))
    groups = world().broadcast_object([[int(i) for i in group] for group in groups])
    return any(_try_removal(run, "merge", [i + 1 for i in group], before, _merge) for group in groups)


def _evict_least_used(run: TrainingRun) -> bool:
    """Evict the least used expert whose removal costs no domain more than epsilon; return whether there was one."""
    before = run.evaluate()
    order = np.argsort(mean_usage(before), kind="stable")
    return any(_try_removal(run, "evict", [i + 1], before, _evict) for i in world().broadcast_object(order.tolist()))


def _try_removal(
    run: TrainingRun, action: str, experts: list[int], before: dict[str, Evaluation], change: Change
) -> bool:
    """Change the pool; keep it if no domain loses more than epsilon, else put everything back. Either way it is recorded."""
    started, kept, size = time.perf_counter(), take_snapshot(run), run.pool.num_parameters()
    names = [run.pool.records[expert_id - 1].skill for expert_id in experts]
    folder = archive.store(run, experts, action)
    expert_ids, details = change(run, experts)
    after = run.evaluate()
    rise = {name: after[name].loss - found.loss for name, found in before.items()}
    worst = max(rise, key=lambda name: rise[name])
    accepted = rise[worst] <= run.config.growth.epsilon
    saved = size - run.pool.num_parameters()
    if not accepted:
        restore_snapshot(run, kept)
        archive.drop(folder)
    details |= {"seconds": time.perf_counter() - started, "archive": folder.name if accepted else None}
    found = Removal(action, experts, accepted, worst, rise[worst], saved, expert_ids if accepted else {}, details)
    _log_removal(run.config, run.state, run.log, found, names)
    return accepted


def _merge(run: TrainingRun, experts: list[int]) -> tuple[dict[int, int], dict]:
    """Replace some experts by the best one of the largest rank among them, trained on what they were trained on."""
    pool, chosen = run.pool, [run.model.experts[expert_id - 1] for expert_id in experts]
    records = [pool.records[expert_id - 1] for expert_id in experts]
    steps = np.array([max(1, record.steps) for record in records], np.float64)
    rank, alpha = max(record.rank for record in records), max(record.alpha for record in records)
    found = merge.merge_factors(chosen, (steps / steps.sum()).tolist(), rank, alpha)
    key = mx.random.key(derived_seed(run.config.seed, SeedStream.MERGE_INIT, run.state.step, *experts))
    expert = merge.expert_from_factors(found, run.model.shapes, key)
    rows = [run.model.router.rows[expert_id] for expert_id in experts]
    row = GateRow(run.model.base.args.hidden_size)
    row.weight = mx.mean(mx.stack([r.weight for r in rows]), axis=0)
    row.bias = mx.logsumexp(mx.concatenate([r.bias for r in rows]), keepdims=True)
    expert_ids = pool.remove(experts)
    name = "+".join(record.skill for record in records)
    record = ExpertRecord(
        name, rank, alpha, min(r.created_at for r in records), sum(r.steps for r in records), "mature", True
    )
    expert_id = pool.append(expert, record, row)
    expert_ids |= dict.fromkeys(experts, expert_id)
    run.library.renumber_experts(expert_ids)
    _train_merged(run, expert_id)
    sync_weights(run.model, run.optimizers)
    pool.freeze(expert_id)
    _refit_router(run)
    return expert_ids, {"into": expert_id, "error": found.error, "tuned_steps": run.config.growth.budget.merge_steps}


def _train_merged(run: TrainingRun, expert_id: int) -> None:
    """Train an expert for some steps, every token on it, on the skills that it holds."""
    held = {entry.skill for entry in run.library.entries if entry.expert == expert_id}
    pieces = [piece for skill in run.skills if skill.name in held for piece in skill.train.segments]
    steps = run.config.growth.budget.merge_steps
    if not (pieces and steps):
        return
    model = solo.solo_model(run.base, run.config, run.model.experts[expert_id - 1])
    seed = derived_seed(run.config.seed, SeedStream.MERGE_TRAINING, run.state.step)
    solo.train_solo(model, run.config, Split(pieces, len(pieces)), None, steps, seed, run.compiled)


def _evict(run: TrainingRun, experts: list[int]) -> tuple[dict[int, int], dict]:
    """Take an expert out; its skills go to whatever else serves them best."""
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
    """Fit the router to the columns that are left, and start the optimizers anew."""
    training = run.config.training
    remembered = fit_router.remembered_features(run.library)
    fit_router.fit(run.model.router, remembered, training.router_fit_steps, training.memory_tokens)
    run.reset_optimizers()


def _log_removal(config: Config, state: TrainerState, log: DecisionLog, found: Removal, skills: list[str]) -> None:
    verb = {"merge": "merged", "evict": "evicted"}[found.action]
    outcome = f"{verb}, {found.saved} parameters saved" if found.kept else f"not {verb}, all is as it was"
    allowed = config.growth.epsilon
    reason = f"to keep the budget: {found.worst_domain} loses {found.worst_rise:+.3f} nats ({allowed:.3f} allowed), {outcome}"
    expert_id = found.expert_ids.get(found.experts[0], found.experts[0])
    log.append({
        "step": state.step, "skill": "+".join(skills), "action": found.action, "expert": expert_id, "similarities": {},
        "interval": None, "threshold": None, "samples": 0, "tokens": 0, "reason": reason, **found._asdict(),
    })  # fmt: skip
    console.info(f"  {found.action} {', '.join(skills)}: {reason}")
