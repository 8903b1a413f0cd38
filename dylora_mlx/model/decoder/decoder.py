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
from dylora_mlx.model.decoder import block
from dylora_mlx.model.decoder import decode_block as decoding
from dylora_mlx.model.decoder.attention import Layout, Masks
from dylora_mlx.model.decoder.decode_block import Position
from dylora_mlx.model.experts import autotune as crossover
from dylora_mlx.model.experts import lora
from dylora_mlx.model.experts import offload as shelf
from dylora_mlx.model.experts.lora import Expert, Mixture, Shapes, Stack
from dylora_mlx.model.experts.offload import Shelved
from dylora_mlx.model.kernels import chunked_loss as head
from dylora_mlx.model.routing import document_mean as context
from dylora_mlx.model.routing import router
from dylora_mlx.model.routing.document_mean import Heard
from dylora_mlx.model.routing.router import Gate, Router, Routing

Pass = Callable[[Mixture | None], mx.array]
"""Final-norm states [B, L, D] under a mixture, None for the base alone."""


def mix_layers(run: Pass, stack: Stack, gates: mx.array, top_k: int | None, dtype: mx.Dtype) -> mx.array:
    """States [B, L, D] of one pass under gates [B, L, E], at most top_k of which are not zero."""
    return run(stack.under(gates, top_k, dtype))


def mix_logits(run: Pass, stack: Stack, gates: mx.array, _: int | None, dtype: mx.Dtype) -> mx.array:
    """States sum_e g_e h_e [B, L, D], h_e of a pass with expert e alone; the base is column 0."""
    columns = gates.shape[-1]
    mixed = gates[..., :1].astype(dtype) * run(None)
    for column in range(1, columns):
        alone = mx.broadcast_to((mx.arange(columns) == column).astype(gates.dtype), gates.shape)
        states = run(stack.under(alone, 1, dtype))
        mixed = mixed + gates[..., column : column + 1].astype(dtype) * states
    return mixed


MIXING = {"layers": mix_layers, "logits": mix_logits}


class Cache(NamedTuple):
    """Key-value caches of the two passes, one entry a layer. With an inner tap there is one pass and `base` is empty.
    heard: what the router has read so far, where it reads the document's mean too."""

    base: list[Any]
    adapted: list[Any]
    heard: Heard | None = None


class Adapters(NamedTuple):
    """The experts' factors and the router's rows, laid out for one step or one evaluation."""

    stack: Stack
    gate: Gate


class Output(NamedTuple):
    """hidden [B, L, D] (final norm), gates [B, L, E], router_logits [B, L, E], features [B, L, D] as the router read them."""

    hidden: mx.array
    gates: mx.array
    router_logits: mx.array
    features: mx.array


