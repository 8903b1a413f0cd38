"""Evaluate domains, forward only: loss, expert usage and routing entropy. Batches are sharded over ranks."""

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
"""Results of one batch: loss summed over targets (nats), mean gates [E], mean routing entropy."""


@dataclass
class Domain:
    """A named set of packed evaluation batches."""

    name: str
    batches: list[Batch]
    """All batches, the same on every rank."""
    max_targets: int | None = None
    """Number of targets that each batch is padded to; None if shapes are not fixed."""
    features: list[mx.array] = field(default_factory=list)
    """Router features of this rank's batches, cached at the first evaluation; only if `router_layer` is "final".

    float16, or the model's dtype if a value does not fit float16.
    """
    first_rank: int = 0
    """Rank that evaluates the first batch; the following batches go to the following ranks in turn."""

    @property
    def local_batches(self) -> list[Batch]:
        """The batches that this rank evaluates."""
        return world().shard(self.batches, self.first_rank)


def make_domains(
    splits: dict[str, Split], max_seq_length: int, batch_size: int, fixed: bool = False
) -> dict[str, Domain]:
    """Make an evaluation domain from each split, by name.

    Args:
        splits: Splits by domain name.
        max_seq_length: Positions per row.
        batch_size: Rows per batch.
        fixed: Give all batches of all domains the same shapes, for a compiled function.
    """
    domains: dict[str, Domain] = {}
    num_batches = 0
    for name, split in splits.items():
        batches = stream.evaluation_batches(split.segments, max_seq_length, batch_size, fixed)
        # Each domain starts at the rank after the last batch of the one before, so small domains spread over all ranks.
        domains[name] = Domain(name, batches, first_rank=num_batches % world().world_size)
        num_batches += len(batches)
    if fixed:
        largest = max(int(batch.loss_mask.sum()) for domain in domains.values() for batch in domain.batches)
        domains = {name: replace(domain, max_targets=largest) for name, domain in domains.items()}
    return domains


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
        mx.eval(adapters, routing.temperature)
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
    adapters, evaluator = adapters or model.adapters(routing.top_k), evaluator or Evaluator(model, compiled=False)
    results = evaluator.evaluate_batches(_device_batches(model, domain), routing, forced, adapters)
    (all_results,) = _gather_results([domain], [results], len(adapters.gate.bias))
    return _summarize(domain, all_results)


def evaluate_all(evaluator: Evaluator, domains: dict[str, Domain], routing: Routing) -> dict[str, Evaluation]:
    """Evaluate all domains with weights that are stacked once; return the results by name."""
    model, adapters = evaluator.model, evaluator.model.adapters(routing.top_k)
    tracked = console.track(domains.values(), "  evaluating", len(domains))
    results = [
        evaluator.evaluate_batches(_device_batches(model, domain), routing, None, adapters) for domain in tracked
    ]
    all_results = _gather_results(list(domains.values()), results, len(adapters.gate.bias))
    return {name: _summarize(domains[name], each) for name, each in zip(domains, all_results, strict=True)}


def _gather_results(
    domains: list[Domain], local_results: list[list[BatchResult]], num_experts: int
) -> list[list[BatchResult]]:
    """Combine the batch results of all ranks: for each domain the results of all its batches, on every rank.

    `num_experts` is the number of gates, E, the null expert included.
    """
    group = world()
    if group.world_size == 1:
        return local_results
    tables = [np.zeros((len(domain.batches), num_experts + 2), np.float32) for domain in domains]
    for domain, table, rank_results in zip(domains, tables, local_results, strict=True):
        batch_indices = group.shard(range(len(table)), domain.first_rank)
        for i, (loss, gates, entropy) in zip(batch_indices, rank_results, strict=True):
            table[i] = np.array(loss), *np.array(gates, np.float32), np.array(entropy)
    # Each row is filled by one rank and zero elsewhere, so the all_reduce adds zeros only and is exact.
    summed = np.split(group.all_reduce(np.concatenate(tables)), np.cumsum([len(table) for table in tables])[:-1])
    return [[(mx.array(r[0]), mx.array(r[1:-1]), mx.array(r[-1])) for r in table] for table in summed]


