"""The training objective: cross-entropy of the language model, the router's auxiliary losses, replay and distillation.

Each term is a sum over micro-batches. The language-model term is weighted by target tokens over the whole step, so
gradient accumulation changes memory use and nothing else.
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
    """Arrays of one micro-batch on the device: B packed rows of L positions, N of which have a target."""

    inputs: mx.array
    """Input token ids, int32 [B, L]."""
    attn_layout: AttentionLayout | mx.array
    """Attention layout, or segment_ids int32 [B, L] from which `batch_layout` builds masks."""
    valid_mask: mx.array
    """float32 [B, L]: 1 on tokens, 0 on padding."""
    target_positions: mx.array
    """int32 [N]: indices into the flattened B * L positions. The head runs on these only."""
    targets: mx.array
    """Target token ids, int32 [N]."""
    weights: mx.array
    """float32 [N]: 1 on targets, 0 where N is padded to a fixed shape."""
    features: mx.array | None
    """Cached router features [B, L, D], None if the model has to compute them."""
    document_starts: mx.array
    """int32 [B, L]: index in its row at which each position's document begins."""
    dropout_key: mx.array | None = None
    """Random key of LoRA dropout on this batch, uint32 [2]; None without dropout, as in every evaluation."""


class ReplayBatch(NamedTuple):
    """A micro-batch of replayed text with the distillation teacher's distribution p at its N target positions."""

    batch: MicroBatch
    mean_row: mx.array | None
    """Mean row of the output head under p, float32 [N, D]; None without distillation."""
    neg_entropy: mx.array | None
    """sum_v p_v log p_v, float32 [N]; None without distillation."""


class RehearsalBatch(NamedTuple):
    """Remembered router features of earlier skills, for the rehearsal loss."""

    features: mx.array
    """[M, D]; M is 0 without earlier skills."""
    experts: mx.array
    """expert_id that each feature belongs to, int32 [M]."""
    weights: mx.array
    """float32 [M]; the weights of each skill sum to 1."""


class LossTerms(NamedTuple):
    """Terms of the objective, float32 scalars, before their coefficients. Field names are the metric names."""

    lm_loss: mx.array
    """Cross-entropy of the next token."""
    load_balance_loss: mx.array
    """Load balance loss of the gates; see `load_balance_loss`."""
    entropy_loss: mx.array
    """Mean entropy of the gates, in nats."""
    z_loss: mx.array
    """Router z-loss; see `z_loss`."""
    rehearsal_loss: mx.array
    """Cross-entropy of the router on remembered features; see `rehearsal_loss`."""
    replay_loss: mx.array
    """Cross-entropy of the next token on replayed text."""
    distillation_loss: mx.array
    """KL divergence from the mature mixture on replayed text."""


def micro_batch(
    inputs: np.ndarray,
    targets: np.ndarray,
    loss_mask: np.ndarray,
    segment_ids: np.ndarray,
    features: np.ndarray | None,
    window: int,
    max_targets: int | None = None,
) -> MicroBatch:
    """Move a packed batch to the device.

    Args:
        inputs: Input token ids [B, L].
        targets: Target token ids [B, L].
        loss_mask: bool [B, L], True where a target is trained on.
        segment_ids: [B, L], number of the document in its row, 0 on padding.
        features: Cached router features [B, L, D], or None.
        window: Window of the base's sliding-attention layers.
        max_targets: Pad the targets to this number and pass segment_ids instead of an attention layout, so that a
            compiled function sees the same shapes for any batch. Rows of one document each still use causal attention.
            None: exactly the targets that the batch has.
    """
    target_positions = np.flatnonzero(loss_mask)
    size = max(1, len(target_positions)) if max_targets is None else max_targets
    positions, weights = np.zeros(size, np.int32), np.zeros(size, np.float32)
    positions[: len(target_positions)], weights[: len(target_positions)] = target_positions, 1.0
    return MicroBatch(
        mx.array(inputs),
        attention.attention_layout(segment_ids, window)
        if max_targets is None
        else _fixed_shape_layout(segment_ids, window),
        mx.array((segment_ids > 0).astype(np.float32)),
        mx.array(positions),
        mx.array(targets.reshape(-1)[positions]),
        mx.array(weights),
        None if features is None else mx.array(features),
        mx.array(document_mean.document_starts(segment_ids)),
    )


