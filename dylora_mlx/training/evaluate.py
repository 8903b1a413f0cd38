"""Evaluation of domains, forward only, and the base's states of a skill's pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx.data.packing import Batch, Piece
from dylora_mlx.data.stream import evaluation_batches
from dylora_mlx.model import attention, head, lanes
from dylora_mlx.model.gemma3 import Adapters, RoutedGemma3
from dylora_mlx.model.router import Routing
from dylora_mlx.training import objective
from dylora_mlx.training.objective import MicroBatch

CHUNK = 8
"""Batches whose states are computed before any is laid aside."""


@dataclass
class Domain:
    """A named set of packed rows. The base's features are kept from the first evaluation on, if they are final states."""

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
        domain.features = lanes.run([partial(model.features, b.inputs, b.where) for b in batches])
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


def _measure(
    model: RoutedGemma3, batch: MicroBatch, routing: Routing, forced: int | None, adapters: Adapters
) -> tuple[mx.array, mx.array, mx.array]:
    """Summed loss, mean gates [E] and mean entropy of a batch."""
    columns = len(model.experts) + 1
    gates = None
    if forced is not None:
        gates = mx.broadcast_to(mx.arange(columns) == forced, (*batch.inputs.shape, columns)).astype(mx.float32)
    if batch.features is not None and (forced == 0 or columns == 1):
        hidden = batch.features  # the base alone: its final states are the features
        gates = mx.ones((*batch.inputs.shape, 1)) if gates is None else gates
    else:
        out = model(batch.inputs, batch.where, routing, batch.features, gates, adapters=adapters)
        hidden, gates = out.hidden, out.gates
    states = hidden.reshape(-1, hidden.shape[-1])[batch.positions]
    tile = head.tile_size(len(states))
    each = head.token_losses(model.head, states, batch.targets, tile, differentiable=False)
    return (each * batch.weights).sum(), *objective.usage(gates, batch.real)


def base_states(
    model: RoutedGemma3, pieces: Sequence[Piece], row_length: int, rows: int, tap: int | str
) -> list[np.ndarray]:
    """Per-piece states [positions, D] of the base alone: final-norm states, or the router's features for an inner tap.

    Packing does not change them, so they serve every epoch's packing (`stream.gather` lays them out).
    """

    def computed(batch: Batch) -> mx.array:
        tokens, where = mx.array(batch.inputs), attention.layout(batch.segments, model.window)
        states = model.base_states(tokens, where) if tap == "final" else model.features(tokens, where)
        return states.astype(mx.float32)

    found: list[np.ndarray | None] = [None] * len(pieces)
    batches = evaluation_batches(pieces, row_length, rows)
    for begin in range(0, len(batches), CHUNK):
        together = batches[begin : begin + CHUNK]
        for batch, states in zip(
            together, map(np.array, lanes.run([partial(computed, b) for b in together])), strict=True
        ):
            for r, row in enumerate(batch.pieces):
                at = 0
                for index in row:
                    n = pieces[index].positions
                    found[index] = states[r, at : at + n].copy()
                    at += n
    return [s for s in found if s is not None]
