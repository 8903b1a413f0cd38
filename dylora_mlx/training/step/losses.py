"""What a step minimises: the language-model loss and the router's own losses, each apart.

Everything is a sum over micro-batches: the language-model part is weighted by learned tokens over the whole step, so
accumulation changes nothing but memory.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx.config import Training
from dylora_mlx.data.packing import Batch
from dylora_mlx.model.decoder import attention
from dylora_mlx.model.decoder.attention import Layout, Masks
from dylora_mlx.model.decoder.decoder import Adapters, Output, RoutedDecoder
from dylora_mlx.model.kernels import chunked_loss as head
from dylora_mlx.model.kernels import quantized as quantised
from dylora_mlx.model.routing import document_mean as context
from dylora_mlx.model.routing import router
from dylora_mlx.model.routing.router import Gate, Routing


class MicroBatch(NamedTuple):
    """Arrays of one micro-batch on the device.

    inputs: int32 [B, L]; where: attention's layout, or segments int32 [B, L] to make masks of; real: float32 [B, L], 0
    on padding; positions: int32 [N], flat places in B * L that carry a target; targets: int32 [N]; weights: float32 [N],
    0 on padding of N; features: [B, L, D] or None, of each token; starts: int32 [B, L], where its document begins in its row.
    """

    inputs: mx.array
    where: Layout | mx.array
    real: mx.array
    positions: mx.array
    targets: mx.array
    weights: mx.array
    features: mx.array | None
    starts: mx.array


class Recalled(NamedTuple):
    """A micro-batch of replayed text. mean float32 [N, D], level float32 [N]: the mature mixture's distribution p at its
    positions, as the head's mean row under p and sum_v p_v log p_v; None without distillation."""

    batch: MicroBatch
    mean: mx.array | None
    level: mx.array | None


class Rehearsal(NamedTuple):
    """Remembered features [M, D], their experts' columns int32 [M], and weights float32 [M], one in all per skill."""

    features: mx.array
    experts: mx.array
    weights: mx.array


class Terms(NamedTuple):
    """Parts of the objective for one step, float32 scalars, before their coefficients."""

    lm_loss: mx.array
    balance_loss: mx.array
    entropy_loss: mx.array
    z_loss: mx.array
    rehearsal_loss: mx.array
    replay_loss: mx.array
    distillation_loss: mx.array


def micro_batch(
    inputs: np.ndarray,
    targets: np.ndarray,
    learn: np.ndarray,
    segments: np.ndarray,
    features: np.ndarray | None,
    window: int,
    positions: int | None = None,
) -> MicroBatch:
    """Move a batch to the device, with room for as many targets as there are.

    With `positions` there is room for so many, and the documents are given by segments, so that whatever the batch holds
    looks alike to a compiled function; but rows that are one document each keep the fast causal attention.
    """
    flat = np.flatnonzero(learn)
    size = max(1, len(flat)) if positions is None else positions
    places, weights = np.zeros(size, np.int32), np.zeros(size, np.float32)
    places[: len(flat)], weights[: len(flat)] = flat, 1.0
    return MicroBatch(
        mx.array(inputs),
        attention.layout(segments, window) if positions is None else _fixed(segments, window),
        mx.array((segments > 0).astype(np.float32)),
        mx.array(places),
        mx.array(targets.reshape(-1)[places]),
        mx.array(weights),
        None if features is None else mx.array(features),
        mx.array(context.starts(segments)),
    )


def _fixed(segments: np.ndarray, window: int) -> Layout | mx.array:
    causal = attention.whole_rows(segments) and segments.shape[1] <= window
    return Masks("causal", "causal") if causal else mx.array(segments)


def layout(batch: MicroBatch, window: int) -> Layout:
    """Where a batch's documents are, made into masks if it only has their segments."""
    return attention.packed_masks(batch.where, window) if isinstance(batch.where, mx.array) else batch.where


def routed(
    model: RoutedDecoder, batch: MicroBatch, routing: Routing, adapters: Adapters, gates: mx.array | None = None
) -> Output:
    """The routed pass over a micro-batch; gates [B, L, E] to use instead of the router's."""
    rows = {"adapters": adapters, "real": batch.real, "starts": batch.starts}
    return model(batch.inputs, layout(batch, model.window), routing, batch.features, gates, **rows)


def balance_loss(gates: mx.array, real: mx.array) -> mx.array:
    """E * sum_e f_e P_e over real tokens (Fedus et al. 2022, "Switch Transformers", equation 4).

    gates [B, L, E]; real [B, L], 0 on padding. f, the share of tokens whose largest gate is e, carries no gradient; P,
    the mean gate, does.
    """
    experts = gates.shape[-1]
    weight = real.astype(mx.float32)[..., None] / mx.maximum(real.sum(), 1)
    chosen = mx.argmax(gates, axis=-1)[..., None] == mx.arange(experts)
    share = mx.stop_gradient((chosen * weight).sum((0, 1)))
    return experts * mx.sum(share * (gates * weight).sum((0, 1)))


