"""Detect training anomalies: loss spikes, experts without tokens, router collapse, and non-finite updates.

The first three only warn, on the console and in metrics.jsonl, once per episode. Training continues. The history that
they compare with is part of the checkpointed state, so a resumed run gives the same warnings. A non-finite update is
undone, and too many in a row stop the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx.data.stream import Skill
from dylora_mlx.distributed.group import is_main_process
from dylora_mlx.errors import Failure
from dylora_mlx.system import console
from dylora_mlx.training.checkpoint.state import AnomalyState, TrainerState
from dylora_mlx.training.metrics.recorder import MetricsRecorder
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.step.losses import MicroBatch
from dylora_mlx.training.step.step import Step, StepMetrics, StepState

WINDOW = 50
"""Number of recent losses that a new loss is compared with, at most."""
MIN_LOSSES = 10
"""Number of recent losses needed before a spike can be detected."""
DEVIATIONS = 6
"""A spike lies more than this many median absolute deviations above the median."""
MIN_RISE = 0.5
"""A spike lies more than this many nats above the median, however little the losses vary."""
MIN_SHARE = 0.01
"""Mean gate on its own domain below which an expert counts as unserved.

Also the share that all other experts together must stay below for the router to count as collapsed.
"""
PATIENCE = 3
"""Consecutive evaluations with the same routing anomaly before a warning, to exclude chance."""


class LossSpike(NamedTuple):
    """A training loss above its limit, in nats per token."""

    loss: float
    """The loss that spiked."""
    median: float
    """Median of the losses before it."""
    limit: float
    """Largest loss that would not have counted as a spike."""


class UnservedDomain(NamedTuple):
    """A domain whose own expert receives almost none of its tokens."""

    domain: str
    expert_id: int
    """The expert that the domain belongs to."""
    share: float
    """Mean gate of that expert on the domain."""


def loss_spike(recent: Sequence[float], loss: float) -> LossSpike | None:
    """Return a LossSpike if a loss lies far above the recent ones, by their median and median absolute deviation.

    None if it does not, or with fewer than MIN_LOSSES recent losses.
    """
    if len(recent) < MIN_LOSSES:
        return None
    median = float(np.median(recent))
    limit = median + max(MIN_RISE, DEVIATIONS * float(np.median(np.abs(np.array(recent) - median))))
    return LossSpike(loss, median, limit) if loss > limit else None


def new_spike(seen: AnomalyState, loss: float) -> LossSpike | None:
    """Record a finite loss in the state; return the spike that starts with it, None while one lasts or without one."""
    spike = loss_spike(seen.losses, loss)
    begins, seen.in_spike = spike is not None and not seen.in_spike, spike is not None
    seen.losses = [*seen.losses, loss][-WINDOW:]
    return spike if begins else None


def unserved_domains(usage: Mapping[str, Sequence[float]], owners: Mapping[str, int]) -> list[UnservedDomain]:
    """Return the domains whose own expert has a mean gate below MIN_SHARE on them.

    Args:
        usage: Mean gates [E] by domain.
        owners: expert_id by domain, without experts in the dense phase. Domains of the null expert (0) are skipped.
    """
    owned = [
        UnservedDomain(name, expert_id, usage[name][expert_id])
        for name, expert_id in owners.items()
        if expert_id and name in usage
    ]
    return [each for each in owned if each.share < MIN_SHARE]


def collapsed_expert(usage: Mapping[str, Sequence[float]], owners: Mapping[str, int]) -> int | None:
    """Return the expert_id that gets nearly all gates (above 1 - MIN_SHARE) of every domain, else None.

    Also None if fewer than two experts own an evaluated domain: one expert may well serve everything then.
    """
    if len({expert_id for name, expert_id in owners.items() if expert_id and name in usage}) < 2:
        return None
    top_expert = int(np.argmax(next(iter(usage.values()))))
    return top_expert if all(gates[top_expert] > 1 - MIN_SHARE for gates in usage.values()) else None


def routing_anomalies(
    seen: AnomalyState, usage: Mapping[str, Sequence[float]], owners: Mapping[str, int]
) -> tuple[list[UnservedDomain], int | None]:
    """Record an evaluation in the state; return the anomalies that have now lasted exactly PATIENCE evaluations.

    While one expert gets everything, only the collapse is counted, not the unserved domains that it causes.

    Returns:
        Unserved domains, and the expert_id that the router collapsed to (None if it did not).
    """
    expert_id = collapsed_expert(usage, owners)
    unserved = unserved_domains(usage, owners) if expert_id is None else []
    seen.collapsed = 0 if expert_id is None else seen.collapsed + 1
    if expert_id is None:
        seen.unserved = {item.domain: seen.unserved.get(item.domain, 0) + 1 for item in unserved}
    to_report = [item for item in unserved if seen.unserved[item.domain] == PATIENCE]
    return to_report, expert_id if seen.collapsed == PATIENCE else None


def warn_of_loss_spike(state: TrainerState, metrics: MetricsRecorder, skill: Skill, outcome: StepMetrics) -> None:
    """Warn on the console and in metrics.jsonl when a spike of the training loss begins."""
    loss = float(np.array(outcome.terms.lm_loss))
    spike = new_spike(state.anomalies, loss) if np.isfinite(loss) else None
    if spike is None:
        return
    record = {"skill": skill.name, "loss_spike": spike.loss, "usual_loss": spike.median, "spike_limit": spike.limit}
    metrics.log(state.step, record)
    console.warn(
        f"step {state.step}: the loss of {skill.name} jumps to {spike.loss:.3f}, {spike.median:.3f} is usual; if it "
        "stays there or comes again, lower training.learning_rate or training.max_grad_norm in a new run"
    )


def warn_of_routing(run: TrainingRun, skill: Skill, expert_id: int, usage: Mapping[str, Sequence[float]]) -> None:
    """Warn of experts that receive no tokens of their own domain, and of a collapsed router.

    Args:
        run: The run, with at least two experts.
        skill: The skill being learned.
        expert_id: The expert that learns it.
        usage: Mean gates [E] now, by domain.
    """
    # In its dense phase an expert is still being trained up: a small gate is no anomaly there.
    dense_experts = {i for i, record in enumerate(run.pool.records, 1) if record.phase == "dense"}
    owners = {
        name: i for name, i in (run.library.experts_of | {skill.name: expert_id}).items() if i not in dense_experts
    }
    unserved, collapsed = routing_anomalies(run.state.anomalies, usage, owners)
    step, context = run.state.step, {"skill": skill.name}
    for each in unserved:
        record = {"unserved_domain": each.domain, "expert": each.expert_id, "share": each.share}
        run.metrics.log(step, context | record)
        console.warn(
            f"step {step}: expert {each.expert_id} holds {each.domain} and gets {each.share:.1%} of it, for {PATIENCE} "
            "evaluations now; raise training.rehearsal_coef or training.router_fit_steps in a new run"
        )
    if collapsed is not None:
        run.metrics.log(step, context | {"collapsed_router": collapsed})
        console.warn(
            f"step {step}: {f'expert {collapsed}' if collapsed else 'the base'} gets every token of every domain, for "
            f"{PATIENCE} evaluations now; set training.load_balance_coef: 0.01 or lower "
            "training.router_learning_rate in a new run"
        )


SKIPPED_FOLDER = "skipped"
"""Subfolder of a run folder with the batches of skipped updates."""
MAX_KEPT_BATCHES = 20
"""Number of skipped updates whose batches are saved for inspection, at most."""


def skip_nonfinite_update(
    run: TrainingRun, outcome: StepMetrics, batches: Sequence[MicroBatch], step: Step, snapshot: StepState
) -> None:
    """Undo an update whose loss or gradient norm is not finite, and save its batches for inspection.

    Args:
        run: The run.
        outcome: Metrics of the update. Reading them waits for the device.
        batches: This rank's micro-batches of the update.
        step: The step that made the update.
        snapshot: `step.snapshot()` from before the update.

    Raises Failure after training.max_skipped skipped updates in a row.
    """
    loss, norm = float(np.array(outcome.train_loss)), float(np.array(outcome.grad_norm))
    state, max_skipped = run.state, run.config.training.max_skipped
    if math.isfinite(loss) and math.isfinite(norm):
        state.skipped_in_row = 0
        return
    step.restore(snapshot)
    state.skipped, state.skipped_in_row = state.skipped + 1, state.skipped_in_row + 1
    batch_path = _save_batch(run, batches)
    run.metrics.log(state.step, {"skipped_update": state.skipped, "train_loss": None, "grad_norm": None})
    console.warn(
        f"step {state.step + 1}: loss {loss} and gradient norm {norm} are not finite; the update is left out "
        f"(its batch: {batch_path})"
    )
    if state.skipped_in_row >= max_skipped:
        raise Failure(
            f"{max_skipped} updates in a row were not finite; the last good weights are in "
            f"{run.folder / 'checkpoints'}. Lower training.learning_rate, or use model.dtype: float32, in a new run"
        )


def _save_batch(run: TrainingRun, batches: Sequence[MicroBatch]) -> str:
    """Save the micro-batches of a skipped update on rank 0; return the path, or the reason why there is none."""
    folder = run.folder / SKIPPED_FOLDER
    if not is_main_process():
        return "saved by rank 0, its own share only"
    try:
        folder.mkdir(exist_ok=True)
        if len(list(folder.iterdir())) >= MAX_KEPT_BATCHES:
            return f"not saved, {MAX_KEPT_BATCHES} are in {folder} already"
        path = folder / f"step-{run.state.step + 1:06d}.safetensors"
        arrays = {}
        for number, batch in enumerate(batches):
            arrays |= {
                f"{number}.inputs": batch.inputs,
                f"{number}.targets": batch.targets,
                f"{number}.weights": batch.weights,
            }
        mx.save_safetensors(str(path), arrays)
    except (OSError, RuntimeError) as error:
        return f"not saved, {error}"
    return str(path)
