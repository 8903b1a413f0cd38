"""The forward pass with experts: mlx-lm's modules of any family, in our own loop over the layers.

mlx-lm's own model forward accepts neither document masks nor gates, hence the separate loop. Gates are an explicit
argument of everything below; no state is stored on a module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from dylora_mlx.model.base import families
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder import block, decode_block, decode_cache
from dylora_mlx.model.decoder.attention import AttentionLayout, AttentionMasks
from dylora_mlx.model.decoder.decode_block import DecodePosition
from dylora_mlx.model.decoder.decode_cache import DecoderCache
from dylora_mlx.model.experts import autotune, lora, offload
from dylora_mlx.model.experts.lora import Expert, Mixture, Shapes, Stack
from dylora_mlx.model.experts.offload import OffloadedExpert
from dylora_mlx.model.kernels import chunked_loss
from dylora_mlx.model.routing import document_mean, router
from dylora_mlx.model.routing.document_mean import TOKENS_ALONE, DocumentMean
from dylora_mlx.model.routing.router import Gate, Router, Routing

Pass = Callable[[Mixture | None], mx.array]
"""Function from a mixture (None for the base alone) to final-norm states [B, L, D]."""


def mix_layers(run: Pass, stack: Stack, gates: mx.array, top_k: int | None, dtype: mx.Dtype) -> mx.array:
    """Mix the experts at every layer. Return states [B, L, D] under gates [B, L, E], at most top_k of them non-zero."""
    return run(stack.apply_gates(gates, top_k, dtype))


def mix_logits(run: Pass, stack: Stack, gates: mx.array, _: int | None, dtype: mx.Dtype) -> mx.array:
    """Mix the experts in the logits: return the states sum_e g_e h_e, [B, L, D].

    h_e are the states of a separate pass with expert e alone. expert_id 0 is the base.
    """
    num_experts = gates.shape[-1]
    mixed = gates[..., :1].astype(dtype) * run(None)
    for expert_id in range(1, num_experts):
        one_hot = mx.broadcast_to((mx.arange(num_experts) == expert_id).astype(gates.dtype), gates.shape)
        states = run(stack.apply_gates(one_hot, 1, dtype))
        mixed = mixed + gates[..., expert_id : expert_id + 1].astype(dtype) * states
    return mixed


MIXING = {"layers": mix_layers, "logits": mix_logits}
"""Mixing functions by the value of model.mixing."""


class Adapters(NamedTuple):
    """The experts' factors and the router's rows, laid out once for a step or an evaluation."""

    stack: Stack
    gate: Gate


class DecoderOutput(NamedTuple):
    """Results of a routed forward pass."""

    hidden: mx.array
    """States after the final norm, [B, L, D]."""
    gates: mx.array
    """[B, L, E]."""
    router_logits: mx.array
    """[B, L, E]."""
    features: mx.array
    """The router's input, [B, L, D]."""


