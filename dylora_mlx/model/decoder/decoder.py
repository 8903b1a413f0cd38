"""The forward pass with experts: mlx-lm's modules of any family, our own loop over the layers.

The loop is ours because mlx-lm's model takes neither document masks nor gates. Gates are an explicit argument of
everything below; nothing is stashed on a module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from dylora_mlx.model.base import families
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder import block, decode_block
from dylora_mlx.model.decoder.attention import AttentionLayout, AttentionMasks
from dylora_mlx.model.decoder.decode_block import DecodePosition
from dylora_mlx.model.experts import autotune, lora, offload
from dylora_mlx.model.experts.lora import Expert, Mixture, Shapes, Stack
from dylora_mlx.model.experts.offload import OffloadedExpert
from dylora_mlx.model.kernels import chunked_loss
from dylora_mlx.model.routing import document_mean, router
from dylora_mlx.model.routing.document_mean import RunningMeanCache
from dylora_mlx.model.routing.router import Gate, Router, Routing

Pass = Callable[[Mixture | None], mx.array]
"""Final-norm states [B, L, D] under a mixture, None for the base alone."""


def mix_layers(run: Pass, stack: Stack, gates: mx.array, top_k: int | None, dtype: mx.Dtype) -> mx.array:
    """States [B, L, D] of one pass under gates [B, L, E], at most top_k of which are not zero."""
    return run(stack.apply_gates(gates, top_k, dtype))


def mix_logits(run: Pass, stack: Stack, gates: mx.array, _: int | None, dtype: mx.Dtype) -> mx.array:
    """States sum_e g_e h_e [B, L, D], h_e of a pass with expert e alone; the base is column 0."""
    expert_ids = gates.shape[-1]
    mixed = gates[..., :1].astype(dtype) * run(None)
    for expert_id in range(1, expert_ids):
        alone = mx.broadcast_to((mx.arange(expert_ids) == expert_id).astype(gates.dtype), gates.shape)
        states = run(stack.apply_gates(alone, 1, dtype))
        mixed = mixed + gates[..., expert_id : expert_id + 1].astype(dtype) * states
    return mixed


MIXING = {"layers": mix_layers, "logits": mix_logits}


class DecoderCache(NamedTuple):
    """Key-value caches of the two passes, one entry a layer. With an inner tap there is one pass and `base` is empty.
    heard: what the router has read so far, where it reads the document's mean too."""

    base_kv_cache: list[Any]
    adapted_kv_cache: list[Any]
    running_mean: RunningMeanCache | None = None


class Adapters(NamedTuple):
    """The experts' factors and the router's rows, laid out for one step or one evaluation."""

    stack: Stack
    gate: Gate


class DecoderOutput(NamedTuple):
    """hidden [B, L, D] (final norm), gates [B, L, E], router_logits [B, L, E], features [B, L, D] as the router read them."""

    hidden: mx.array
    gates: mx.array
    router_logits: mx.array
    features: mx.array