def _summarize(domain: Domain, measured: list[BatchResult]) -> Evaluation:
    """Aggregate batch results: loss per target token; usage and entropy weighted by the tokens of each batch."""
    counts = np.array([(batch.segment_ids > 0).sum() for batch in domain.batches])
    loss = sum(float(np.array(summed)) for summed, _, _ in measured)
    usage, entropy = (counts / counts.sum() @ np.array([np.array(m[i]) for m in measured]) for i in (1, 2))
    tokens = sum(int(batch.loss_mask.sum()) for batch in domain.batches)
    return Evaluation(loss / tokens, tokens, usage.tolist(), float(entropy))


def losses_by_segment(model: RoutedDecoder, domain: Domain, expert_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the losses of a domain's segments with every token sent to one expert (0: the base alone).

    Returns:
        Loss summed over each segment's targets in nats, and its number of targets, float64 [n] each, in the order of
        the batches.
    """
    routing = forced_routing()
    adapters, batches = model.adapters(routing.top_k), _device_batches(model, domain)
    num_experts = len(adapters.gate.bias)
    forced_gates = mx.array(np.eye(num_experts, dtype=np.float32)[expert_id])
    mx.eval(adapters, forced_gates, routing.temperature)
    tasks = [partial(_target_losses, model, b, routing, forced_gates, expert_id == 0, adapters) for b in batches]
    local_sums = []
    for batch, micro_batch, (losses, _) in zip(
        domain.local_batches, batches, streams.run_concurrently(tasks), strict=True
    ):
        positions, weights = np.array(micro_batch.target_positions), np.array(micro_batch.weights, np.float64)
        segments = _segment_of_position(batch)[positions]
        size = sum(len(row) for row in batch.rows)
        sums = np.bincount(segments, weights * np.array(losses, np.float64), size)
        local_sums.append((sums.tolist(), np.bincount(segments, weights, size).tolist()))
    gathered = world().all_gather_object(local_sums)
    size, first_rank = len(gathered), domain.first_rank
    # Undo the sharding: batch i was evaluated by rank (first_rank + i) % size, as its (i // size)-th.
    by_batch = [gathered[(first_rank + i) % size][i // size] for i in range(len(domain.batches))]
    return np.concatenate([sums for sums, _ in by_batch]), np.concatenate([counts for _, counts in by_batch])


def _segment_of_position(batch: Batch) -> np.ndarray:
    """Return the segment of each position, numbered through the batch, int [B * L]; 0 on padding, which has no loss."""
    starts = np.cumsum([0, *(len(row) for row in batch.rows)])[: len(batch.rows)]
    starts = np.pad(starts, (0, len(batch.segment_ids) - len(starts)))
    return np.maximum(starts[:, None] + batch.segment_ids - 1, 0).reshape(-1)


def _device_batches(model: RoutedDecoder, domain: Domain) -> list[MicroBatch]:
    """Return this rank's batches of a domain on the device, with cached features if `router_layer` is "final"."""
    batches = [device_batch(batch, model.window, max_targets=domain.max_targets) for batch in domain.local_batches]
    if model.router_layer == "final" and not domain.features:
        domain.features = _base_features(model, batches)
    if domain.features:
        batches = [batch._replace(features=f) for batch, f in zip(batches, domain.features, strict=True)]
    return batches


def _base_features(model: RoutedDecoder, batches: list[MicroBatch]) -> list[mx.array]:
    """Return the router's features of the batches: float16 if every value fits, else in the model's dtype."""

    def exact(batch: MicroBatch) -> mx.array:
        return model.router_features(batch.inputs, batch_layout(batch, model.window))

    def half(batch: MicroBatch) -> tuple[mx.array, mx.array]:
        features_f16 = exact(batch).astype(mx.float16)
        return features_f16, mx.isfinite(features_f16).all()

    half_features = streams.run_concurrently([partial(half, batch) for batch in batches])
    if all(finite.item() for _, finite in half_features):
        return [features for features, _ in half_features]
    return streams.run_concurrently([partial(exact, batch) for batch in batches])


def _evaluate_batch(
    model: RoutedDecoder,
    batch: MicroBatch,
    routing: Routing,
    forced_gates: mx.array | None,
    base_only: bool,
    adapters: Adapters,
) -> BatchResult:
    losses, gates = _target_losses(model, batch, routing, forced_gates, base_only, adapters)
    return (losses * batch.weights).sum(), *expert_usage(gates, batch.valid_mask)


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
