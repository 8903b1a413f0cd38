"""Evaluation of domains, forward only."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx.data.packing import Batch
from dylora_mlx.model import head, lanes
from dylora_mlx.model.gemma3 import Adapters, RoutedGemma3
from dylora_mlx.model.router import Routing
from dylora_mlx.training import objective
from dylora_mlx.training.objective import MicroBatch


@dataclass
class Domain:
    """A named set of packed rows. The base's features are kept from the first evaluation on, if they are final states:
    as float16, or as they are if one does not fit."""

    name: str
    batches: list[Batch]
    features: list[mx.array] = field(default_factory=list)


class Evaluation(NamedTuple):
    """loss: nats per learned token; tokens: their number; usage: mean gate of each column; entropy: of the gates."""

    loss: float
    tokens: int
    usage: list[float]
    entropy: float


def device_batch(
    batch: Batch, window: int, features: np.ndarray | None = None, positions: int | None = None
) -> MicroBatch:
    return objective.micro_batch(batch.inputs, batch.targets, batch.learn, batch.segments, features, window, positions)


def evaluate(
    model: RoutedGemma3,
    domain: Domain,
    routing: Routing,
    forced: int | None = None,
    adapters: Adapters | None = None,
) -> Evaluation:
    """Loss of a domain under a routing, or with every token sent to column `forced` (0: the base alone).

    adapters: from `model.adapters`, to lay the weights out once for several domains.
    """
    adapters = adapters or model.adapters()
    batches = [device_batch(batch, model.window) for batch in domain.batches]
    if model.tap == "final" and not domain.features:
        domain.features = _features(model, batches)
    mx.eval(adapters, routing.temperature)
    features = domain.features or [None] * len(batches)
    work = [
        partial(_measure, model, batch._replace(features=known), routing, forced, adapters)
        for batch, known in zip(batches, features, strict=True)
    ]
    measured = lanes.run(work)
    counts = np.array([batch.real.sum().item() for batch in batches])
    loss = sum(float(np.array(summed)) for summed, _, _ in measured)
    usage, entropy = (counts / counts.sum() @ np.array([np.array(m[i]) for m in measured]) for i in (1, 2))
    tokens = sum(int(batch.learn.sum()) for batch in domain.batches)
    return Evaluation(loss / tokens, tokens, usage.tolist(), float(entropy))


def _features(model: RoutedGemma3, batches: list[MicroBatch]) -> list[mx.array]:
    """The router's features of all batches, float16 if every value fits."""

    def exact(batch: MicroBatch) -> mx.array:
        return model.features(batch.inputs, objective.layout(batch, model.window))

    def half(batch: MicroBatch) -> tuple[mx.array, mx.array]:
        found = exact(batch).astype(mx.float16)
        return found, mx.isfinite(found).all()

    found, finite = zip(*lanes.run([partial(half, batch) for batch in batches]), strict=True)
    if all(flag.item() for flag in finite):
        return list(found)
    return lanes.run([partial(exact, batch) for batch in batches])


def _measure(
    model: RoutedGemma3, batch: MicroBatch, routing: Routing, forced: int | None, adapters: Adapters
) -> tuple[mx.array, mx.array, mx.array]:
    """Summed loss, mean gates [E] and mean entropy of a batch."""
    columns = len(model.experts) + 1
    gates = None
    if forced is not None:
        gates = mx.broadcast_to(mx.arange(columns) == forced, (*batch.inputs.shape, columns)).astype(mx.float32)
    if batch.features is not None and (forced == 0 or columns == 1):
        # The base alone: its final states are the features.
        hidden = batch.features.astype(model.base.model.norm.weight.dtype)
        gates = mx.ones((*batch.inputs.shape, 1)) if gates is None else gates
    else:
        out = model(
            batch.inputs, objective.layout(batch, model.window), routing, batch.features, gates, adapters=adapters
        )
        hidden, gates = out.hidden, out.gates
    states = hidden.reshape(-1, hidden.shape[-1])[batch.positions]
    tile = head.tile_size(len(states))
    each = head.token_losses(model.head, states, batch.targets, tile, differentiable=False)
    return (each * batch.weights).sum(), *objective.usage(gates, batch.real)
