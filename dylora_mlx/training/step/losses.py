"""What a step minimises: the language-model loss and the router's own losses, each apart.

Everything is a sum over micro-batches: the language-model part is weighted by learned tokens over the whole step, so
accumulation changes nothing but memory.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx.config import TrainingConfig
from dylora_mlx.data.packing import Batch
from dylora_mlx.model.decoder import attention
from dylora_mlx.model.decoder.attention import AttentionLayout, AttentionMasks
from dylora_mlx.model.decoder.decoder import Adapters, DecoderOutput, RoutedDecoder
from dylora_mlx.model.kernels import chunked_loss, quantized
from dylora_mlx.model.routing import document_mean, router
from dylora_mlx.model.routing.router import Gate, Routing


class MicroBatch(NamedTuple):
    """Arrays of one micro-batch on the device.

    inputs: int32 [B, L]; where: attention's layout, or segments int32 [B, L] to make masks of; real: float32 [B, L], 0
    on padding; positions: int32 [N], flat places in B * L that carry a target; targets: int32 [N]; weights: float32 [N],
    0 on padding of N; features: [B, L, D] or None, of each token; starts: int32 [B, L], where its document begins in its row.
    """

    inputs: mx.array
    attn_layout: AttentionLayout | mx.array
    valid_mask: mx.array
    target_positions: mx.array
    targets: mx.array
    weights: mx.array
    features: mx.array | None
    document_starts: mx.array


class ReplayBatch(NamedTuple):
    """A micro-batch of replayed text. mean float32 [N, D], level float32 [N]: the mature mixture's distribution p at its
    positions, as the head's mean row under p and sum_v p_v log p_v; None without distillation."""

    batch: MicroBatch
    mean_row: mx.array | None
    neg_entropy: mx.array | None


class RehearsalBatch(NamedTuple):
    """Remembered features [M, D], their experts' columns int32 [M], and weights float32 [M], one in all per skill."""

    features: mx.array
    experts: mx.array
    weights: mx.array


class LossTerms(NamedTuple):
    """Parts of the objective for one step, float32 scalars, before their coefficients."""

    lm_loss: mx.array
    load_balance_loss: mx.array
    entropy_loss: mx.array
    z_loss: mx.array
    rehearsal_loss: mx.array
    replay_loss: mx.array
    distillation_loss: mx.array


def micro_batch(
    inputs: np.ndarray,
    targets: np.ndarray,
    loss_mask: np.ndarray,
    segment_ids: np.ndarray,
    features: np.ndarray | None,
    window: int,
    max_targets: int | None = None,
) -> MicroBatch:
    """Move a batch to the device, with room for as many targets as there are.

    With `positions` there is room for so many, and the documents are given by segments, so that whatever the batch holds
    looks alike to a compiled function; but rows that are one document each keep the fast causal attention.
    """
    flat = np.flatnonzero(loss_mask)
    size = max(1, len(flat)) if max_targets is None else max_targets
    places, weights = np.zeros(size, np.int32), np.zeros(size, np.float32)
    places[: len(flat)], weights[: len(flat)] = flat, 1.0
    return MicroBatch(
        mx.array(inputs),
        attention.attention_layout(segment_ids, window)
        if max_targets is None
        else _fixed_shape_layout(segment_ids, window),
        mx.array((segment_ids > 0).astype(np.float32)),
        mx.array(places),
        mx.array(targets.reshape(-1)[places]),
        mx.array(weights),
        None if features is None else mx.array(features),
        mx.array(document_mean.document_starts(segment_ids)),
    )


def _fixed_shape_layout(segments: np.ndarray, window: int) -> AttentionLayout | mx.array:
    causal = attention.one_document_per_row(segments) and segments.shape[1] <= window
    return AttentionMasks("causal", "causal") if causal else mx.array(segments)


def batch_layout(batch: MicroBatch, window: int) -> AttentionLayout:
    """Where a batch's documents are, made into masks if it only has their segments."""
    return (
        attention.packed_masks(batch.attn_layout, window)
        if isinstance(batch.attn_layout, mx.array)
        else batch.attn_layout
    )


def forward_routed(
    model: RoutedDecoder, batch: MicroBatch, routing: Routing, adapters: Adapters, gates: mx.array | None = None
) -> DecoderOutput:
    """The routed pass over a micro-batch; gates [B, L, E] to use instead of the router's."""
    rows = {"adapters": adapters, "valid_mask": batch.valid_mask, "document_starts": batch.document_starts}
    return model(batch.inputs, batch_layout(batch, model.window), routing, batch.features, gates, **rows)


def load_balance_loss(gates: mx.array, valid_mask: mx.array) -> mx.array:
    """E * sum_e f_e P_e over real tokens (Fedus et al. 2022, "Switch Transformers", equation 4).

    gates [B, L, E]; real [B, L], 0 on padding. f, the share of tokens whose largest gate is e, carries no gradient; P,
    the mean gate, does.
    """
    experts = gates.shape[-1]
    weight = valid_mask.astype(mx.float32)[..., None] / mx.maximum(valid_mask.sum(), 1)
    chosen = mx.argmax(gates, axis=-1)[..., None] == mx.arange(experts)
    share = mx.stop_gradient((chosen * weight).sum((0, 1)))
    return experts * mx.sum(share * (gates * weight).sum((0, 1)))


