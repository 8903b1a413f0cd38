"""The routed model as mlx-lm's generation wants one: tokens and a flat list of caches in, logits out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from dylora_mlx.adapters.fuse import blend_experts
from dylora_mlx.config import ATTENTION
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder.attention import packed_masks
from dylora_mlx.model.decoder.decoder import DecoderCache, RoutedDecoder
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.model.routing.router import Routing


class TokenRouted(nn.Module):
    """Gates for every token. `served` has, for every call so far, the likeliest expert's column at the last position, [B],
    evaluated when the call's logits are.

    With tap final each token takes a pass of the base and one of the mixture; with an inner tap there is one pass.
    """

    def __init__(self, model: RoutedDecoder, routing: Routing):
        super().__init__()
        self.model, self._routing = model, routing
        self._adapters = model.adapters(routing.top_k)
        self._served: list[mx.array] = []

    @property
    def chosen_experts(self) -> list[mx.array]:
        return self._served

    @property
    def layers(self) -> list[Any]:
        return self.model.base.layers

    def make_cache(self) -> list[Any]:
        """The base pass's caches, then the adapted pass's, and what the router has read where it reads the document's mean;
        none of the first with an inner tap."""
        made = self.model.make_cache()
        return [*made.base_kv_cache, *made.adapted_kv_cache, *([made.running_mean] if made.running_mean else [])]

    def __call__(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Logits [B, L, V] of tokens int32 [B, L]; the caches grow by them."""
        whole, count = self.make_cache() if cache is None else list(cache), len(self.layers)
        heard = whole.pop() if self.model.document_mean_weight else None
        pair = DecoderCache(whole[:-count], whole[-count:], heard)
        where = self.model.decode_layout(tokens.shape[1], pair)
        out = self.model(tokens, where, self._routing, cache=pair, adapters=self._adapters)
        self._served.append(out.gates[:, -1].argmax(-1))
        # Together with the logits: by itself it would be queued behind the next token, which mlx-lm has begun by then.
        return mx.depends(self.model.logits(out.hidden), self._served[-1])


def prompt_gates(model: RoutedDecoder, tokens: np.ndarray, routing: Routing) -> np.ndarray:
    """One row of gates float32 [E] for a whole prompt, token ids [L]: from its mean logits."""
    inputs = mx.array(tokens[None].astype(np.int32))
    where = packed_masks(mx.ones(inputs.shape, mx.int32), model.window)
    return np.array(model.prompt_gates(inputs, where, mx.ones(inputs.shape), routing)[0, 0])


@contextmanager
def fused_experts(base: Base, model: RoutedDecoder, gates: np.ndarray) -> Iterator[nn.Module]:
    """The base with experts folded in under constant gates [E]: within this it is mlx-lm's own model, and decodes at its
    cost. Quantised projections keep their bits and get the update beside them."""
    weights = [float(gate) for gate in gates[1:]]
    chosen = blend_experts(model.experts, weights, model.shapes) if any(weights) else None
    before = {}
    try:
        for layer, name in _places(chosen):
            owner = _owner(base, layer, name)
            before[layer, name] = owner[name]
            assert chosen is not None
            owner[name] = _with(owner[name], chosen, layer, name)
        yield base.model
    finally:
        for (layer, name), linear in before.items():
            _owner(base, layer, name)[name] = linear


def _places(expert: Expert | None) -> list[tuple[int, str]]:
    return [(i, name) for i, named in enumerate(expert.layers) for name in named] if expert else []


def _owner(base: Base, layer: int, name: str) -> nn.Module:
    block = base.model.model.layers[layer]
    return block.self_attn if name in ATTENTION else block.mlp


def _with(linear: Any, expert: Expert, layer: int, name: str) -> nn.Module:
    factors = expert.layers[layer][name]
    if isinstance(linear, nn.QuantizedLinear):
        return _Beside(linear, factors.lora_a, factors.lora_b * expert.scale)
    made: Any = nn.Linear(1, 1, bias=False)
    update = expert.scale * (factors.lora_a @ factors.lora_b).T
    made.weight = (linear.weight.astype(mx.float32) + update).astype(linear.weight.dtype)
    if "bias" in linear:
        made.bias = linear.bias
    mx.eval(made.weight)
    return made


class _Beside(nn.Module):
    """A quantised projection and a low-rank update."""

    def __init__(self, linear: nn.Module, a: mx.array, b: mx.array):
        super().__init__()
        self.linear = linear
        self.a, self.b = a, b

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x) + ((x @ self.a.astype(x.dtype)) @ self.b.astype(x.dtype))