def _fixed_shape_layout(segments: np.ndarray, window: int) -> AttentionLayout | mx.array:
    """Return causal attention if it is exact for these rows, else the segment_ids."""
    causal = attention.one_document_per_row(segments) and segments.shape[1] <= window
    return AttentionMasks("causal", "causal") if causal else mx.array(segments)


def batch_layout(batch: MicroBatch, window: int) -> AttentionLayout:
    """Return the attention layout of a batch, building masks if it has only segment_ids."""
    return (
        attention.packed_masks(batch.attn_layout, window)
        if isinstance(batch.attn_layout, mx.array)
        else batch.attn_layout
    )


def forward_routed(
    model: RoutedDecoder, batch: MicroBatch, routing: Routing, adapters: Adapters, gates: mx.array | None = None
) -> DecoderOutput:
    """Run the routed forward pass over a micro-batch. `gates` [B, L, E], if not None, replace the router's."""
    optional_inputs = {"adapters": adapters, "valid_mask": batch.valid_mask, "document_starts": batch.document_starts}
    return model(batch.inputs, batch_layout(batch, model.window), routing, batch.features, gates, **optional_inputs)


def load_balance_loss(gates: mx.array, valid_mask: mx.array) -> mx.array:
    """Return E * sum_e f_e P_e over valid tokens (Fedus et al. 2022, "Switch Transformers", equation 4).

    f_e is the fraction of tokens whose largest gate is e; it has no gradient. P_e is the mean gate of e; it has one.

    Args:
        gates: [B, L, E].
        valid_mask: [B, L], 0 on padding.
    """
    num_experts = gates.shape[-1]
    weight = valid_mask.astype(mx.float32)[..., None] / mx.maximum(valid_mask.sum(), 1)
    is_top_expert = mx.argmax(gates, axis=-1)[..., None] == mx.arange(num_experts)
    token_fraction = mx.stop_gradient((is_top_expert * weight).sum((0, 1)))
    return num_experts * mx.sum(token_fraction * (gates * weight).sum((0, 1)))


def z_loss(logits: mx.array, valid_mask: mx.array) -> mx.array:
    """Return the mean squared log-sum-exp of centred router logits [B, L, E] over valid tokens.

    It keeps the differences of the logits small (Zoph et al. 2022, "ST-MoE", equation 5). The logits are centred first,
    because gates do not depend on their mean: without that, a base whose features lie far from zero is penalised for
    nothing.
    """
    centred = logits - logits.mean(axis=-1, keepdims=True)
    return (mx.logsumexp(centred, axis=-1) ** 2 * valid_mask).sum() / mx.maximum(valid_mask.sum(), 1)


