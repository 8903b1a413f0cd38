"""Numbers that are not finite: the update is left out, its batch is kept for looking at, and too many in a row end the run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from dylora_mlx.distributed import group as ranks
from dylora_mlx.errors import Failure
from dylora_mlx.system import console
from dylora_mlx.training.run import Run
from dylora_mlx.training.step.losses import MicroBatch
from dylora_mlx.training.step.step import State, Step, StepMetrics

FOLDER = "skipped"
"""In a run folder: the batches of updates that were left out."""
MOST = 20
"""Batches kept for looking at."""


def check(run: Run, outcome: StepMetrics, batches: Sequence[MicroBatch], step: Step, kept: State) -> None:
    """Take an update back whose loss or gradient is not finite. Raises Failure after training.max_skipped in a row."""
    loss, norm = float(np.array(outcome.train_loss)), float(np.array(outcome.grad_norm))
    state, most = run.state, run.config.training.max_skipped
    if math.isfinite(loss) and math.isfinite(norm):
        state.skipped_in_row = 0
        return
    step.restore(kept)
    state.skipped, state.skipped_in_row = state.skipped + 1, state.skipped_in_row + 1
    place = _dump(run, batches)
    run.record.log(state.step, {"skipped_update": state.skipped, "train_loss": None, "grad_norm": None})
    console.warn(
        f"step {state.step + 1}: loss {loss} and gradient norm {norm} are not finite; the update is left out (its batch: {place})"
    )
    if state.skipped_in_row >= most:
        raise Failure(
            f"{most} updates in a row were not finite; the last good weights are in {run.folder / 'checkpoints'}. Lower "
            "training.learning_rate, or use model.dtype: float32, in a new run"
        )


def _dump(run: Run, batches: Sequence[MicroBatch]) -> str:
    folder = run.folder / FOLDER
    if not ranks.leads():
        return "rank 0 keeps its own share"
    try:
        folder.mkdir(exist_ok=True)
        if len(list(folder.iterdir())) >= MOST:
            return f"{MOST} are kept in {folder} already"
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
