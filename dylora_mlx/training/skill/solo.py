"""One expert trained by itself, every token on it: a trial, a merged expert's tuning, a rank's loss."""

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
"""Logit of the only expert against the base's 0: the gate is 1 to the last bit of a float32."""


@dataclass(frozen=True)
class SelectedArrays:
    """The values of some pieces, in their order."""

    values: SegmentArrays
    chosen: list[int]

    def __getitem__(self, index: int, /) -> np.ndarray:
        return self.values[self.chosen[index]]


def select_segments(
    split: Split, features: SegmentArrays | None, chosen: list[int]
) -> tuple[Split, SegmentArrays | None]:
    """The pieces of a split with these numbers, and their features."""
    pieces = [split.segments[i] for i in chosen]
    documents = len({piece.document for piece in pieces})
    return Split(pieces, documents), None if features is None else SelectedArrays(features, chosen)


def solo_model(base: Base, config: Config, expert: Expert) -> RoutedDecoder:
    """A model with this expert only, and a gate that sends every token to it."""
    model = RoutedDecoder(base, config.model.projections, config.model.router_layer, config.training.grad_checkpoint)
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
    """Train the only expert of `model` (from `routed_alone`) on a split; return the number of steps.

    The learning rate follows the run's schedule over `steps`. features: of the split's pieces, if they are at hand.
    """
    training = replace(config.training, rehearsal_coef=0.0, z_loss_coef=0.0, load_balance_coef=0.0)
    optimizers = make_optimizers(training)
    optimizers.init(model)
    size = (training.batch_size, training.grad_accumulation_steps)
    plan = BatchPlan.plan(split, config.data, 1, *size, seed, fixed=compiled)
    epochs = -(-steps // len(plan))
    plan = plan if epochs == 1 else BatchPlan.plan(split, config.data, epochs, *size, seed, fixed=compiled)
    feed = Prefetcher(plan, features, Library(""), training.rehearsal_tokens, seed, 0, model.window)
    step = Step(model, optimizers, training, None, 1, compiled)
    steps = min(steps, len(plan))
    with closing(feed.steps(0, steps)) as works:
        for number, work in enumerate(console.track(works, "  training one expert alone", steps)):
            world().raise_if_stop_requested(
                "stopped before the skill was learned; nothing is lost, go on with --resume"
            )
            optimizers.set_learning_rates(lr_schedule(number, steps, training), training)
            outcome = step(work.batches, work.memory, mx.array(1.0), None, work.global_counts)
            mx.eval(step.state, outcome)
    return steps
