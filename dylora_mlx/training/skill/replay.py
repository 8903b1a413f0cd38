"""Replay: batches of earlier skills' exemplars, with the teacher's targets for distillation.

The teacher is the mature mixture before a skill is learned. Distillation pulls the new mixture toward it (Hinton et al.
2015; Li and Hoiem 2016, "Learning without Forgetting"): it minimizes the divergence KL(mature || new) at every target
position. With p the mature distribution, W the language-model head, and h the new mixture's hidden state,

    KL = sum_v p_v log p_v - h . E_p[W] + log sum_v exp(W_v . h)

so for each position only the mean row E_p[W] and one number must be stored, whatever the size of the vocabulary.
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
    """The mature mixture's distribution p at a batch's N target positions."""

    mean_row: np.ndarray
    """Mean row of the head under p, float32 [N, D]."""
    neg_entropy: np.ndarray
    """sum_v p_v log p_v, float32 [N]."""


@dataclass(frozen=True)
class ReplayBuffer:
    """Replayed batches, one of which is drawn for each step."""

    batches: list[Batch]
    max_targets: int | None
    """Number of targets that each batch is padded to if shapes are fixed, else None."""
    window: int
    """Window of the base's sliding-window layers."""
    features: list[np.ndarray]
    """The base's features of each batch. Empty unless the router reads final states."""
    teacher: list[TeacherTargets]
    """The teacher's targets for each batch. Empty without distillation."""

    def sample(self, rng: np.random.Generator) -> ReplayBatch:
        """Draw one of the batches at random and move it to the device."""
        number = int(rng.integers(len(self.batches)))
        features = self.features[number] if self.features else None
        batch = device_batch(self.batches[number], self.window, features, self.max_targets)
        if not self.teacher:
            return ReplayBatch(batch, None, None)
        padding = batch.target_positions.shape[0] - len(self.teacher[number].neg_entropy)
        mean_row, neg_entropy = self.teacher[number]
        return ReplayBatch(
            batch, mx.array(np.pad(mean_row, ((0, padding), (0, 0)))), mx.array(np.pad(neg_entropy, (0, padding)))
        )


def copy_gate(model: RoutedDecoder) -> dict[str, mx.array]:
    """Return a copy of the router's rows: the mature mixture's routing, which stays fixed during training."""
    return {name: value + 0 for name, value in model.router.gate()._asdict().items()}


def prepare_replay(run: TrainingRun) -> ReplayBuffer | None:
    """Build the replay buffer from the exemplars of all skills in the library. Returns None if nothing is replayed."""
    config, training = run.config, run.config.training
    segments = exemplars.combine([entry.exemplars for entry in run.library.entries])
    if not segments or not (training.replay_coef or training.distillation_coef):
        return None
    batches = stream.evaluation_batches(segments, config.data.max_seq_length, training.batch_size, run.compiled)
    batches = [batch for batch in batches if batch.loss_mask.any()]
    max_targets = max(int(batch.loss_mask.sum()) for batch in batches) if run.compiled else None
    micro_batches = [device_batch(batch, run.model.window) for batch in batches]
    router_features = [
        run.model.router_features(micro_batch.inputs, batch_layout(micro_batch, run.model.window))
        for micro_batch in micro_batches
    ]
    features = (
        [np.array(array.astype(mx.float32)) for array in router_features] if run.model.router_layer == "final" else []
    )
    teacher = _teacher_targets(run.config, run.model, run.state, micro_batches) if training.distillation_coef else []
    return ReplayBuffer(batches, max_targets, run.model.window, features, teacher)


def _teacher_targets(
    config: Config, model: RoutedDecoder, state: TrainerState, micro_batches: list[MicroBatch]
) -> list[TeacherTargets]:
    """Compute the teacher's targets for every batch.

    The teacher uses the final routing over the experts that its gate has rows for. An expert created since is left out.
    """
    gate, growth = Gate(state.teacher_gate["weight"], state.teacher_gate["bias"]), config.growth
    expert_ids = range(1, len(gate.bias))
    adapters = Adapters(model.stack_experts(expert_ids, growth.top_k, len(gate.bias)), gate)
    routing = phases.final_schedule(growth).routing
    targets = []
    for batch in micro_batches:
        out = forward_routed(model, batch, routing, adapters)
        states = out.hidden.reshape(-1, out.hidden.shape[-1])[batch.target_positions]
        log_partition, mean_row = chunked_loss.partition_and_mean_row(
            model.head, states, chunked_loss.tile_size(len(states)), gradient=True
        )
        # sum_v p_v log p_v, because log p_v = W_v . h - log_partition.
        neg_entropy = (states.astype(mx.float32) * mean_row).sum(-1) - log_partition
        targets.append(TeacherTargets(np.array(mean_row), np.array(neg_entropy)))
    return targets