def z_loss(logits: mx.array, real: mx.array) -> mx.array:
    """Mean squared log-sum-exp of router logits [B, L, E] over real tokens (Zoph et al. 2022, "ST-MoE", equation 5)."""
    return (mx.logsumexp(logits, axis=-1) ** 2 * real).sum() / mx.maximum(real.sum(), 1)


def rehearsal_loss(gate: Gate, memory: RehearsalBatch, own: mx.array, real: mx.array, expert: int) -> mx.array:
    """Cross-entropy of the router on remembered features and on this batch's own, [B, L, D], which belong to `expert`.

    Every skill counts alike: the sum of the skills' means over their number.
    """

    def cross_entropy(features: mx.array, expert_ids: mx.array) -> mx.array:
        return router.cross_entropy(router.logits(features, gate), expert_ids)

    here = cross_entropy(own, mx.full(real.shape, expert, mx.int32))
    total = (here * real).sum() / mx.maximum(real.sum(), 1)
    skills = mx.array(1.0)
    if memory.features.size:
        total = total + (cross_entropy(memory.features, memory.experts) * memory.weights).sum()
        skills = skills + memory.weights.sum()
    return total / skills


def loss_terms(
    model: RoutedDecoder,
    batch: MicroBatch,
    routing: Routing,
    memory: RehearsalBatch,
    expert: int,
    training: TrainingConfig,
    adapters: Adapters | None = None,
) -> tuple[mx.array, LossTerms, mx.array]:
    """Forward one micro-batch, with the step's adapters or the model's own.

    Returns the summed language-model loss over its learned tokens, the terms (lm_loss is that sum), and the routed
    gates [B, L, E]. A term whose coefficient is 0 is not computed.
    """
    adapters = adapters or model.adapters(routing.top_k)
    out = forward_routed(model, batch, routing, adapters)
    states = out.hidden.reshape(-1, out.hidden.shape[-1])[batch.target_positions]
    tile = chunked_loss.tile_size(len(states))
    losses = chunked_loss.token_losses(model.head, states, batch.targets, tile, differentiable=True)
    lm = (losses * batch.weights).sum()
    real, zero = batch.valid_mask, mx.array(0.0)
    terms = LossTerms(
        lm,
        load_balance_loss(out.gates, real) if training.load_balance_coef else zero,
        expert_usage(out.gates, real)[1] if training.entropy_coef else zero,
        z_loss(out.router_logits, real) if training.z_loss_coef else zero,
        rehearsal_loss(adapters.gate, memory, out.features, real, expert) if training.rehearsal_coef else zero,
        zero,
        zero,
    )
    return lm, terms, out.gates


def replay_loss_terms(model: RoutedDecoder, replayed: ReplayBatch, routing: Routing, adapters: Adapters) -> LossTerms:
    """The terms of a replayed micro-batch, per learned token: its loss, and the divergence KL(mature || this mixture)."""
    batch, zero = replayed.batch, mx.array(0.0)
    out = forward_routed(model, batch, routing, adapters)
    states = out.hidden.reshape(-1, out.hidden.shape[-1])[batch.target_positions]
    partition = chunked_loss.log_partition(model.head, states, chunked_loss.tile_size(len(states)))
    states, weight = states.astype(mx.float32), batch.weights / mx.maximum(batch.weights.sum(), 1)
    own = partition - (states * quantized.weight_rows(model.head, batch.targets).astype(mx.float32)).sum(-1)
    divergence = zero
    if replayed.mean_row is not None and replayed.neg_entropy is not None:
        divergence = ((replayed.neg_entropy - (states * replayed.mean_row).sum(-1) + partition) * weight).sum()
    return LossTerms(zero, zero, zero, zero, zero, (own * weight).sum(), divergence)


def total_loss(terms: LossTerms, training: TrainingConfig) -> mx.array:
    """The objective: the terms with their coefficients."""
    return (
        terms.lm_loss
        + training.load_balance_coef * terms.load_balance_loss
        + training.entropy_coef * terms.entropy_loss
        + training.z_loss_coef * terms.z_loss
        + training.rehearsal_coef * terms.rehearsal_loss
        + training.replay_coef * terms.replay_loss
        + training.distillation_coef * terms.distillation_loss
    )


def expert_usage(gates: mx.array, real: mx.array) -> tuple[mx.array, mx.array]:
    """Mean gate per expert [E] and mean routing entropy in nats, over real tokens, [B, L]."""
    weight = real / mx.maximum(real.sum(), 1)
    return (gates * weight[..., None]).sum((0, 1)), (router.entropy(gates) * weight).sum()


def device_batch(
    batch: Batch, window: int, features: np.ndarray | None = None, max_targets: int | None = None
) -> MicroBatch:
    return micro_batch(batch.inputs, batch.targets, batch.loss_mask, batch.segment_ids, features, window, max_targets)
