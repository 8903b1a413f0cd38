"""The training loop and the evaluation that methods share whose forward pass is not the package's own.

A forward pass is a function of a micro-batch that returns the final-norm states; what is learned is a tree of arrays
beside it, {"experts": ..., "router": ...}, so that a loss is a plain function of both.
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
from dylora_mlx.training.step.evaluate import Domain
from dylora_mlx.training.step.losses import MicroBatch, device_batch
from dylora_mlx.training.step.optimizers import Optimizers, lr_schedule, make_optimizers
from dylora_mlx.training.step.step import global_norm
from methods.bench import Bench, Row

Learned = dict[str, Any]
"""What is trained, float32: `experts` with the experts' learning rate and, if there is one, `router` with the router's."""
Forward = Callable[[MicroBatch], mx.array]
"""Final-norm states [B, L, D] of a micro-batch."""
Loss = Callable[[Learned, MicroBatch], mx.array]
"""Nats summed over the learned tokens of a micro-batch."""
Penalty = Callable[[Learned], mx.array]
"""What is added once a step to the nats a token."""
Gradients = Callable[[Learned, list[MicroBatch]], tuple[Learned, mx.array]]
"""Of a step, and the number of tokens that it learns."""


class Trained(NamedTuple):
    """learned: as it ended; steps: that were made; tokens: learned in them."""

    learned: Learned
    steps: int
    tokens: int


def train(
    bench: Bench, learned: Learned, loss: Loss, plan: BatchPlan, steps: int, penalty: Penalty | None = None
) -> Trained:
    """AdamW with fresh moments over the first steps of a plan, the run's schedule stretched over them.

    Arrays that `loss` and `penalty` hold beside their arguments must be evaluated. `learned` itself is left as it is.
    """
    training, optimizers = bench.config.training, make_optimizers(bench.config.training)
    held = {"learned": tree_map(lambda a: a + 0, learned)}
    for name, optimizer in _owned(held["learned"], optimizers):
        optimizer.init(held["learned"][name])
    update = partial(_update, held, optimizers, training, partial(_gradients, bench, loss, penalty))
    if bench.compiled:
        state = [held, *optimizers.state]
        update = partial(mx.compile, inputs=state, outputs=state)(update)
    tokens = []
    with closing(bench.feed(plan, bench.base.args.sliding_window).steps(0, steps)) as works:
        for number, work in enumerate(works):
            optimizers.set_learning_rates(lr_schedule(number, steps, training), training)
            mx.eval(held, work.batches)  # what the lanes share must be there already
            tokens.append(update(work.batches))
            mx.eval(held, optimizers.state, tokens[-1])
    return Trained(held["learned"], len(tokens), sum(int(np.array(count)) for count in tokens))


def _owned(learned: Learned, optimizers: Optimizers) -> list[tuple[str, Any]]:
    return [(name, optimizer) for name, optimizer in optimizers._asdict().items() if name in learned]


def _update(
    held: dict[str, Learned],
    optimizers: Optimizers,
    training: TrainingConfig,
    gradients: Gradients,
    batches: list[MicroBatch],
) -> mx.array:
    """One step, in place; returns the number of learned tokens."""
    learned = held["learned"]
    grads, tokens = gradients(learned, batches)
    if training.max_grad_norm:
        factor = mx.minimum(1.0, training.max_grad_norm / (global_norm(grads) + 1e-6))
        grads = tree_map(lambda g: g * factor, grads)
    held["learned"] = {
        name: optimizer.apply_gradients(grads[name], learned[name]) for name, optimizer in _owned(learned, optimizers)
    }
    return tokens


def _gradients(
    bench: Bench, loss: Loss, penalty: Penalty | None, learned: Learned, batches: list[MicroBatch]
) -> tuple[Learned, mx.array]:
    """Gradients of a step's nats a token, with the penalty, and the number of learned tokens: as in the package's Step,
    micro-batches weigh as many tokens as are learned in them."""
    # Every piece of work has a tree of its own: a gradient's tracers stand in its argument while it is traced.
    work = [partial(mx.grad(loss), tree_map(lambda a: a, learned), batch) for batch in batches]
    parts = [piece() for piece in work] if bench.compiled else streams.run_concurrently(work)
    tokens = mx.stack([batch.weights.sum() for batch in batches]).sum()
    grads = tree_map(lambda *g: sum(g[1:], g[0]) / mx.maximum(tokens, 1), *parts)
    if penalty is not None:
        grads = tree_map(mx.add, grads, mx.grad(penalty)(tree_map(lambda a: a, learned)))
    return grads, tokens


def summed_loss(bench: Bench, hidden: mx.array, batch: MicroBatch, differentiable: bool = True) -> mx.array:
    """Nats summed over the learned tokens of a micro-batch, of its final-norm states [B, L, D]."""
    found, layer = (
        hidden.reshape(-1, hidden.shape[-1])[batch.target_positions],
        chunked_loss.output_layer(bench.base.model),
    )
    each = chunked_loss.token_losses(layer, found, batch.targets, chunked_loss.tile_size(len(found)), differentiable)
    return (each * batch.weights).sum()


def losses(bench: Bench, forward: Forward, split: str = "validation", names: Collection[str] | None = None) -> Row:
    """Nats per learned token of every domain, or of those named, under a forward pass."""

    def measure(batch: MicroBatch) -> mx.array:
        return summed_loss(bench, forward(batch), batch, differentiable=False)

    run, found = mx.compile(measure) if bench.compiled else measure, {}
    for name, domain in bench.domains(split).items():
        if names is None or name in names:
            work = [partial(run, batch) for batch in on_device(bench, domain)]
            summed = [piece() for piece in work] if bench.compiled else streams.run_concurrently(work)
            tokens = sum(int(batch.loss_mask.sum()) for batch in domain.batches)
            found[name] = sum(float(np.array(loss)) for loss in summed) / tokens
    return found


def on_device(bench: Bench, domain: Domain) -> list[MicroBatch]:
    """A domain's batches as micro-batches."""
    window = bench.base.args.sliding_window
    return [device_batch(batch, window, max_targets=domain.max_targets) for batch in domain.batches]
