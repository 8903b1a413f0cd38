"""The routed model behind the interface that mlx-lm's generators expect: tokens and caches in, logits out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from dylora_mlx.adapters.fuse import blend_experts
from dylora_mlx.config import ATTENTION
from dylora_mlx.errors import UserError
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder.attention import packed_masks
from dylora_mlx.model.decoder.decode_cache import DecoderCache
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.model.routing.router import Routing


def check_has_caches(model: RoutedDecoder, remedy: str) -> None:
    """Raise UserError, with what to do, for a model that cannot generate token by token: its experts are mixed in the logits."""
    if model.mixing != "layers":
        raise UserError(f"model.mixing: logits has no caches to generate with; {remedy}")


class TokenRouted(nn.Module):
    """The routed decoder as an mlx-lm model. Each row of a batch is routed token by token, or has fixed gates (`make_cache`).

    With the router layer "final" each token takes one pass of the base and one of the mixture; with an inner router
    layer there is one pass.
    """

    def __init__(self, model: RoutedDecoder, routing: Routing):
        super().__init__()
        self.model, self._routing = model, routing
        self._adapters = model.adapters(routing.top_k)
        # Other threads may generate with it, and a lazy array belongs to the thread that built it.
        mx.eval(self._adapters)

    @property
    def layers(self) -> list[Any]:
        return self.model.base.layers

    def make_cache(self, fixed_gates: np.ndarray | None = None) -> list[Any]:
        """Return empty caches of one row, a list with one entry for each layer.

        Args:
            fixed_gates: gates [E] of all its tokens; None to route each token.
        """
        return self.model.make_cache(fixed_gates)

    def __call__(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Return logits [B, L, V] of tokens int32 [B, L], and add these tokens to the caches."""
        decoder_cache = DecoderCache.of(cache or self.make_cache())
        attn_layout = self.model.decode_layout(tokens.shape[1], decoder_cache)
        output = self.model(tokens, attn_layout, self._routing, cache=decoder_cache, adapters=self._adapters)
        return self.model.logits(output.hidden)


def prompt_gates(model: RoutedDecoder, tokens: np.ndarray, routing: Routing) -> np.ndarray:
    """Return one row of gates, float32 [E], for a whole prompt of token ids [L], from its mean router logits."""
    inputs = mx.array(tokens[None].astype(np.int32))
    attn_layout = packed_masks(mx.ones(inputs.shape, mx.int32), model.window)
    return np.array(model.prompt_gates(inputs, attn_layout, mx.ones(inputs.shape), routing)[0, 0])


@contextmanager
def fused_experts(base: Base, model: RoutedDecoder, gates: np.ndarray) -> Iterator[nn.Module]:
    """Fuse the experts into the base, weighted by constant gates [E], and restore the base on exit.

    Inside the context the model is mlx-lm's own and decodes at its cost. Quantized projections keep their bits; the
    low-rank update is computed next to them.
    """
    weights = [float(gate) for gate in gates[1:]]
    blended = blend_experts(model.experts, weights, model.shapes) if any(weights) else None
    originals = {}
    try:
        for layer, name in _adapted_projections(blended):
            parent = _parent_module(base, layer, name)
            originals[layer, name] = parent[name]
            assert blended is not None
            parent[name] = _add_expert(parent[name], blended, layer, name)
        yield base.model
    finally:
        for (layer, name), linear in originals.items():
            _parent_module(base, layer, name)[name] = linear


def _adapted_projections(expert: Expert | None) -> list[tuple[int, str]]:
    """Return (layer, projection name) of everything that an expert adapts; empty for None."""
    return [(i, name) for i, projections in enumerate(expert.layers) for name in projections] if expert else []


def _parent_module(base: Base, layer: int, name: str) -> nn.Module:
    """Return the module of a block that holds a projection: its attention or its MLP."""
    block = base.model.model.layers[layer]
    return block.self_attn if name in ATTENTION else block.mlp


def _add_expert(linear: Any, expert: Expert, layer: int, name: str) -> nn.Module:
    """Return a copy of a projection with an expert's update added: fused, or next to a quantized weight."""
    factors = expert.layers[layer][name]
    if isinstance(linear, nn.QuantizedLinear):
        return _QuantizedWithLoRA(linear, factors.lora_a, factors.lora_b * expert.scale)
    fused: Any = nn.Linear(1, 1, bias=False)
    update = expert.scale * (factors.lora_a @ factors.lora_b).T
    # Sum in float32 and round to the base's dtype once.
    fused.weight = (linear.weight.astype(mx.float32) + update).astype(linear.weight.dtype)
    if "bias" in linear:
        fused.bias = linear.bias
    mx.eval(fused.weight)
    return fused


class _QuantizedWithLoRA(nn.Module):
    """A quantized projection plus an unfused low-rank update: fusing would change the quantized weight."""

    def __init__(self, linear: nn.Module, a: mx.array, b: mx.array):
        super().__init__()
        self.linear = linear
        self.a, self.b = a, b

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x) + ((x @ self.a.astype(x.dtype)) @ self.b.astype(x.dtype))
