"""What looks wrong in numbers that are finite: a loss that jumps, and routing that leaves an expert without tokens.

Each is said once for as long as it lasts, as a warning and in metrics.jsonl; the training goes on. What has been seen so far is
part of the run's state, so that a resumed run says the same.
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
from dylora_mlx.training.step.evaluate import Evaluation
from dylora_mlx.training.step.losses import MicroBatch
from dylora_mlx.training.step.step import Step, StepMetrics, StepState

WINDOW = 50
"""Losses that a new one is compared with, at most."""
MIN_LOSSES = 10
"""Losses that say what is usual, at least."""
DEVIATIONS = 6
"""Median absolute deviations above the median that a loss may lie."""
MIN_RISE = 0.5
"""Nats above the median that are no spike yet, however still the losses are."""
MIN_SHARE = 0.01
"""Share of its own domain's gates below which an expert gets nothing; of all but one column, if that gets everything."""
PATIENCE = 3
"""Evaluations after which routing is not like that by chance."""


class LossSpike(NamedTuple):
    """A loss, the median of those before it, and what it may be at most; nats a token."""

    loss: float
    median: float
    limit: float


class UnservedDomain(NamedTuple):
    """A domain, the column of the expert that holds it, and that expert's mean gate there."""

    domain: str
    expert_id: int
    share: float


def loss_spike(recent: Sequence[float], loss: float) -> LossSpike | None:
    """Whether a loss lies far above the recent ones, by their median and their median absolute deviation."""
    if len(recent) < MIN_LOSSES:
        return None
    usual = float(np.median(recent))
    most = usual + max(MIN_RISE, DEVIATIONS * float(np.median(np.abs(np.array(recent) - usual))))
    return LossSpike(loss, usual, most) if loss > most else None


def new_spike(seen: AnomalyState, loss: float) -> LossSpike | None:
    """Note a finite loss; a spike when one begins, not while it lasts."""
    found = loss_spike(seen.losses, loss)
    begins, seen.in_spike = found is not None and not seen.in_spike, found is not None
    seen.losses = [*seen.losses, loss][-WINDOW:]
    return found if begins else None


def unserved_domains(usage: Mapping[str, Sequence[float]], owners: Mapping[str, int]) -> list[UnservedDomain]:
    """Domains whose own experts get next to nothing of them. usage: mean gates [E] by domain; owners: columns of the
    experts that are not young, by domain."""
    own = [
        UnservedDomain(name, expert_id, usage[name][expert_id])
        for name, expert_id in owners.items()
        if expert_id and name in usage
    ]
    return [found for found in own if found.share < MIN_SHARE]


def collapsed_column(usage: Mapping[str, Sequence[float]], owners: Mapping[str, int]) -> int | None:
    """The column that gets everything of every domain, although they belong to several; else None."""
    if len({expert_id for name, expert_id in owners.items() if expert_id and name in usage}) < 2:
        return None
    first = int(np.argmax(next(iter(usage.values()))))
    return first if all(gates[first] > 1 - MIN_SHARE for gates in usage.values()) else None


def routing_anomalies(
    seen: AnomalyState, usage: Mapping[str, Sequence[float]], owners: Mapping[str, int]
) -> tuple[list[UnservedDomain], int | None]:
    """Note an evaluation; what has now been so for IN_A_ROW of them, and not longer. While one column gets everything,
    that alone is counted."""
    expert_id = collapsed_column(usage, owners)
    found = unserved_domains(usage, owners) if expert_id is None else []
    seen.collapsed = 0 if expert_id is None else seen.collapsed + 1
    if expert_id is None:
        seen.unserved = {each.domain: seen.unserved.get(each.domain, 0) + 1 for each in found}
    due = [each for each in found if seen.unserved[each.domain] == PATIENCE]
    return due, expert_id if seen.collapsed == PATIENCE else None


