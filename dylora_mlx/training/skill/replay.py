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

from dylora_mlx.config import Config
from dylora_mlx.data import stream
from dylora_mlx.data.packing import Batch
from dylora_mlx.growth import exemplars, phases
from dylora_mlx.model.decoder.decoder import Adapters, RoutedDecoder
from dylora_mlx.model.kernels import chunked_loss
from dylora_mlx.model.routing.router import Gate
from dylora_mlx.training.checkpoint.state import TrainerState
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.step.losses import MicroBatch, ReplayBatch, batch_layout, device_batch, forward_routed


class TeacherTargets(NamedTuple):
    """What the mature mixture says of a batch's N learned positions: the head's mean rows float32 [N, D], and
    sum_v p_v log p_v, float32 [N]."""

    mean_row: np.ndarray
    neg_entropy: np.ndarray


@dataclass(frozen=True)
class ReplayBuffer:
    """Replayed batches, one drawn for each step. targets: room for learned positions, where shapes are fixed; features:
    of the base, if the router reads final states; taught: for each batch, empty without distillation."""

    batches: list[Batch]
    max_targets: int | None
    window: int
    features: list[np.ndarray]
    teacher: list[TeacherTargets]

    def sample(self, rng: np.random.Generator) -> ReplayBatch:
        """One of the batches, at random."""
        number = int(rng.integers(len(self.batches)))
        known = self.features[number] if self.features else None
        batch = device_batch(self.batches[number], self.window, known, self.max_targets)
        if not self.teacher:
            return ReplayBatch(batch, None, None)
        room = batch.target_positions.shape[0] - len(self.teacher[number].neg_entropy)
        mean, level = self.teacher[number]
        return ReplayBatch(batch, mx.array(np.pad(mean, ((0, room), (0, 0)))), mx.array(np.pad(level, (0, room))))


def copy_gate(model: RoutedDecoder) -> dict[str, mx.array]:
    """A copy of the router's rows: what the mature mixture routes by, while the router goes on learning."""
    return {name: value + 0 for name, value in model.router.gate()._asdict().items()}


def prepare_replay(run: TrainingRun) -> ReplayBuffer | None:
    """The replay of all skills in the library, for the skill at hand; None if nothing is replayed."""
    config, training = run.config, run.config.training
    pieces = exemplars.combine([entry.exemplars for entry in run.library.entries])
    if not pieces or not (training.replay_coef or training.distillation_coef):
        return None
    batches = stream.evaluation_batches(pieces, config.data.max_seq_length, training.batch_size, run.compiled)
    batches = [batch for batch in batches if batch.loss_mask.any()]
    room = max(int(batch.loss_mask.sum()) for batch in batches) if run.compiled else None
    moved = [device_batch(batch, run.model.window) for batch in batches]
    read = [run.model.router_features(m.inputs, batch_layout(m, run.model.window)) for m in moved]
    features = [np.array(found.astype(mx.float32)) for found in read] if run.model.router_layer == "final" else []
    taught = _teacher_targets(run.config, run.model, run.state, moved) if training.distillation_coef else []
    return ReplayBuffer(batches, room, run.model.window, features, taught)


def _teacher_targets(
    config: Config, model: RoutedDecoder, state: TrainerState, moved: list[MicroBatch]
) -> list[TeacherTargets]:
    """The mature mixture's word on every batch: the experts that its gate has rows for, under the final routing."""
    gate, growth = Gate(state.teacher_gate["weight"], state.teacher_gate["bias"]), config.growth
    expert_ids = range(1, len(gate.bias))
    adapters = Adapters(model.stack_experts(expert_ids, growth.top_k, len(gate.bias)), gate)
    routing = phases.final_schedule(growth).routing
    found = []
    for batch in moved:
        out = forward_routed(model, batch, routing, adapters)
        states = out.hidden.reshape(-1, out.hidden.shape[-1])[batch.target_positions]
        partition, mean = chunked_loss.partition_and_mean_row(
            model.head, states, chunked_loss.tile_size(len(states)), gradient=True
        )
        level = (states.astype(mx.float32) * mean).sum(-1) - partition
        found.append(TeacherTargets(np.array(mean), np.array(level)))
    return found
