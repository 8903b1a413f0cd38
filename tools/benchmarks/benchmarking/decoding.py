"""Decoding benchmark: mlx-lm's greedy loop over one prompt, with its key-value cache, for each way to serve a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX, for every contender)

# isort: split
import mlx.core as mx
import numpy as np

from benchmarking.ours import Sample, language_model
from benchmarking.workload import Workload
from dylora_mlx.config import ModelConfig
from dylora_mlx.generation import decode
from dylora_mlx.generation.decode import TokenRouted
from dylora_mlx.growth.pool import ExpertRecord, Pool
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.routing.document_mean import DocumentMean
from dylora_mlx.model.routing.router import Routing


class Way(NamedTuple):
    """A way to serve a run."""

    router_layer: str | None = None
    """Input of the router, which routes every token: "final" states, or an "inner" layer; None without a router."""
    top_k: int | None = None
    """Experts per token; None computes all of them."""


WAYS = {
    "base": Way(),
    "prompt-routed": Way(),
    "final states, dense": Way("final"),
    "final states, top-3": Way("final", 3),
    "inner layer, dense": Way("inner"),
    "inner layer, top-3": Way("inner", 3),
}
"""Ways by their label in tables and results: the base in mlx-lm; experts fused into the weights with the gates of the
prompt; and a router with gates for every token, which reads the final states or the input of the middle layer."""


class Decoding:
    """One base in memory, served in every way in turn, so that all ways read the same weights."""

    def __init__(self, workload: Workload):
        self.workload, self.base = workload, Base(language_model(workload.size), None, "random", Path("."), "0" * 64)
        inner = len(self.base.model.layers) // 2
        self.models = {"final": self._routed("final"), "inner": self._routed(inner)}
        rng = np.random.default_rng(workload.seed)
        self.prompt = mx.array(rng.integers(3, self.base.args.vocab_size, workload.prompt).astype(np.int32))
        self.texts: dict[str, Iterator[Any]] = {}
        self.gates = np.full(workload.experts + 1, 1 / (workload.experts + 1), np.float32)

    def _routed(self, router_layer: int | str) -> RoutedDecoder:
        """Return a decoder with random experts and a random router, so that gates differ from token to token."""
        defaults = ModelConfig()
        mean = DocumentMean(defaults.document_mean_weight, defaults.document_mean_decay)
        model = RoutedDecoder(self.base, list(self.workload.projections), router_layer, mean=mean)
        pool, rng = Pool(model), np.random.default_rng(1)
        for number in range(self.workload.experts):
            record = ExpertRecord(f"skill{number}", self.workload.rank, self.workload.alpha, 0)
            pool.add(record, mx.random.key(number))
        for factors in (f for expert in pool.model.experts for layer in expert.layers for f in layer.values()):
            factors.lora_b = mx.array(rng.standard_normal(factors.lora_b.shape, np.float32) * 0.2)
        for row in pool.model.router.rows:
            row.weight = mx.array(rng.standard_normal(row.weight.shape, np.float32) * 0.05)
        mx.eval(pool.model.parameters())
        return pool.model

    def _served(self, name: str) -> AbstractContextManager[Any]:
        """Return a context that provides the model of a way.

        Fused experts are removed again when it exits, because all ways share the modules of the base.
        """
        way = WAYS[name]
        if way.router_layer is not None:
            return nullcontext(TokenRouted(self.models[way.router_layer], Routing(way.top_k, mx.array(1.0))))
        if name == "base":
            return nullcontext(self.base.model)
        return decode.fused_experts(self.base, self.models["final"], self.gates)

    def begin(self, name: str) -> float:
        """Restart a text from the prompt; return the seconds to its first token (prefill)."""
        from mlx_lm.generate import generate_step, generation_stream

        with self._served(name) as model:
            started = time.perf_counter()
            self.texts[name] = generate_step(self.prompt, model, max_tokens=-1)
            next(self.texts[name])
            seconds = time.perf_counter() - started
            mx.synchronize(generation_stream)
        return seconds

    def proceed(self, name: str, count: int) -> tuple[float, list[int]]:
        """Generate `count` more tokens of a text; return the seconds per token, and the tokens.

        mlx-lm starts computing the next token asynchronously before it yields one. Wait for that token: then each turn
        times exactly `count` whole tokens, and no computation runs into the turn of another way.
        """
        from mlx_lm.generate import generation_stream

        with self._served(name):
            started = time.perf_counter()
            tokens = [int(token) for token, _ in islice(self.texts[name], count)]
            mx.synchronize(generation_stream)
            return (time.perf_counter() - started) / count, tokens

    def step(self) -> Sample:
        """Generate a few tokens in every way, to warm up."""
        started = time.perf_counter()
        for name in WAYS:
            self.begin(name)
            self.proceed(name, 4)
        return Sample(time.perf_counter() - started, 5 * len(WAYS))