def warn_of_loss_spike(state: TrainerState, metrics: MetricsRecorder, skill: Skill, outcome: StepMetrics) -> None:
    """Warn of a training loss that jumps."""
    loss = float(np.array(outcome.terms.lm_loss))
    found = new_spike(state.anomalies, loss) if np.isfinite(loss) else None
    if found is None:
        return
    record = {"skill": skill.name, "loss_spike": found.loss, "usual_loss": found.median, "spike_limit": found.limit}
    metrics.log(state.step, record)
    console.warn(
        f"step {state.step}: the loss of {skill.name} jumps to {found.loss:.3f}, {found.median:.3f} is usual; if it "
        "stays there or comes again, lower training.learning_rate or training.max_grad_norm in a new run"
    )


def warn_of_routing(run: TrainingRun, skill: Skill, expert_id: int, evaluated: Mapping[str, Evaluation]) -> None:
    """Warn of experts that get no token of what they hold. skill, column: what is learned, and by which expert."""
    if len(run.pool) < 2:
        return
    usage = {name: found.usage for name, found in evaluated.items()}
    young = {c for c, record in enumerate(run.pool.records, 1) if record.phase == "dense"}
    owners = {name: c for name, c in (run.library.experts_of | {skill.name: expert_id}).items() if c not in young}
    found, everything = routing_anomalies(run.state.anomalies, usage, owners)
    step, where = run.state.step, {"skill": skill.name}
    for each in found:
        record = {"unserved_domain": each.domain, "expert": each.expert_id, "share": each.share}
        run.metrics.log(step, where | record)
        console.warn(
            f"step {step}: expert {each.expert_id} holds {each.domain} and gets {each.share:.1%} of it, for {PATIENCE} "
            "evaluations now; raise training.rehearsal_coef or training.router_fit_steps in a new run"
        )
    if everything is not None:
        run.metrics.log(step, where | {"collapsed_router": everything})
        console.warn(
            f"step {step}: {f'expert {everything}' if everything else 'the base'} gets every token of every domain, for "
            f"{PATIENCE} evaluations now; set training.load_balance_coef: 0.01 or lower training.router_learning_rate in a new run"
        )


SKIPPED_FOLDER = "skipped"
"""In a run folder: the batches of updates that were left out."""
MAX_KEPT_BATCHES = 20
"""Batches kept for looking at."""


def skip_nonfinite_update(
    run: TrainingRun, outcome: StepMetrics, batches: Sequence[MicroBatch], step: Step, kept: StepState
) -> None:
    """Take an update back whose loss or gradient is not finite. Raises Failure after training.max_skipped in a row."""
    loss, norm = float(np.array(outcome.train_loss)), float(np.array(outcome.grad_norm))
    state, most = run.state, run.config.training.max_skipped
    if math.isfinite(loss) and math.isfinite(norm):
        state.skipped_in_row = 0
        return
    step.restore(kept)
    state.skipped, state.skipped_in_row = state.skipped + 1, state.skipped_in_row + 1
    place = _save_batch(run, batches)
    run.metrics.log(state.step, {"skipped_update": state.skipped, "train_loss": None, "grad_norm": None})
    console.warn(
        f"step {state.step + 1}: loss {loss} and gradient norm {norm} are not finite; the update is left out (its batch: {place})"
    )
    if state.skipped_in_row >= most:
        raise Failure(
            f"{most} updates in a row were not finite; the last good weights are in {run.folder / 'checkpoints'}. Lower "
            "training.learning_rate, or use model.dtype: float32, in a new run"
        )


def _save_batch(run: TrainingRun, batches: Sequence[MicroBatch]) -> str:
    folder = run.folder / SKIPPED_FOLDER
    if not is_main_process():
        return "rank 0 keeps its own share"
    try:
        folder.mkdir(exist_ok=True)
        if len(list(folder.iterdir())) >= MAX_KEPT_BATCHES:
            return f"{MAX_KEPT_BATCHES} are kept in {folder} already"
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
        return f"not kept, {error}"
    return str(path)
