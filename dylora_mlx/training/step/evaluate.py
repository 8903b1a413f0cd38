"""Evaluate domains, forward only: loss, expert usage and routing entropy. Batches are sharded over ranks."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import numpy as np

from dylora_mlx.data.packing import Batch
from dylora_mlx.distributed.group import world
from dylora_mlx.model.decoder.decoder import Adapters, RoutedDecoder
from dylora_mlx.model.kernels import chunked_loss, streams
from dylora_mlx.model.routing import router
from dylora_mlx.model.routing.router import Routing, forced_routing
from dylora_mlx.system import blas, console
from dylora_mlx.training.step.domains import Domain
from dylora_mlx.training.step.losses import MicroBatch, batch_layout, device_batch, expert_usage, forward_routed

T = TypeVar("T")
BatchResult = tuple[mx.array, mx.array, mx.array, mx.array]
"""Results of one batch: loss summed over targets (nats), mean gates [E], mean routing entropy, loss of each target [N]."""


class BatchSums(NamedTuple):
    """Results of one batch on the host."""

    loss: float
    """Loss summed over targets, in nats."""
    usage: list[float]
    """Mean gate of each expert."""
    entropy: float
    """Mean routing entropy in nats."""
    segments: list[float]
    """Loss summed over the targets of each segment, in the order of the batch's rows."""


class Evaluation(NamedTuple):
    """Result of evaluating one domain."""

    loss: float
    """Mean cross-entropy in nats per target token."""
    tokens: int
    """Number of target tokens."""
    usage: list[float]
    """Mean gate of each expert over all tokens, the null expert first."""
    entropy: float
    """Mean routing entropy in nats."""
    documents: tuple[tuple[float, int], ...] = ()
    """Loss summed over each document's targets in nats, and its number of targets, in the order of the documents."""


class Evaluator:
    """Evaluate batches, forward only, with one function compiled for all domains.

    The function is traced again when shapes, top_k or the pool change. `compilations` counts traces.

    Args:
        model: The routed model.
        compiled: Use `mx.compile`. Ignored when experts are offloaded.
    """

    def __init__(self, model: RoutedDecoder, compiled: bool):
        self.model, self.compiled, self.compilations = model, compiled, 0
        self._compiled = mx.compile(self._traced)

    def evaluate_batches(
        self, batches: list[MicroBatch], routing: Routing, forced: int | None, adapters: Adapters
    ) -> list[BatchResult]:
        """Return the result of each batch. `forced`: send every token to this expert_id; None: use the router."""
        num_experts, base_only = len(adapters.gate.bias), forced == 0 or len(adapters.gate.bias) == 1
        # One-hot gates as an array: a Python integer would be a constant of the trace, and each expert a new trace.
        forced_gates = None if forced is None else mx.array(np.eye(num_experts, dtype=np.float32)[forced])
        # Shared by all batches, which a CPU evaluates on several streams: evaluate before they start.
        mx.eval(adapters, routing.temperature, [] if forced_gates is None else forced_gates)
        # Which offloaded experts to read depends on gate values, which a compiled graph cannot look at.
        if self.compiled and adapters.stack.load_experts is None:
            return [self._evaluate_async(batch, routing, forced_gates, base_only, adapters) for batch in batches]
        return streams.run_concurrently(
            [partial(_evaluate_batch, self.model, b, routing, forced_gates, base_only, adapters) for b in batches]
        )

    def _evaluate_async(self, *arguments: Any) -> BatchResult:
        result = self._compiled(*arguments)
        # Start the device on this batch while Python prepares the next one.
        mx.async_eval(result)
        return result

    def _traced(self, *arguments: Any) -> BatchResult:
        # This Python code runs only while it is traced, so the counter counts traces.
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
    """Evaluate one domain.

    Args:
        model: The routed model.
        domain: The domain.
        routing: How the router's logits become gates.
        forced: Send every token to this expert_id (0: the base alone) and ignore the router. None: use the router.
        adapters: From `model.adapters`, to stack the weights once for several domains. None: stack them here.
        evaluator: To share one compiled function between domains. None: evaluate without compiling.
    """
    evaluator = evaluator or Evaluator(model, compiled=False)
    (sums,) = _evaluate_domains(evaluator, [domain], routing, forced, adapters or model.adapters(routing.top_k))
    return _summarize(domain, sums)


def evaluate_all(evaluator: Evaluator, domains: dict[str, Domain], routing: Routing) -> dict[str, Evaluation]:
    """Evaluate all domains with weights that are stacked once; return the results by name."""
    adapters = evaluator.model.adapters(routing.top_k)
    sums = _evaluate_domains(evaluator, list(domains.values()), routing, None, adapters, "  evaluating")
    return {name: _summarize(domain, each) for (name, domain), each in zip(domains.items(), sums, strict=True)}