class RoutedDecoder(nn.Module):
    """The frozen base, its experts and the router. Gate e belongs to experts[e - 1]; gate 0 is the null expert.

    Parameters: base.* (frozen), experts.N.layers.L.PROJECTION.lora_a/lora_b, router.rows.E.weight/bias.

    Args:
        base: The frozen base.
        projections: Names of the projections that carry experts.
        router_layer: "final" for a router that reads the base's final states, or the layer whose input it reads. With a
            layer, experts sit on this layer and above, and one pass is enough.
        grad_checkpoint: Recompute each block's activations in the backward pass.
        mixing: Key of MIXING: "layers" or "logits".
        mean: How the router's input mixes a token with the mean of its document.
    """

    def __init__(
        self,
        base: Base,
        projections: list[str],
        router_layer: int | str,
        grad_checkpoint: bool = False,
        mixing: str = "layers",
        mean: DocumentMean = TOKENS_ALONE,
    ):
        super().__init__()
        self.base: Any = base.model
        self.family = families.family_of(base.args)
        self.experts: list[Expert] = []
        self.router = Router(base.args.hidden_size)
        self.router_layer, self.grad_checkpoint, self.mixing, self.document_mean = (
            router_layer,
            grad_checkpoint,
            mixing,
            mean,
        )
        self.gather_threshold: float | None = None
        """Experts per used expert above which experts are gathered (autotune.py); None for the default."""
        first = router_layer if isinstance(router_layer, int) else 0
        self._shapes: Shapes = {
            layer: {name: base.projection_shape(layer, name) for name in projections}
            for layer in range(first, base.args.num_hidden_layers)
        }

    @property
    def shapes(self) -> Shapes:
        """Shape (inputs, outputs) of every projection that carries experts, by layer."""
        return self._shapes

    @property
    def window(self) -> int:
        """Tokens that a sliding layer attends to; longer than any row if there is no sliding layer."""
        return self.family.window

    @property
    def head(self) -> nn.Module:
        """The layer that maps final-norm states to logits."""
        return chunked_loss.output_layer(self.base)

    def is_global(self, layer: int) -> bool:
        """Return whether a layer attends to all previous tokens and not to a sliding window."""
        return self.family.is_global[layer]

    def embed(self, tokens: mx.array) -> mx.array:
        """Return embeddings [B, L, D], scaled if the family requires it, of tokens int32 [B, L]."""
        return self.family.embed(self.base, tokens)

    def _run_blocks(
        self,
        h: mx.array,
        attn_layout: AttentionLayout | DecodePosition,
        first: int,
        last: int,
        mixture: Mixture | None,
        cache: list[Any],
    ) -> mx.array:
        """Run blocks first to last - 1."""
        gates = mixture.gates if mixture else None
        for i in range(first, last):
            layer, is_global = self.base.model.layers[i], self.is_global(i)
            factors = mixture.layers.get(i, {}) if mixture else {}
            if isinstance(attn_layout, DecodePosition):
                h = decode_block.run_decode_block(
                    self.family, layer, h, attn_layout, is_global, cache[i], factors, gates
                )
            elif self.grad_checkpoint and not cache:
                h = block.run_block_checkpointed(self.family, layer, attn_layout, is_global, factors, h, gates)
            else:
                h = block.run_block(
                    self.family, layer, h, attn_layout, is_global, cache[i] if cache else None, factors, gates
                )
        return h

    def base_states(
        self, tokens: mx.array, attn_layout: AttentionLayout | DecodePosition, cache: list[Any] | None = None
    ) -> mx.array:
        """Return final-norm states [B, L, D] of the base alone, without experts."""
        h = self._run_blocks(self.embed(tokens), attn_layout, 0, len(self.base.model.layers), None, cache or [])
        return self.base.model.norm(h)

    def router_features(self, tokens: mx.array, attn_layout: AttentionLayout) -> mx.array:
        """Return the router's features of each token, [B, L, D], without a gradient.

        No adapter influences them. The document mean is not yet mixed in.
        """
        if self.router_layer == "final":
            return mx.stop_gradient(self.base_states(tokens, attn_layout))
        return mx.stop_gradient(
            _rms_normalize(self._run_blocks(self.embed(tokens), attn_layout, 0, int(self.router_layer), None, []))
        )

    def states_and_features(self, tokens: mx.array, attn_layout: AttentionLayout) -> tuple[mx.array, mx.array]:
        """Return the base's final-norm states and the router's features, [B, L, D] each, from one pass.

        With router_layer "final" both are the same array.
        """
        if self.router_layer == "final":
            final = self.base_states(tokens, attn_layout)
            return final, final
        h = self._run_blocks(self.embed(tokens), attn_layout, 0, int(self.router_layer), None, [])
        last = self._run_blocks(h, attn_layout, int(self.router_layer), len(self.base.model.layers), None, [])
        return self.base.model.norm(last), _rms_normalize(h)

    def __call__(
        self,
        tokens: mx.array,
        attn_layout: AttentionLayout | DecodePosition,
        routing: Routing,
        features: mx.array | None = None,
        gates: mx.array | None = None,
        cache: DecoderCache | None = None,
        adapters: Adapters | None = None,
        valid_mask: mx.array | None = None,
        document_starts: mx.array | None = None,
    ) -> DecoderOutput:
        """Run the routed pass over tokens int32 [B, L].

        Args:
            tokens: Token ids, int32 [B, L].
            attn_layout: Masks, gathered documents, or the position of one token for decoding.
            routing: Settings that turn router logits into gates.
            features: The router's features if they are known, before mixing in the document mean. Used with
                router_layer "final" only.
            gates: Gates [B, L, E] to use instead of the router's.
            cache: Caches for decoding, which these tokens are added to. Rows of fixed gates keep them.
            adapters: Experts and router laid out once for many calls, from `adapters` or from a training step.
            valid_mask: [B, L], 0 on padding, for a routing with a capacity limit.
            document_starts: Start, within its row, of each token's document, int32 [B, L]. None if every row is one
                document.
        """
        stack, gate = adapters or self.adapters()
        layers = len(self.base.model.layers)
        h, start = self.embed(tokens), 0
        base_cache, adapted_cache = (cache.base, cache.adapted) if cache else ([], [])
        position = cache.position if cache else 0
        if self.router_layer != "final":
            start = int(self.router_layer)
            # No expert below this layer: nothing to differentiate, and the features need no second pass.
            h = mx.stop_gradient(self._run_blocks(h, attn_layout, 0, start, None, adapted_cache))
            features = _rms_normalize(h)
        elif features is None:
            features = mx.stop_gradient(self.base_states(tokens, attn_layout, base_cache))
        state, sums = decode_cache.router_state(cache.router) if cache else None, None
        if state is None:
            features = self.router_inputs(features, document_starts)
        else:
            mean = self.document_mean
            features, sums = document_mean.continue_document_mean(features, mean, state.sums, position)
        router_logits = router.logits(features, gate)
        if gates is None:
            gates = router.gates(router_logits, routing, valid_mask)
        if cache is not None and state is not None and sums is not None:
            gates = decode_cache.record(cache.router, state, sums, gates)

        def run(mixture: Mixture | None) -> mx.array:
            return self.base.model.norm(self._run_blocks(h, attn_layout, start, layers, mixture, adapted_cache))

        hidden = MIXING[self.mixing](run, stack, gates, routing.top_k, h.dtype)
        return DecoderOutput(hidden, gates, router_logits, features)

    def router_inputs(self, features: mx.array, document_starts: mx.array | None = None) -> mx.array:
        """Return the router's input [B, L, D] for features of each token.

        The arguments are those of `document_mean.mix_document_mean`.
        """
        return document_mean.mix_document_mean(features, self.document_mean, document_starts)

    def prompt_gates(
        self, tokens: mx.array, attn_layout: AttentionLayout, valid_mask: mx.array, routing: Routing
    ) -> mx.array:
        """Return gates [B, 1, E] for routing that is decided once per prompt.

        Args:
            tokens: Prompts, int32 [B, L].
            attn_layout: Masks or gathered documents.
            valid_mask: [B, L], 0 on padding.
            routing: Settings that turn router logits into gates.
        """
        router_logits = router.logits(self.router_features(tokens, attn_layout), self.router.gate())
        return router.gates(router.mean_logits(router_logits, valid_mask), routing)

    def adapters(self, top_k: int | None = None) -> Adapters:
        """Lay out all experts and the router's rows, for many calls with the same weights.

        Args:
            top_k: Upper bound of the experts that a token uses in these calls; None for any number.
        """
        expert_ids = range(1, len(self.experts) + 1)
        return Adapters(self.stack_experts(expert_ids, top_k), self.router.gate())

    def stack_experts(self, expert_ids: Sequence[int], top_k: int | None, num_gates: int | None = None) -> Stack:
        """Lay out experts in the cheapest form: dense, gathered, or offloaded.

        Of offloaded experts, a pass reads only those that it uses.

        Args:
            expert_ids: Experts to lay out.
            top_k: Upper bound of the experts that a token uses; None for any number.
            num_gates: Number of gates, the null expert's included, if they cover only the first experts of the pool.
                None if they cover all.
        """
        dtype, experts = self.base.model.norm.weight.dtype, self.experts[: None if num_gates is None else num_gates - 1]
        any_offloaded = any(isinstance(experts[expert_id - 1], OffloadedExpert) for expert_id in expert_ids)
        if self.mixing == "layers" and top_k is not None and any_offloaded:
            return offload.stack_offloaded(experts, expert_ids, dtype)
        gathered = self.mixing == "layers" and autotune.use_gather(len(expert_ids), top_k, self.gather_threshold)
        return (lora.stack_for_gather if gathered else lora.stack_dense)(experts, expert_ids, dtype)

    def make_cache(self, fixed_gates: np.ndarray | None = None) -> list[Any]:
        """Return empty caches of one row for decoding, one of mlx-lm's `CacheList` for each layer (decode_cache.py).

        Args:
            fixed_gates: Gates [E] of every token of this row; None to route each token.

        Raises ValueError if experts are mixed in the logits, which would need a cache per expert.
        """
        if self.mixing != "layers":
            raise ValueError("model.mixing: logits is for comparison and has no caches")
        passes = 2 if self.router_layer == "final" else 1
        dims = self.router.rows[0].weight.size if self.document_mean.weight else 1
        return decode_cache.make_cache(len(self.base.layers), passes, dims, len(self.experts) + 1, fixed_gates)

    def decode_layout(self, length: int, cache: DecoderCache) -> AttentionMasks | DecodePosition:
        """Return the masks for the next `length` tokens of every row, given the contents of the cache.

        For a single token it returns the `DecodePosition` that decode_block.py uses.
        """
        family, masks = self.family, decode_cache.decode_masks(cache, length, self.window)
        if length > 1:
            return masks
        tables = (
            None
            if layer is None
            else decode_block.rotary_tables(family, self.base.layers[layer].self_attn, cache.position)
            for layer in (family.first_layer(True), family.first_layer(False))
        )
        return DecodePosition(masks, *tables)

    def logits(self, hidden: mx.array) -> mx.array:
        """Return logits [..., V] of final-norm states [..., D]."""
        return chunked_loss.output_logits(self.head, hidden)


def _rms_normalize(h: mx.array) -> mx.array:
    return mx.fast.rms_norm(h, None, 1e-6)
