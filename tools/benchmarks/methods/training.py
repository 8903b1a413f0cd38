"""Training loop and evaluation of the methods whose forward pass is not the package's own.

A forward pass is a function of a micro-batch that returns the final-norm states. Trainable weights are kept outside of
it, as a tree of arrays {"experts": ..., "router": ...}. So a loss is a pure function of the weights and a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from dylora_mlx.config import TrainingConfig
from dylora_mlx.data.stream import BatchPlan
from dylora_mlx.model.kernels import chunked_loss, streams
from dylora_mlx.training.step.domains import Domain
from dylora_mlx.training.step.losses import MicroBatch, device_batch
from dylora_mlx.training.step.optimizers import Optimizers, lr_schedule, make_optimizers
from dylora_mlx.training.step.step import global_norm
from methods.bench import Bench, Row

Learned = dict[str, Any]
"""Trainable weights, float32: `experts` and optionally `router`, each with its own learning rate."""
Forward = Callable[[MicroBatch], mx.array]
"""Returns the final-norm states [B, L, D] of a micro-batch."""
Loss = Callable[[Learned, MicroBatch], mx.array]
"""Returns the summed loss, in nats, of the tokens of a micro-batch that have one."""
Penalty = Callable[[Learned], mx.array]
"""Returns the term that is added once per step to the loss in nats per token."""
Gradients = Callable[[Learned, list[MicroBatch]], tuple[Learned, mx.array]]
"""Returns the gradients of a step, and its number of tokens with a loss."""


class Trained(NamedTuple):
    """Result of a training."""

    learned: Learned
    """Weights after the last step."""
    steps: int
    tokens: int
    """Tokens with a loss in these steps."""


def train(
    bench: Bench, learned: Learned, loss: Loss, plan: BatchPlan, steps: int, penalty: Penalty | None = None
) -> Trained:
    """Train with AdamW, from new moments, on the first steps of a plan.

    The learning-rate schedule of the config spans these steps. `learned` is not changed.

    Args:
        bench: The bench; its config has the training settings.
        learned: Initial weights.
        loss: Summed loss of a micro-batch. Arrays that it captures must be evaluated.
        plan: Batches, at least `steps` steps of them.
        steps: Optimizer steps.
        penalty: Term added once per step, or None. Arrays that it captures must be evaluated.
    """
    training, optimizers = bench.config.training, make_optimizers(bench.config.training)
    current = {"learned": tree_map(lambda a: a + 0, learned)}
    for name, optimizer in _owned(current["learned"], optimizers):
        optimizer.init(current["learned"][name])
    update = partial(_update, current, optimizers, training, partial(_gradients, bench, loss, penalty))
    if bench.compiled:
        state = [current, *optimizers.state]
        update = partial(mx.compile, inputs=state, outputs=state)(update)
    token_counts = []
    with closing(bench.feed(plan, bench.window).steps(0, steps)) as feed:
        for number, step_work in enumerate(feed):
            optimizers.set_learning_rates(lr_schedule(number, steps, training), training)
            # Evaluate what the micro-batches share before they run concurrently on several streams.
            mx.eval(current, step_work.batches)
            token_counts.append(update(step_work.batches))
            mx.eval(current, optimizers.state, token_counts[-1])
    return Trained(current["learned"], len(token_counts), sum(int(np.array(count)) for count in token_counts))


def _owned(learned: Learned, optimizers: Optimizers) -> list[tuple[str, Any]]:
    """Return (name, optimizer) of each group of weights in the tree."""
    return [(name, optimizer) for name, optimizer in optimizers._asdict().items() if name in learned]


def _update(
    current: dict[str, Learned],
    optimizers: Optimizers,
    training: TrainingConfig,
    gradients: Gradients,
    batches: list[MicroBatch],
) -> mx.array:
    """Make one optimizer step in place; return the number of tokens with a loss."""
    learned = current["learned"]
    grads, tokens = gradients(learned, batches)
    if training.max_grad_norm:
        factor = mx.minimum(1.0, training.max_grad_norm / (global_norm(grads) + 1e-6))
        grads = tree_map(lambda g: g * factor, grads)
    current["learned"] = {
        name: optimizer.apply_gradients(grads[name], learned[name]) for name, optimizer in _owned(learned, optimizers)
    }
    return tokens


def _gradients(
    bench: Bench, loss: Loss, penalty: Penalty | None, learned: Learned, batches: list[MicroBatch]
) -> tuple[Learned, mx.array]:
    """Return the gradients of a step's mean loss and of the penalty, and the number of tokens with a loss.

    As in the package's Step, each micro-batch is weighted by its number of these tokens.
    """
    # Each micro-batch needs its own copy of the tree: while mx.grad traces, it puts tracers into its argument.
    work = [partial(mx.grad(loss), tree_map(lambda a: a, learned), batch) for batch in batches]
    parts = [run_batch() for run_batch in work] if bench.compiled else streams.run_concurrently(work)
    tokens = mx.stack([batch.weights.sum() for batch in batches]).sum()
    grads = tree_map(lambda *g: sum(g[1:], g[0]) / mx.maximum(tokens, 1), *parts)
    if penalty is not None:
        grads = tree_map(mx.add, grads, mx.grad(penalty)(tree_map(lambda a: a, learned)))
    return grads, tokens


def summed_loss(bench: Bench, hidden: mx.array, batch: MicroBatch, differentiable: bool = True) -> mx.array:
    """Return the summed loss of a micro-batch, in nats, from its final-norm states [B, L, D]."""
    selected, layer = (
        hidden.reshape(-1, hidden.shape[-1])[batch.target_positions],
        chunked_loss.output_layer(bench.base.model),
    )
    nats = chunked_loss.token_losses(
        layer, selected, batch.targets, chunked_loss.tile_size(len(selected)), differentiable
    )
    return (nats * batch.weights).sum()


def losses(bench: Bench, forward: Forward, split: str = "validation", names: Collection[str] | None = None) -> Row:
    """Return the mean loss in nats per token of every domain, or of the named ones, under a forward pass."""

    def measure(batch: MicroBatch) -> mx.array:
        return summed_loss(bench, forward(batch), batch, differentiable=False)

    measure_batch, row = mx.compile(measure) if bench.compiled else measure, {}
    for name, domain in bench.domains(split).items():
        if names is None or name in names:
            work = [partial(measure_batch, batch) for batch in on_device(bench, domain)]
            summed = [run_batch() for run_batch in work] if bench.compiled else streams.run_concurrently(work)
            tokens = sum(int(batch.loss_mask.sum()) for batch in domain.batches)
            row[name] = sum(float(np.array(loss)) for loss in summed) / tokens
    return row


def on_device(bench: Bench, domain: Domain) -> list[MicroBatch]:
    """Return a domain's batches as micro-batches on the device."""
    return [device_batch(batch, bench.window, max_targets=domain.max_targets) for batch in domain.batches]