class RoutedDecoder(nn.Module):
    """The frozen base, the experts (expert e is gate column e + 1) and the router. lookup_ratio: see crossover.py; context: the
    share of a document's mean in what the router reads (context.py).

    Parameters: base.* (frozen), experts.N.layers.L.PROJECTION.lora_a/lora_b, router.rows.E.weight/bias.
    """

    def __init__(
        self,
        base: Base,
        projections: list[str],
        tap: int | str,
        grad_checkpoint: bool = False,
        composed: str = "layers",
        share: float = 0.0,
    ):
        super().__init__()
        self.base: Any = base.model
        self.family = families.family_of(base.args)
        self.experts: list[Expert] = []
        self.router = Router(base.args.hidden_size)
        self.tap, self.grad_checkpoint, self.composition, self.context = tap, grad_checkpoint, composed, share
        self.lookup_ratio: float | None = None
        first = tap if isinstance(tap, int) else 0
        self._shapes: Shapes = {
            layer: {name: base.shape(layer, name) for name in projections}
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
        return head.weight_of(self.base)

    def is_global(self, layer: int) -> bool:
        """Whether a layer attends to everything before, not to a window."""
        return self.family.is_global[layer]

    def embed(self, tokens: mx.array) -> mx.array:
        """Embeddings [B, L, D], scaled if the family scales them, of tokens int32 [B, L]."""
        return self.family.embed(self.base, tokens)

    def _run(
        self, h: mx.array, where: Layout | Position, first: int, last: int, mixture: Mixture | None, cache: list[Any]
    ) -> mx.array:
        """Blocks first to last - 1."""
        gates = mixture.gates if mixture else None
        for i in range(first, last):
            layer, is_global = self.base.model.layers[i], self.is_global(i)
            factors = mixture.layers.get(i, {}) if mixture else {}
            if isinstance(where, Position):
                h = decoding.run(self.family, layer, h, where, is_global, cache[i], factors, gates)
            elif self.grad_checkpoint and not cache:
                h = block.checkpointed(self.family, layer, where, is_global, factors, h, gates)
            else:
                h = block.run(self.family, layer, h, where, is_global, cache[i] if cache else None, factors, gates)
        return h

    def base_states(self, tokens: mx.array, where: Layout | Position, cache: list[Any] | None = None) -> mx.array:
        """Final-norm states [B, L, D] of the base alone, without any expert."""
        h = self._run(self.embed(tokens), where, 0, len(self.base.model.layers), None, cache or [])
        return self.base.model.norm(h)

    def features(self, tokens: mx.array, where: Layout) -> mx.array:
        """What the router reads of each token, [B, L, D], no gradient: never touched by an adapter."""
        if self.tap == "final":
            return mx.stop_gradient(self.base_states(tokens, where))
        return mx.stop_gradient(_normalised(self._run(self.embed(tokens), where, 0, int(self.tap), None, [])))

    def study(self, tokens: mx.array, where: Layout) -> tuple[mx.array, mx.array]:
        """The base's final-norm states and the router's features, [B, L, D] each, in one pass; with tap final they are
        the same array."""
        if self.tap == "final":
            final = self.base_states(tokens, where)
            return final, final
        h = self._run(self.embed(tokens), where, 0, int(self.tap), None, [])
        last = self._run(h, where, int(self.tap), len(self.base.model.layers), None, [])
        return self.base.model.norm(last), _normalised(h)

    def __call__(
        self,
        tokens: mx.array,
        where: Layout | Position,
        routing: Routing,
        features: mx.array | None = None,
        gates: mx.array | None = None,
        cache: Cache | None = None,
        adapters: Adapters | None = None,
        real: mx.array | None = None,
        starts: mx.array | None = None,
    ) -> Output:
        """The routed pass over tokens int32 [B, L].

        features: the router's features when they are known already (tap final only); gates: [B, L, E] to use instead of
        the router's; cache: from `make_cache`, for decoding; adapters: from `adapters`, or a step's own, laid out once
        for many calls; real: [B, L], 0 on padding, for a routing with a capacity; starts: int32 [B, L], where each token's
        document begins in its row, None where every row is one.
        """
        stack, gate = adapters or self.adapters()
        layers = len(self.base.model.layers)
        h, start = self.embed(tokens), 0
        base_cache, adapted_cache = (cache.base, cache.adapted) if cache else ([], [])
        if self.tap != "final":
            start = int(self.tap)
            h = mx.stop_gradient(self._run(h, where, 0, start, None, adapted_cache))
            features = _normalised(h)
        elif features is None:
            features = mx.stop_gradient(self.base_states(tokens, where, base_cache))
        features = self.read(features, starts, cache and cache.heard)
        router_logits = router.logits(features, gate)
        gates = router.gates(router_logits, routing, real) if gates is None else gates

        def run(mixture: Mixture | None) -> mx.array:
            return self.base.model.norm(self._run(h, where, start, layers, mixture, adapted_cache))

        hidden = MIXING[self.composition](run, stack, gates, routing.top_k, h.dtype)
        return Output(hidden, gates, router_logits, features)

    def read(self, features: mx.array, starts: mx.array | None = None, heard: Heard | None = None) -> mx.array:
        """What the router makes its logits of, [B, L, D], from features of each token; arguments as `context.read` has them."""
        return context.read(features, self.context, starts, heard)

    def prompt_gates(self, tokens: mx.array, where: Layout, real: mx.array, routing: Routing) -> mx.array:
        """Gates [B, 1, E] for whole prompts, tokens int32 [B, L], real [B, L]: routing that is decided once a prompt."""
        found = router.logits(self.features(tokens, where), self.router.gate())
        return router.gates(router.of_sequence(found, real), routing)

    def adapters(self, top_k: int | None = None) -> Adapters:
        """All experts and the router's rows, for many calls with the same weights. top_k: experts that a token of these
        calls uses, at most; None for any number."""
        columns = range(1, len(self.experts) + 1)
        return Adapters(self.laid_out(columns, top_k), self.router.gate())

    def laid_out(self, columns: Sequence[int], top_k: int | None, known: int | None = None) -> Stack:
        """The experts of these columns, in the form that costs least where a token uses top_k of them at most; of experts
        in files only what is used is read. known: columns that there are gates for, all of the pool's if None."""
        dtype, experts = self.base.model.norm.weight.dtype, self.experts[: None if known is None else known - 1]
        in_files = any(isinstance(experts[column - 1], Shelved) for column in columns)
        if self.composition == "layers" and top_k is not None and in_files:
            return shelf.stack(experts, columns, dtype)
        looked_up = self.composition == "layers" and crossover.pays(len(columns), top_k, self.lookup_ratio)
        return (lora.tabled if looked_up else lora.stack)(experts, columns, dtype)

    def make_cache(self) -> Cache:
        """Empty key-value caches for decoding: two with tap final, one with an inner tap. Raises ValueError where experts
        are mixed in the logits: that takes a cache for each."""
        if self.composition != "layers":
            raise ValueError("model.composition: logits is for comparison and has no caches")
        from mlx_lm.models.cache import make_prompt_cache  # loads transformers: only when decoding

        base = make_prompt_cache(self.base) if self.tap == "final" else []
        return Cache(base, make_prompt_cache(self.base), Heard() if self.context else None)

    def cached_masks(self, length: int, cache: Cache) -> Masks | Position:
        """Masks for the next `length` tokens of every sequence, given what the cache holds; of one token the position,
        for `decoding`."""
        from mlx_lm.models.base import create_attention_mask  # loads transformers: only when decoding

        probe, family = mx.zeros((1, length, 1)), self.family
        full, sliding = family.first_layer(True), family.first_layer(False)
        masks = Masks(
            None if full is None else create_attention_mask(probe, cache.adapted[full]),
            None if sliding is None else create_attention_mask(probe, cache.adapted[sliding], window_size=self.window),
        )
        if length > 1:
            return masks
        offset = cache.adapted[0].offset
        turns = (
            None if i is None else decoding.turn(family, self.base.layers[i].self_attn, offset) for i in (full, sliding)
        )
        return Position(masks, *turns)

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits [..., V] of final-norm states [..., D]."""
        return head.logits_of(self.head, hidden)


def _normalised(h: mx.array) -> mx.array:
    return mx.fast.rms_norm(h, None, 1e-6)
