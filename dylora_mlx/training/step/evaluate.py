"""Evaluation of domains, forward only."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx.data import stream
from dylora_mlx.data.packing import Batch
from dylora_mlx.data.stream import Split
from dylora_mlx.distributed.group import world
from dylora_mlx.model.decoder.decoder import Adapters, RoutedDecoder
from dylora_mlx.model.kernels import chunked_loss, streams
from dylora_mlx.model.routing.router import Routing, forced_routing
from dylora_mlx.system import console
from dylora_mlx.training.step.losses import MicroBatch, batch_layout, device_batch, expert_usage, forward_routed

BatchResult = tuple[mx.array, mx.array, mx.array]
"""Of a batch: summed loss, mean gates [E], mean entropy."""


@dataclass
class Domain:
    """A named set of packed rows, with room for `targets` learned positions a batch if shapes are fixed.

    first: the rank that measures the first batch, the others follow in turn. The base's features of the own batches are kept
    from the first evaluation on, if they are final states: as float16, or as they are if one does not fit.
    """

    name: str
    batches: list[Batch]
    max_targets: int | None = None
    features: list[mx.array] = field(default_factory=list)
    first_rank: int = 0

    @property
    def local_batches(self) -> list[Batch]:
        """The batches that this rank measures."""
        return world().shard(self.batches, self.first_rank)


def make_domains(
    splits: dict[str, Split], max_seq_length: int, batch_size: int, fixed: bool = False
) -> dict[str, Domain]:
    """A domain of each split, by name; `fixed`: all batches of all of them have the same shapes."""
    made: dict[str, Domain] = {}
    dealt = 0
    for name, split in splits.items():
        batches = stream.evaluation_batches(split.segments, max_seq_length, batch_size, fixed)
        made[name] = Domain(name, batches, first_rank=dealt % world().world_size)
        dealt += len(batches)
    if fixed:
        room = max(int(batch.loss_mask.sum()) for domain in made.values() for batch in domain.batches)
        made = {name: replace(domain, max_targets=room) for name, domain in made.items()}
    return made


class Evaluation(NamedTuple):
    """loss: nats per learned token; tokens: their number; usage: mean gate of each column; entropy: of the gates."""

    loss: float
    tokens: int
    usage: list[float]
    entropy: float


class Evaluator:
    """Measures one batch, forward only; compiled on request, and traced again when shapes, top_k or the pool change.

    `compilations` counts the traces.
    """

    def __init__(self, model: RoutedDecoder, compiled: bool):
        self.model, self.compiled, self.compilations = model, compiled, 0
        self._compiled = mx.compile(self._traced)

    def evaluate_batches(
        self, batches: list[MicroBatch], routing: Routing, forced: int | None, adapters: Adapters
    ) -> list[BatchResult]:
        """Of every batch the summed loss, mean gates [E] and mean entropy."""
        expert_ids, alone = len(adapters.gate.bias), forced == 0 or len(adapters.gate.bias) == 1
        # A column to go to is data: a compiled function is not traced again for each.
        fixed = None if forced is None else mx.array(np.eye(expert_ids, dtype=np.float32)[forced])
        mx.eval(adapters, routing.temperature)
        if self.compiled and adapters.stack.load_experts is None:  # what is read depends on the gates
            return [self._started(batch, routing, fixed, alone, adapters) for batch in batches]
        return streams.run_concurrently(
            [partial(_evaluate_batch, self.model, b, routing, fixed, alone, adapters) for b in batches]
        )

    def _started(self, *arguments: Any) -> BatchResult:
        found = self._compiled(*arguments)
        mx.async_eval(found)
        return found

    def _traced(self, *arguments: Any) -> BatchResult:
        self.compilations += 1
        return _evaluate_batch(self.model, *arguments)


def evaluate(
    model: RoutedDecoder,
    domain: Domain,
    routing: Routing,
    forced: int | None = None,
    adapters: Adapters | None = None,
    evaluator: Evaluator | None = None,
) -> Evaluation:
    """Loss of a domain under a routing, or with every token sent to column `forced` (0: the base alone), of any routing.

    adapters: from `model.adapters`, to lay the weights out once for several domains; measure: to compile it once.
    """
    adapters, evaluator = adapters or model.adapters(routing.top_k), evaluator or Evaluator(model, compiled=False)
    found = evaluator.evaluate_batches(_device_batches(model, domain), routing, forced, adapters)
    (whole,) = _gather_results([domain], [found], len(adapters.gate.bias))
    return _summarize(domain, whole)


def evaluate_all(evaluator: Evaluator, domains: dict[str, Domain], routing: Routing) -> dict[str, Evaluation]:
    """Every domain by name, with the weights laid out once."""
    model, adapters = evaluator.model, evaluator.model.adapters(routing.top_k)
    shown = console.track(domains.values(), "  evaluating", len(domains))
    found = [evaluator.evaluate_batches(_device_batches(model, domain), routing, None, adapters) for domain in shown]
    whole = _gather_results(list(domains.values()), found, len(adapters.gate.bias))
    return {name: _summarize(domains[name], each) for name, each in zip(domains, whole, strict=True)}


def _gather_results(domains: list[Domain], found: list[list[BatchResult]], expert_ids: int) -> list[list[BatchResult]]:
    """What was measured of every batch of some domains, from what each rank found of its own. columns: gates."""
    group = world()
    if group.world_size == 1:
        return found
    tables = [np.zeros((len(domain.batches), expert_ids + 2), np.float32) for domain in domains]
    for domain, table, own in zip(domains, tables, found, strict=True):
        mine = group.shard(range(len(table)), domain.first_rank)
        for place, (loss, gates, entropy) in zip(mine, own, strict=True):
            table[place] = np.array(loss), *np.array(gates, np.float32), np.array(entropy)
    whole = np.split(group.all_reduce(np.concatenate(tables)), np.cumsum([len(table) for table in tables])[:-1])
    return [[(mx.array(r[0]), mx.array(r[1:-1]), mx.array(r[-1])) for r in table] for table in whole]


def _summarize(domain: Domain, measured: list[BatchResult]) -> Evaluation:
    """The evaluation that all batches of a domain come to."""
    counts = np.array([(batch.segment_ids > 0).sum() for batch in domain.batches])
    loss = sum(float(np.array(summed)) for summed, _, _ in measured)
    usage, entropy = (counts / counts.sum() @ np.array([np.array(m[i]) for m in measured]) for i in (1, 2))
    tokens = sum(int(batch.loss_mask.sum()) for batch in domain.batches)
    return Evaluation(loss / tokens, tokens, usage.tolist(), float(entropy))


def losses_by_segment(model: RoutedDecoder, domain: Domain, expert_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses of a domain's pieces with every token sent to one column: summed nats and learned tokens, float64 [n] each,
    in the order of the batches."""
    routing = forced_routing()
    adapters, batches = model.adapters(routing.top_k), _device_batches(model, domain)
    expert_ids = len(adapters.gate.bias)
    fixed = mx.array(np.eye(expert_ids, dtype=np.float32)[expert_id])
    mx.eval(adapters, fixed, routing.temperature)
    work = [partial(_target_losses, model, b, routing, fixed, expert_id == 0, adapters) for b in batches]
    found = []
    for batch, moved, (each, _) in zip(domain.local_batches, batches, streams.run_concurrently(work), strict=True):
        positions, weights = np.array(moved.target_positions), np.array(moved.weights, np.float64)
        owners = _segment_of_position(batch)[positions]
        size = sum(len(row) for row in batch.rows)
        sums = np.bincount(owners, weights * np.array(each, np.float64), size)
        found.append((sums.tolist(), np.bincount(owners, weights, size).tolist()))
    dealt = world().all_gather_object(found)
    size, first = len(dealt), domain.first_rank
    whole = [dealt[(first + number) % size][number // size] for number in range(len(domain.batches))]
    return np.concatenate([sums for sums, _ in whole]), np.concatenate([counts for _, counts in whole])


def _segment_of_position(batch: Batch) -> np.ndarray:
    """The piece that each position of a batch belongs to, counted from the batch's first, int [B * L]; padding: 0."""
    starts = np.cumsum([0, *(len(row) for row in batch.rows)])[: len(batch.rows)]
    starts = np.pad(starts, (0, len(batch.segment_ids) - len(starts)))
    return np.maximum(starts[:, None] + batch.segment_ids - 1, 0).reshape(-1)


def _device_batches(model: RoutedDecoder, domain: Domain) -> list[MicroBatch]:
    """This rank's batches of a domain on the device, with the base's features if they are final states."""
    batches = [device_batch(batch, model.window, max_targets=domain.max_targets) for batch in domain.local_batches]
    if model.router_layer == "final" and not domain.features:
        domain.features = _features(model, batches)
    if domain.features:
        batches = [batch._replace(features=f) for batch, f in zip(batches, domain.features, strict=True)]
    return batches


def _features(model: RoutedDecoder, batches: list[MicroBatch]) -> list[mx.array]:
    """The router's features of the batches, float16 if every value fits."""

    def exact(batch: MicroBatch) -> mx.array:
        return model.router_features(batch.inputs, batch_layout(batch, model.window))

    def half(batch: MicroBatch) -> tuple[mx.array, mx.array]:
        found = exact(batch).astype(mx.float16)
        return found, mx.isfinite(found).all()

    found = streams.run_concurrently([partial(half, batch) for batch in batches])
    if all(finite.item() for _, finite in found):
        return [features for features, _ in found]
    return streams.run_concurrently([partial(exact, batch) for batch in batches])


def _evaluate_batch(
    model: RoutedDecoder, batch: MicroBatch, routing: Routing, fixed: mx.array | None, alone: bool, adapters: Adapters
) -> BatchResult:
    each, gates = _target_losses(model, batch, routing, fixed, alone, adapters)
    return (each * batch.weights).sum(), *expert_usage(gates, batch.valid_mask)


def _target_losses(
    model: RoutedDecoder, batch: MicroBatch, routing: Routing, fixed: mx.array | None, alone: bool, adapters: Adapters
) -> tuple[mx.array, mx.array]:
    """Loss of every target [N], and gates [B, L, E].

    fixed: gates [E] of every token instead of the router's; alone: they are the base's.
    """
    expert_ids = len(adapters.gate.bias)
    gates = None if fixed is None else mx.broadcast_to(fixed, (*batch.inputs.shape, expert_ids))
    if batch.features is not None and alone:
        # The base alone: its final states are the features.
        hidden = batch.features.astype(model.base.model.norm.weight.dtype)
        gates = mx.ones((*batch.inputs.shape, 1)) if gates is None else gates
    else:
        out = forward_routed(model, batch, routing, adapters, gates)
        hidden, gates = out.hidden, out.gates
    states = hidden.reshape(-1, hidden.shape[-1])[batch.target_positions]
    tile = chunked_loss.tile_size(len(states))
    return chunked_loss.token_losses(model.head, states, batch.targets, tile, differentiable=False), gates