class RoutedDecoder(nn.Module):
    """The frozen base, the experts (expert e is gate column e + 1) and the router. gather_threshold: see crossover.py; context: the
    share of a document's mean in what the router reads (context.py).

    Parameters: base.* (frozen), experts.N.layers.L.PROJECTION.lora_a/lora_b, router.rows.E.weight/bias.
    """

    def __init__(
        self,
        base: Base,
        projections: list[str],
        router_layer: int | str,
        grad_checkpoint: bool = False,
        mixing: str = "layers",
        document_mean_weight: float = 0.0,
    ):
        super().__init__()
        self.base: Any = base.model
        self.family = families.family_of(base.args)
        self.experts: list[Expert] = []
        self.router = Router(base.args.hidden_size)
        self.router_layer, self.grad_checkpoint, self.mixing, self.document_mean_weight = (
            router_layer,
            grad_checkpoint,
            mixing,
            document_mean_weight,
        )
        self.gather_threshold: float | None = None
        first = router_layer if isinstance(router_layer, int) else 0
        self._shapes: Shapes = {
            layer: {name: base.projection_shape(layer, name) for name in projections}
            for layer in range(first, base.args.num_hidden_layers)
        }

    @property
    def shapes(self) -> Shapes:
        """Inputs and outputs of every projection that carries experts, by layer."""
        return self._shapes

    @property
    def window(self) -> int:
        """Tokens that a sliding layer sees, more than any row has where there is none."""
        return self.family.window

    @property
    def head(self) -> nn.Module:
        return chunked_loss.output_layer(self.base)

    def is_global(self, layer: int) -> bool:
        """Whether a layer attends to everything before, not to a window."""
        return self.family.is_global[layer]

    def embed(self, tokens: mx.array) -> mx.array:
        """Embeddings [B, L, D], scaled if the family scales them, of tokens int32 [B, L]."""
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
        """Blocks first to last - 1."""
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
        """Final-norm states [B, L, D] of the base alone, without any expert."""
        h = self._run_blocks(self.embed(tokens), attn_layout, 0, len(self.base.model.layers), None, cache or [])
        return self.base.model.norm(h)

    def router_features(self, tokens: mx.array, attn_layout: AttentionLayout) -> mx.array:
        """What the router reads of each token, [B, L, D], no gradient: never touched by an adapter."""
        if self.router_layer == "final":
            return mx.stop_gradient(self.base_states(tokens, attn_layout))
        return mx.stop_gradient(
            _rms_normalize(self._run_blocks(self.embed(tokens), attn_layout, 0, int(self.router_layer), None, []))
        )

    def states_and_features(self, tokens: mx.array, attn_layout: AttentionLayout) -> tuple[mx.array, mx.array]:
        """The base's final-norm states and the router's features, [B, L, D] each, in one pass; with tap final they are
        the same array."""
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
        """The routed pass over tokens int32 [B, L].

        features: the router's features when they are known already (tap final only); gates: [B, L, E] to use instead of
        the router's; cache: from `make_cache`, for decoding; adapters: from `adapters`, or a step's own, laid out once
        for many calls; real: [B, L], 0 on padding, for a routing with a capacity; starts: int32 [B, L], where each token's
        document begins in its row, None where every row is one.
        """
        stack, gate = adapters or self.adapters()
        layers = len(self.base.model.layers)
        h, start = self.embed(tokens), 0
        base_cache, adapted_cache = (cache.base_kv_cache, cache.adapted_kv_cache) if cache else ([], [])
        if self.router_layer != "final":
            start = int(self.router_layer)
            h = mx.stop_gradient(self._run_blocks(h, attn_layout, 0, start, None, adapted_cache))
            features = _rms_normalize(h)
        elif features is None:
            features = mx.stop_gradient(self.base_states(tokens, attn_layout, base_cache))
        features = self.router_inputs(features, document_starts, cache and cache.running_mean)
        router_logits = router.logits(features, gate)
        if gates is None:
            gates = router.gates(router_logits, routing, valid_mask)

        def run(mixture: Mixture | None) -> mx.array:
            return self.base.model.norm(self._run_blocks(h, attn_layout, start, layers, mixture, adapted_cache))

        hidden = MIXING[self.mixing](run, stack, gates, routing.top_k, h.dtype)
        return DecoderOutput(hidden, gates, router_logits, features)

    def router_inputs(
        self, features: mx.array, document_starts: mx.array | None = None, cache: RunningMeanCache | None = None
    ) -> mx.array:
        """What the router makes its logits of, [B, L, D], from features of each token; arguments as `context.read` has them."""
        return document_mean.mix_document_mean(features, self.document_mean_weight, document_starts, cache)

    def prompt_gates(
        self, tokens: mx.array, attn_layout: AttentionLayout, valid_mask: mx.array, routing: Routing
    ) -> mx.array:
        """Gates [B, 1, E] for whole prompts, tokens int32 [B, L], real [B, L]: routing that is decided once a prompt."""
        found = router.logits(self.router_features(tokens, attn_layout), self.router.gate())
        return router.gates(router.mean_logits(found, valid_mask), routing)

    def adapters(self, top_k: int | None = None) -> Adapters:
        """All experts and the router's rows, for many calls with the same weights. top_k: experts that a token of these
        calls uses, at most; None for any number."""
        expert_ids = range(1, len(self.experts) + 1)
        return Adapters(self.stack_experts(expert_ids, top_k), self.router.gate())

    def stack_experts(self, expert_ids: Sequence[int], top_k: int | None, known: int | None = None) -> Stack:
        """The experts of these columns, in the form that costs least where a token uses top_k of them at most; of experts
        in files only what is used is read. known: columns that there are gates for, all of the pool's if None."""
        dtype, experts = self.base.model.norm.weight.dtype, self.experts[: None if known is None else known - 1]
        in_files = any(isinstance(experts[expert_id - 1], OffloadedExpert) for expert_id in expert_ids)
        if self.mixing == "layers" and top_k is not None and in_files:
            return offload.stack_offloaded(experts, expert_ids, dtype)
        looked_up = self.mixing == "layers" and autotune.use_gather(len(expert_ids), top_k, self.gather_threshold)
        return (lora.stack_for_gather if looked_up else lora.stack_dense)(experts, expert_ids, dtype)

    def make_cache(self) -> DecoderCache:
        """Empty key-value caches for decoding: two with tap final, one with an inner tap. Raises ValueError where experts
        are mixed in the logits: that takes a cache for each."""
        if self.mixing != "layers":
            raise ValueError("model.mixing: logits is for comparison and has no caches")
        from mlx_lm.models.cache import make_prompt_cache  # loads transformers: only when decoding

        base = make_prompt_cache(self.base) if self.router_layer == "final" else []
        return DecoderCache(
            base, make_prompt_cache(self.base), RunningMeanCache() if self.document_mean_weight else None
        )

    def decode_layout(self, length: int, cache: DecoderCache) -> AttentionMasks | DecodePosition:
        """Masks for the next `length` tokens of every sequence, given what the cache holds; of one token the position,
        for `decoding`."""
        from mlx_lm.models.base import create_attention_mask  # loads transformers: only when decoding

        probe, family = mx.zeros((1, length, 1)), self.family
        full, sliding = family.first_layer(True), family.first_layer(False)
        masks = AttentionMasks(
            None if full is None else create_attention_mask(probe, cache.adapted_kv_cache[full]),
            None
            if sliding is None
            else create_attention_mask(probe, cache.adapted_kv_cache[sliding], window_size=self.window),
        )
        if length > 1:
            return masks
        offset = cache.adapted_kv_cache[0].offset
        turns = (
            None if i is None else decode_block.rotary_tables(family, self.base.layers[i].self_attn, offset)
            for i in (full, sliding)
        )
        return DecodePosition(masks, *turns)

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits [..., V] of final-norm states [..., D]."""
        return chunked_loss.output_logits(self.head, hidden)


def _rms_normalize(h: mx.array) -> mx.array:
    return mx.fast.rms_norm(h, None, 1e-6)