def rehearsal_loss(
    gate: Gate, memory: RehearsalBatch, batch_features: mx.array, valid_mask: mx.array, expert: int
) -> mx.array:
    """Return the router's cross-entropy on remembered features and on those of this batch, which belong to `expert`.

    Every skill has the same weight: the result is the mean over skills of each skill's mean.

    Args:
        gate: The router's rows.
        memory: Remembered features of earlier skills.
        batch_features: Router features of the batch, [B, L, D].
        valid_mask: [B, L], 0 on padding.
        expert: expert_id of the expert that is trained on the batch.
    """

    def cross_entropy(features: mx.array, expert_ids: mx.array) -> mx.array:
        return router.cross_entropy(router.logits(features, gate), expert_ids)

    batch_losses = cross_entropy(batch_features, mx.full(valid_mask.shape, expert, mx.int32))
    total = (batch_losses * valid_mask).sum() / mx.maximum(valid_mask.sum(), 1)
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
    """Run one micro-batch forward and compute the terms of the objective.

    A term with coefficient 0 is not computed and is 0. `adapters` None: those of the model.

    Returns:
        The language-model loss summed over target tokens, the terms (`lm_loss` is that sum), and the gates [B, L, E].
    """
    adapters = adapters or model.adapters(routing.top_k)
    out = forward_routed(model, batch, routing, adapters)
    states = out.hidden.reshape(-1, out.hidden.shape[-1])[batch.target_positions]
    tile = chunked_loss.tile_size(len(states))
    losses = chunked_loss.token_losses(model.head, states, batch.targets, tile, differentiable=True)
    lm_loss = (losses * batch.weights).sum()
    valid_mask, zero = batch.valid_mask, mx.array(0.0)
    terms = LossTerms(
        lm_loss,
        load_balance_loss(out.gates, valid_mask) if training.load_balance_coef else zero,
        expert_usage(out.gates, valid_mask)[1] if training.entropy_coef else zero,
        z_loss(out.router_logits, valid_mask) if training.z_loss_coef else zero,
        rehearsal_loss(adapters.gate, memory, out.features, valid_mask, expert) if training.rehearsal_coef else zero,
        zero,
        zero,
    )
    return lm_loss, terms, out.gates


def replay_loss_terms(model: RoutedDecoder, replayed: ReplayBatch, routing: Routing, adapters: Adapters) -> LossTerms:
    """Return replay and distillation loss of a replayed micro-batch, each a mean over target tokens; other terms are 0.

    The distillation loss is KL(mature mixture || current mixture). With teacher distribution p, head W and state h it
    is sum_v p_v log p_v - h . E_p[W] + log sum_v exp(W_v . h). So logits are never stored (training/skill/replay.py).
    """
    batch, zero = replayed.batch, mx.array(0.0)
    out = forward_routed(model, batch, routing, adapters)
    states = out.hidden.reshape(-1, out.hidden.shape[-1])[batch.target_positions]
    partition = chunked_loss.log_partition(model.head, states, chunked_loss.tile_size(len(states)))
    # float32, like the log-partition that these dot products are subtracted from: half precision would lose digits.
    states, weight = states.astype(mx.float32), batch.weights / mx.maximum(batch.weights.sum(), 1)
    losses = partition - (states * quantized.weight_rows(model.head, batch.targets).astype(mx.float32)).sum(-1)
    divergence = zero
    if replayed.mean_row is not None and replayed.neg_entropy is not None:
        divergence = ((replayed.neg_entropy - (states * replayed.mean_row).sum(-1) + partition) * weight).sum()
    return LossTerms(zero, zero, zero, zero, zero, (losses * weight).sum(), divergence)


def total_loss(terms: LossTerms, training: TrainingConfig) -> mx.array:
    """Return the objective: the terms weighted by their coefficients."""
    return (
        terms.lm_loss
        + training.load_balance_coef * terms.load_balance_loss
        + training.entropy_coef * terms.entropy_loss
        + training.z_loss_coef * terms.z_loss
        + training.rehearsal_coef * terms.rehearsal_loss
        + training.replay_coef * terms.replay_loss
        + training.distillation_coef * terms.distillation_loss
    )


def expert_usage(gates: mx.array, valid_mask: mx.array) -> tuple[mx.array, mx.array]:
    """Return the mean gate of each expert [E] and the mean routing entropy in nats, over valid tokens.

    Args:
        gates: [B, L, E].
        valid_mask: [B, L], 0 on padding.
    """
    weight = valid_mask / mx.maximum(valid_mask.sum(), 1)
    return (gates * weight[..., None]).sum((0, 1)), (router.entropy(gates) * weight).sum()


def device_batch(
    batch: Batch, window: int, features: np.ndarray | None = None, max_targets: int | None = None
) -> MicroBatch:
    """Move a packed `Batch` to the device. Arguments as in `micro_batch`."""
    return micro_batch(batch.inputs, batch.targets, batch.loss_mask, batch.segment_ids, features, window, max_targets)
