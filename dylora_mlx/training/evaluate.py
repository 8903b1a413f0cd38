"""Evaluation of domains, forward only, and the base's states of a skill's pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import mlx.core as mx
import numpy as np

from dylora_mlx import blas
from dylora_mlx.data.packing import Batch, Piece
from dylora_mlx.data.stream import evaluation_batches
from dylora_mlx.model import attention, head, lanes
from dylora_mlx.model.gemma3 import RoutedGemma3
from dylora_mlx.model.router import Routing
from dylora_mlx.training import objective
from dylora_mlx.training.objective import MicroBatch


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


def device_batch(batch: Batch, window: int, features: np.ndarray | None = None) -> MicroBatch:
    return objective.micro_batch(batch.inputs, batch.targets, batch.learn, batch.segments, features, window)


def evaluate(model: RoutedGemma3, domain: Domain, routing: Routing, forced: int | None = None) -> Evaluation:
    """Loss of a domain under a routing, or with every token sent to column `forced` (0: the base alone)."""
    loss, tokens, positions, entropy, usage = 0.0, 0, 0.0, 0.0, np.zeros(len(model.experts) + 1)
    for together in _together(range(len(domain.batches))):
        measured = []
        for lane, i in enumerate(together):
            with mx.stream(lanes.stream(lane)):
                measured.append(_measure(model, domain, i, routing, forced))
        mx.eval(measured)
        for i, (summed, used, mean_entropy, count) in zip(together, measured, strict=True):
            loss += float(np.array(summed))
            tokens += int(domain.batches[i].learn.sum())
            usage += np.array(used) * np.array(count)
            entropy += float(np.array(mean_entropy * count))
            positions += float(np.array(count))
    return Evaluation(loss / tokens, tokens, (usage / positions).tolist(), entropy / positions)


def _measure(
    model: RoutedGemma3, domain: Domain, number: int, routing: Routing, forced: int | None
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Summed loss, mean gates [E], mean entropy and count of real positions of one batch, not evaluated yet."""
    batch = domain.batches[number]
    micro = device_batch(batch, model.window)
    if model.tap == "final" and number == len(domain.features):
        domain.features.append(model.features(micro.inputs, micro.where))
    gates = None
    if forced is not None:
        columns = len(model.experts) + 1
        gates = mx.broadcast_to(mx.arange(columns) == forced, (*batch.inputs.shape, columns)).astype(mx.float32)
    features = domain.features[number] if model.tap == "final" else None
    if features is not None and (forced == 0 or not model.experts):
        hidden = features  # the base alone: its final states are the features
        gates = mx.ones((*batch.inputs.shape, 1)) if gates is None else gates
    else:
        out = model(micro.inputs, micro.where, routing, features, gates)
        hidden, gates = out.hidden, out.gates
    states = hidden.reshape(-1, hidden.shape[-1])[micro.positions]
    chunk = head.chunk_size(model.base.args.vocab_size)
    each = head.token_losses(model.head, states, micro.targets, chunk, differentiable=False)
    used, mean_entropy = objective.usage(gates, micro.real)
    return (each * micro.weights).sum(), used, mean_entropy, micro.real.sum()


def base_states(
    model: RoutedGemma3, pieces: Sequence[Piece], row_length: int, rows: int, tap: int | str
) -> list[np.ndarray]:
    """Per-piece states [positions, D] of the base alone: final-norm states, or the router's features for an inner tap.

    Packing does not change them, so they serve every epoch's packing (`stream.gather` lays them out).
    """
    found: list[np.ndarray | None] = [None] * len(pieces)
    for together in _together(evaluation_batches(pieces, row_length, rows)):
        computed = []
        for lane, batch in enumerate(together):
            with mx.stream(lanes.stream(lane)):
                tokens, where = mx.array(batch.inputs), attention.layout(batch.segments, model.window)
                states = model.base_states(tokens, where) if tap == "final" else model.features(tokens, where)
                computed.append(states.astype(mx.float32))
        mx.eval(computed)
        for batch, states in zip(together, map(np.array, computed), strict=True):
            for r, row in enumerate(batch.pieces):
                at = 0
                for index in row:
                    n = pieces[index].positions
                    found[index] = states[r, at : at + n].copy()
                    at += n
    return [s for s in found if s is not None]


T = TypeVar("T")


def _together(work: Sequence[T]) -> list[Sequence[T]]:
    """Work in groups that the device's lanes take at once."""
    return [work[i : i + blas.LANES] for i in range(0, len(work), blas.LANES)]
