"""Train a solo expert with every token routed to it: a trial expert, a merged expert's tuning, or a rank's loss."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from dylora_mlx.config import Config
from dylora_mlx.data.stream import BatchPlan, SegmentArrays, Split
from dylora_mlx.distributed.group import world
from dylora_mlx.growth.library import Library
from dylora_mlx.growth.pool import ExpertRecord, Pool
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.model.routing.router import GateRow
from dylora_mlx.system import console
from dylora_mlx.training.skill.prefetch import Prefetcher
from dylora_mlx.training.step.optimizers import lr_schedule, make_optimizers
from dylora_mlx.training.step.step import Step

SOLO_LOGIT = 40.0
"""Logit of the only expert, where the base's is 0. Its gate is then 1 up to the precision of float32."""


@dataclass(frozen=True)
class SelectedArrays:
    """Per-segment arrays of some segments, in the order of `chosen`."""

    values: SegmentArrays
    chosen: list[int]

    def __getitem__(self, index: int, /) -> np.ndarray:
        return self.values[self.chosen[index]]


def select_segments(
    split: Split, features: SegmentArrays | None, chosen: list[int]
) -> tuple[Split, SegmentArrays | None]:
    """Return the segments of a split with these indices, and their features if there are any."""
    segments = [split.segments[i] for i in chosen]
    documents = len({segment.document for segment in segments})
    return Split(segments, documents), None if features is None else SelectedArrays(features, chosen)


def solo_model(base: Base, config: Config, expert: Expert) -> RoutedDecoder:
    """Return a model with one expert, whose gate routes every token to it."""
    model = RoutedDecoder(
        base, config.model.projection_names, config.model.router_layer, config.training.grad_checkpoint
    )
    row = GateRow(base.args.hidden_size)
    row.bias = mx.array([SOLO_LOGIT])
    Pool(model).append(expert, ExpertRecord("alone", expert.rank, expert.alpha, 0), row)
    return model


def train_solo(
    model: RoutedDecoder,
    config: Config,
    split: Split,
    features: SegmentArrays | None,
    steps: int,
    seed: int,
    compiled: bool,
) -> int:
    """Train the only expert of a model on a split; return the number of steps.

    The learning rate follows the run's schedule, stretched or compressed to `steps`. Rehearsal, z-loss and load balance
    loss are off.

    Args:
        model: a model from `solo_model`.
        config: the run's configuration.
        split: the text to train on, for as many epochs as the steps need.
        features: cached features of the split's segments, or None.
        steps: optimizer steps.
        seed: seed of the batch order.
        compiled: whether to compile the step and fix the shapes of its batches.
    """
    training = replace(config.training, rehearsal_coef=0.0, z_loss_coef=0.0, load_balance_coef=0.0)
    optimizers = make_optimizers(training)
    optimizers.init(model)
    batch_shape = (training.batch_size, training.grad_accumulation_steps)
    plan = BatchPlan.plan(split, config.data, 1, *batch_shape, seed, fixed=compiled)
    epochs = -(-steps // len(plan))
    plan = plan if epochs == 1 else BatchPlan.plan(split, config.data, epochs, *batch_shape, seed, fixed=compiled)
    tokens, dropout = training.rehearsal_tokens, training.lora_dropout > 0
    prefetcher = Prefetcher(plan, features, Library(""), tokens, seed, 0, model.window, dropout=dropout)
    step = Step(model, optimizers, training, None, 1, compiled)
    steps = min(steps, len(plan))
    with closing(prefetcher.steps(0, steps)) as work_items:
        for number, work in enumerate(console.track(work_items, "  training one expert alone", steps)):
            world().raise_if_stop_requested(
                "stopped before the skill was learned; nothing is lost, go on with --resume"
            )
            optimizers.set_learning_rates(lr_schedule(number, steps, training), training)
            step_metrics = step(work.batches, work.memory, mx.array(1.0), None, work.global_counts)
            mx.eval(step.state, step_metrics)
    return steps