def z_loss(logits: mx.array, real: mx.array) -> mx.array:
    """Mean squared log-sum-exp of router logits [B, L, E] over real tokens (Zoph et al. 2022, "ST-MoE", equation 5)."""
    return (mx.logsumexp(logits, axis=-1) ** 2 * real).sum() / mx.maximum(real.sum(), 1)


def rehearsal_loss(gate: Gate, memory: Rehearsal, own: mx.array, real: mx.array, expert: int) -> mx.array:
    """Cross-entropy of the router on remembered features and on this batch's own, [B, L, D], which belong to `expert`.

    Every skill counts alike: the sum of the skills' means over their number.
    """

    def cross_entropy(features: mx.array, columns: mx.array) -> mx.array:
        logits = router.logits(features, gate)
        return mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, columns[..., None], axis=-1)[..., 0]

    here = cross_entropy(own, mx.full(real.shape, expert, mx.int32))
    total = (here * real).sum() / mx.maximum(real.sum(), 1)
    skills = mx.array(1.0)
    if memory.features.size:
        total = total + (cross_entropy(memory.features, memory.experts) * memory.weights).sum()
        skills = skills + memory.weights.sum()
    return total / skills


def micro_terms(
    model: RoutedDecoder,
    batch: MicroBatch,
    routing: Routing,
    memory: Rehearsal,
    expert: int,
    training: Training,
    adapters: Adapters | None = None,
) -> tuple[mx.array, Terms, mx.array]:
    """Forward one micro-batch, with the step's adapters or the model's own.

    Returns the summed language-model loss over its learned tokens, the terms (lm_loss is that sum), and the routed
    gates [B, L, E]. A term whose coefficient is 0 is not computed.
    """
    adapters = adapters or model.adapters(routing.top_k)
    out = routed(model, batch, routing, adapters)
    states = out.hidden.reshape(-1, out.hidden.shape[-1])[batch.positions]
    tile = head.tile_size(len(states))
    losses = head.token_losses(model.head, states, batch.targets, tile, differentiable=True)
    lm = (losses * batch.weights).sum()
    real, zero = batch.real, mx.array(0.0)
    terms = Terms(
        lm,
        balance_loss(out.gates, real) if training.balance else zero,
        usage(out.gates, real)[1] if training.entropy else zero,
        z_loss(out.router_logits, real) if training.z_loss else zero,
        rehearsal_loss(adapters.gate, memory, out.features, real, expert) if training.rehearsal else zero,
        zero,
        zero,
    )
    return lm, terms, out.gates


def replay_terms(model: RoutedDecoder, recalled: Recalled, routing: Routing, adapters: Adapters) -> Terms:
    """The terms of a replayed micro-batch, per learned token: its loss, and the divergence KL(mature || this mixture)."""
    batch, zero = recalled.batch, mx.array(0.0)
    out = routed(model, batch, routing, adapters)
    states = out.hidden.reshape(-1, out.hidden.shape[-1])[batch.positions]
    partition = head.log_partition(model.head, states, head.tile_size(len(states)))
    states, weight = states.astype(mx.float32), batch.weights / mx.maximum(batch.weights.sum(), 1)
    own = partition - (states * quantised.rows(model.head, batch.targets).astype(mx.float32)).sum(-1)
    divergence = zero
    if recalled.mean is not None and recalled.level is not None:
        divergence = ((recalled.level - (states * recalled.mean).sum(-1) + partition) * weight).sum()
    return Terms(zero, zero, zero, zero, zero, (own * weight).sum(), divergence)


def weighted(terms: Terms, training: Training) -> mx.array:
    """The objective: the terms with their coefficients."""
    return (
        terms.lm_loss
        + training.balance * terms.balance_loss
        + training.entropy * terms.entropy_loss
        + training.z_loss * terms.z_loss
        + training.rehearsal * terms.rehearsal_loss
        + training.replay * terms.replay_loss
        + training.distillation * terms.distillation_loss
    )


def usage(gates: mx.array, real: mx.array) -> tuple[mx.array, mx.array]:
    """Mean gate per expert [E] and mean routing entropy in nats, over real tokens, [B, L]."""
    weight = real / mx.maximum(real.sum(), 1)
    return (gates * weight[..., None]).sum((0, 1)), (router.entropy(gates) * weight).sum()


def device_batch(
    batch: Batch, window: int, features: np.ndarray | None = None, positions: int | None = None
) -> MicroBatch:
    return micro_batch(batch.inputs, batch.targets, batch.learn, batch.segments, features, window, positions)
