"""Replay: rows of earlier skills' exemplars, with what the mature mixture said of them before a skill is learned.

Distillation pulls the new mixture toward the mature one (Hinton et al. 2015; Li and Hoiem 2016, "Learning without
Forgetting"): the divergence KL(mature || new) at every learned token. With p the mature distribution, W the head, and
h the new mixture's state,

    KL = sum_v p_v log p_v - h . E_p[W] + log sum_v exp(W_v . h)

so a position needs the mean row E_p[W] and one number of the mature mixture, whatever the size of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx.data import stream
from dylora_mlx.data.packing import Batch
from dylora_mlx.growth import exemplars
from dylora_mlx.model.decoder.decoder import Adapters, RoutedDecoder
from dylora_mlx.model.kernels import chunked_loss as head
from dylora_mlx.model.routing.router import Gate, Routing
from dylora_mlx.training.run import Run
from dylora_mlx.training.step import losses as objective
from dylora_mlx.training.step.losses import MicroBatch, Recalled, device_batch


class Taught(NamedTuple):
    """What the mature mixture says of a batch's N learned positions: the head's mean rows float32 [N, D], and
    sum_v p_v log p_v, float32 [N]."""

    mean: np.ndarray
    level: np.ndarray


@dataclass(frozen=True)
class Recall:
    """Replayed batches, one drawn for each step. targets: room for learned positions, where shapes are fixed; features:
    of the base, if the router reads final states; taught: for each batch, empty without distillation."""

    batches: list[Batch]
    targets: int | None
    window: int
    features: list[np.ndarray]
    taught: list[Taught]

    def draw(self, rng: np.random.Generator) -> Recalled:
        """One of the batches, at random."""
        number = int(rng.integers(len(self.batches)))
        known = self.features[number] if self.features else None
        batch = device_batch(self.batches[number], self.window, known, self.targets)
        if not self.taught:
            return Recalled(batch, None, None)
        room = batch.positions.shape[0] - len(self.taught[number].level)
        mean, level = self.taught[number]
        return Recalled(batch, mx.array(np.pad(mean, ((0, room), (0, 0)))), mx.array(np.pad(level, (0, room))))


def mature_gate(model: RoutedDecoder) -> dict[str, mx.array]:
    """A copy of the router's rows: what the mature mixture routes by, while the router goes on learning."""
    return {name: value + 0 for name, value in model.router.gate()._asdict().items()}


def prepare(run: Run) -> Recall | None:
    """The replay of all skills in the library, for the skill at hand; None if nothing is replayed."""
    config, training = run.config, run.config.training
    pieces = exemplars.together([entry.exemplars for entry in run.library.entries])
    if not pieces or not (training.replay or training.distillation):
        return None
    batches = stream.evaluation_batches(pieces, config.data.row_length, training.batch_rows, run.compiled)
    batches = [batch for batch in batches if batch.learn.any()]
    room = max(int(batch.learn.sum()) for batch in batches) if run.compiled else None
    moved = [device_batch(batch, run.model.window) for batch in batches]
    read = [run.model.features(m.inputs, objective.layout(m, run.model.window)) for m in moved]
    features = [np.array(found.astype(mx.float32)) for found in read] if run.model.tap == "final" else []
    taught = _taught(run, moved) if training.distillation else []
    return Recall(batches, room, run.model.window, features, taught)


def _taught(run: Run, moved: list[MicroBatch]) -> list[Taught]:
    """The mature mixture's word on every batch: the experts that its gate has rows for, under the final routing."""
    gate, growth = Gate(run.state.mature["weight"], run.state.mature["bias"]), run.config.growth
    columns = range(1, len(gate.bias))
    adapters = Adapters(run.model.laid_out(columns, growth.final_top_k, len(gate.bias)), gate)
    routing = Routing(growth.final_top_k, mx.array(growth.final_temperature))
    found = []
    for batch in moved:
        out = objective.routed(run.model, batch, routing, adapters)
        states = out.hidden.reshape(-1, out.hidden.shape[-1])[batch.positions]
        partition, mean = head.normalised(run.model.head, states, head.tile_size(len(states)), gradient=True)
        level = (states.astype(mx.float32) * mean).sum(-1) - partition
        found.append(Taught(np.array(mean), np.array(level)))
    return found