def losses_by_segment(model: RoutedDecoder, domain: Domain, expert_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the losses of a domain's segments with every token sent to one expert (0: the base alone).

    Returns:
        Loss summed over each segment's targets in nats, and its number of targets, float64 [n] each, in the order of
        the batches.
    """
    routing, evaluator = forced_routing(), Evaluator(model, compiled=False)
    (sums,) = _evaluate_domains(evaluator, [domain], routing, expert_id, model.adapters(routing.top_k))
    return (
        np.concatenate([np.array(each.segments) for each in sums]),
        np.concatenate([_segment_targets(batch) for batch in domain.batches]),
    )


def expert_shares(model: RoutedDecoder, domains: dict[str, Domain], routing: Routing) -> dict[str, list[float]]:
    """Return the mean gate of each expert on each domain, the null expert first.

    The router reads features of the base, so no expert and no output head is computed: far cheaper than a loss.
    """
    batches = _device_batches(model, list(domains.values()))
    gate = model.router.gate()
    mx.eval(gate, routing.temperature)

    def mean_gates(batch: MicroBatch) -> tuple[mx.array, mx.array]:
        features = batch.features
        if features is None:
            features = model.router_features(batch.inputs, batch_layout(batch, model.window))
        _, gates = router.route(model.router_inputs(features, batch.document_starts), gate, routing)
        return expert_usage(gates, batch.valid_mask)

    results = [
        [BatchSums(0.0, np.array(usage).tolist(), np.array(entropy).item(), []) for usage, entropy in each]
        for each in _by_domain(batches, streams.run_concurrently([partial(mean_gates, b) for b in _flat(batches)]))
    ]
    gathered = _gather_sums(list(domains.values()), results)
    return {name: _mean_usage(d, sums)[0].tolist() for (name, d), sums in zip(domains.items(), gathered, strict=True)}


def _evaluate_domains(
    evaluator: Evaluator,
    domains: list[Domain],
    routing: Routing,
    forced: int | None,
    adapters: Adapters,
    title: str | None = None,
) -> list[list[BatchSums]]:
    """Return the sums of every batch of every domain, on every rank. `title`: show progress under it."""
    micro_batches = _device_batches(evaluator.model, domains)
    # All domains' batches in one sequence: a domain of one batch would leave a CPU's other stream idle.
    queue, results = _flat(micro_batches), []
    chunks = range(0, len(queue), blas.NUM_STREAMS)
    for begin in chunks if title is None else console.track(chunks, title, len(chunks)):
        results += evaluator.evaluate_batches(queue[begin : begin + blas.NUM_STREAMS], routing, forced, adapters)
    local_sums = [
        [_host_sums(*each) for each in zip(domain.local_batches, batches, of_domain, strict=True)]
        for domain, batches, of_domain in zip(domains, micro_batches, _by_domain(micro_batches, results), strict=True)
    ]
    return _gather_sums(domains, local_sums)


def _flat(batches: list[list[MicroBatch]]) -> list[MicroBatch]:
    return list(itertools.chain.from_iterable(batches))


def _by_domain(batches: list[list[MicroBatch]], results: list[T]) -> list[list[T]]:
    """Divide results, one for each batch of all domains, into those of each domain."""
    remaining = iter(results)
    return [list(itertools.islice(remaining, len(of_domain))) for of_domain in batches]


def _host_sums(batch: Batch, micro_batch: MicroBatch, result: BatchResult) -> BatchSums:
    loss, usage, entropy, losses = result
    segments = _segment_of_position(batch)[np.array(micro_batch.target_positions)]
    weighted = np.array(micro_batch.weights, np.float64) * np.array(losses, np.float64)
    sums = np.bincount(segments, weighted, sum(len(row) for row in batch.rows))
    return BatchSums(
        float(np.array(loss)), np.array(usage, np.float32).tolist(), float(np.array(entropy)), sums.tolist()
    )


def _gather_sums(domains: list[Domain], local_sums: list[list[BatchSums]]) -> list[list[BatchSums]]:
    """Combine the sums of all ranks: for each domain those of all its batches, on every rank, with all bits."""
    group = world()
    gathered = group.all_gather_object(local_sums)
    if group.world_size == 1:
        return local_sums
    size = group.world_size
    # Undo the sharding: batch i was evaluated by rank (first_rank + i) % size, as its (i // size)-th.
    return [
        [BatchSums(*gathered[(d.first_rank + i) % size][index][i // size]) for i in range(len(d.batches))]
        for index, d in enumerate(domains)
    ]


def _summarize(domain: Domain, sums: list[BatchSums]) -> Evaluation:
    """Aggregate the sums of batches: loss per target token, mean usage and entropy, and the sums of each document."""
    tokens = sum(int(batch.loss_mask.sum()) for batch in domain.batches)
    usage, entropy = _mean_usage(domain, sums)
    losses: dict[int, tuple[float, int]] = {}
    for batch, each in zip(domain.batches, sums, strict=True):
        segments = (index for row in batch.rows for index in row)
        for index, loss, targets in zip(segments, each.segments, _segment_targets(batch).tolist(), strict=True):
            document = index if domain.documents is None else domain.documents[index]
            before = losses.get(document, (0.0, 0))
            losses[document] = (before[0] + loss, before[1] + int(targets))
    documents = tuple(losses[document] for document in sorted(losses))
    return Evaluation(sum(each.loss for each in sums) / tokens, tokens, usage.tolist(), entropy, documents)


def _mean_usage(domain: Domain, sums: list[BatchSums]) -> tuple[np.ndarray, float]:
    """Return the mean gate of each expert [E] and the mean entropy, weighted by the tokens of each batch."""
    counts = np.array([(batch.segment_ids > 0).sum() for batch in domain.batches])
    usage, entropy = (
        counts / counts.sum() @ np.array(values) for values in zip(*(each[1:3] for each in sums), strict=True)
    )
    return usage, float(entropy)


def _segment_targets(batch: Batch) -> np.ndarray:
    """Return the number of targets of each segment, float64 [n], in the order of the batch's rows."""
    positions = np.flatnonzero(batch.loss_mask)
    size = sum(len(row) for row in batch.rows)
    return np.bincount(_segment_of_position(batch)[positions], minlength=size).astype(np.float64)


def _segment_of_position(batch: Batch) -> np.ndarray:
    """Return the segment of each position, numbered through the batch, int [B * L]; 0 on padding, which has no loss."""
    starts = np.cumsum([0, *(len(row) for row in batch.rows)])[: len(batch.rows)]
    starts = np.pad(starts, (0, len(batch.segment_ids) - len(starts)))
    return np.maximum(starts[:, None] + batch.segment_ids - 1, 0).reshape(-1)


def _device_batches(model: RoutedDecoder, domains: list[Domain]) -> list[list[MicroBatch]]:
    """Return this rank's batches of each domain on the device, with cached features if `router_layer` is "final"."""
    device_batches = [
        [device_batch(batch, model.window, max_targets=domain.max_targets) for batch in domain.local_batches]
        for domain in domains
    ]
    if model.router_layer != "final":
        return device_batches
    new = [index for index, domain in enumerate(domains) if not domain.features]
    if new:
        batches = [device_batches[index] for index in new]
        for index, features in zip(new, _by_domain(batches, _base_features(model, _flat(batches))), strict=True):
            domains[index].features = features
    return [
        [batch._replace(features=f) for batch, f in zip(batches, domain.features, strict=True)]
        for domain, batches in zip(domains, device_batches, strict=True)
    ]


def _base_features(model: RoutedDecoder, batches: list[MicroBatch]) -> list[mx.array]:
    """Return the router's features of each batch: float16 if every value of it fits, else in the model's dtype."""

    def exact(batch: MicroBatch) -> mx.array:
        return model.router_features(batch.inputs, batch_layout(batch, model.window))

    def half(batch: MicroBatch) -> tuple[mx.array, mx.array]:
        features_f16 = exact(batch).astype(mx.float16)
        return features_f16, mx.isfinite(features_f16).all()

    halves = streams.run_concurrently([partial(half, batch) for batch in batches])
    features = [features_f16 for features_f16, _ in halves]
    too_large = [index for index, (_, finite) in enumerate(halves) if not finite.item()]
    again = streams.run_concurrently([partial(exact, batches[index]) for index in too_large])
    for index, exact_features in zip(too_large, again, strict=True):
        features[index] = exact_features
    return features


def _evaluate_batch(
    model: RoutedDecoder,
    batch: MicroBatch,
    routing: Routing,
    forced_gates: mx.array | None,
    base_only: bool,
    adapters: Adapters,
) -> BatchResult:
    losses, gates = _target_losses(model, batch, routing, forced_gates, base_only, adapters)
    return (losses * batch.weights).sum(), *expert_usage(gates, batch.valid_mask), losses


def _target_losses(
    model: RoutedDecoder,
    batch: MicroBatch,
    routing: Routing,
    forced_gates: mx.array | None,
    base_only: bool,
    adapters: Adapters,
) -> tuple[mx.array, mx.array]:
    """Return the loss of every target [N], and the gates [B, L, E].

    Args:
        model: The routed model.
        batch: The micro-batch.
        routing: How the router's logits become gates.
        forced_gates: Gates [E] for every token instead of the router's, or None.
        base_only: Whether these gates select the null expert, or the pool is empty: no expert is applied.
        adapters: Stacked experts and gate.
    """
    num_experts = len(adapters.gate.bias)
    gates = None if forced_gates is None else mx.broadcast_to(forced_gates, (*batch.inputs.shape, num_experts))
    if batch.features is not None and base_only:
        # The cached features are the final states of the base, so no forward pass is needed.
        hidden = batch.features.astype(model.base.model.norm.weight.dtype)
        gates = mx.ones((*batch.inputs.shape, 1)) if gates is None else gates
    else:
        out = forward_routed(model, batch, routing, adapters, gates)
        hidden, gates = out.hidden, out.gates
    states = hidden.reshape(-1, hidden.shape[-1])[batch.target_positions]
    tile = chunked_loss.tile_size(len(states))
    return chunked_loss.token_losses(model.head, states, batch.targets, tile, differentiable=False), gates
