"""Our step as it is measured, its parts by themselves, and its padding."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX, for every contender)

# isort: split
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from benchmarking.workload import Workload, arguments, documents
from dylora_mlx.adapters import mlx_lm
from dylora_mlx.config import DataConfig, GrowthConfig, ModelConfig, TrainingConfig
from dylora_mlx.data import packing
from dylora_mlx.data.formatting import Document
from dylora_mlx.data.stream import BatchPlan, Split
from dylora_mlx.growth.pool import ExpertRecord, Pool
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder import packed_attention
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.experts import lora
from dylora_mlx.model.experts.offload import ExpertCache
from dylora_mlx.model.kernels import chunked_loss, numerics, streams
from dylora_mlx.model.routing.router import Routing
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.step.losses import MicroBatch, RehearsalBatch, batch_layout, forward_routed, micro_batch
from dylora_mlx.training.step.optimizers import make_optimizers
from dylora_mlx.training.step.step import Step

DOCUMENTS = 256


class Sample(NamedTuple):
    """One step: seconds, and the tokens that bore a loss in it."""

    seconds: float
    tokens: int


def language_model(size: str) -> Any:
    """mlx-lm's Gemma 3 of that size with random weights, float32 on a CPU and bfloat16 on a GPU, frozen."""
    from mlx_lm.models.gemma3_text import Model, ModelArgs

    rng, model = np.random.default_rng(0), Model(ModelArgs.from_dict(arguments(size)))
    dtype = mx.float32 if numerics.on_cpu() else mx.bfloat16

    def drawn(value: mx.array) -> mx.array:
        return mx.array(rng.standard_normal(value.shape, np.float32) * 0.02).astype(dtype)

    model.update(tree_map(drawn, model.parameters()))
    model.freeze()
    model.eval()
    mx.eval(model.parameters())
    return model


class Ours:
    """Our step: packed rows, known features, one routed pass, the fused head, rehearsal and z-loss as by default."""

    def __init__(self, workload: Workload):
        self.workload, model = workload, language_model(workload.size)
        self.model = RoutedDecoder(Base(model, None, "random", Path("."), "0" * 64), ["q_proj", "v_proj"], "final")
        self.model.document_mean_weight = ModelConfig().document_mean_weight
        pool = Pool(self.model, None if workload.memory_mb is None else ExpertCache(workload.memory_mb * 10**6))
        files = Path(tempfile.mkdtemp(prefix="dylora-benchmark-"))
        atexit.register(shutil.rmtree, files, ignore_errors=True)
        for number in range(workload.experts):
            expert_id = pool.add(
                ExpertRecord(f"skill{number}", workload.rank, workload.alpha, 0), mx.random.key(number)
            )
            if expert_id < workload.experts:
                pool.freeze(expert_id)
            if expert_id < workload.experts and pool.cache:
                checkpoint.save_arrays(files / f"{expert_id}.safetensors", mlx_lm.weights(self.model.experts[-1]))
                pool.offload(expert_id, files / f"{expert_id}.safetensors", mlx_lm.factor_names(self.model.shapes))
        self.training, self.dims = TrainingConfig(), model.args.hidden_size
        self.optimizers = make_optimizers(self.training)
        self.optimizers.init(self.model)
        compiled = not numerics.on_cpu()
        rng = np.random.default_rng(1)
        for row in self.model.router.rows if workload.top_k else ():  # every token has experts of its own
            row.weight = mx.array(rng.standard_normal(row.weight.shape, np.float32) * 0.05)
        self.model.gather_threshold = workload.gather_threshold
        top_k, floor = workload.top_k, GrowthConfig().min_gate if workload.top_k else 0.0
        self.step_function = Step(self.model, self.optimizers, self.training, top_k, workload.experts, compiled, floor)
        memory = rng.standard_normal((self.training.rehearsal_tokens, self.dims), np.float32)
        count = len(memory)
        self.memory = RehearsalBatch(
            mx.array(memory), mx.zeros(count, mx.int32), mx.full((count,), 1 / count) if count else mx.zeros(0)
        )
        mx.eval(self.memory)
        self.rng, self.plan = rng, self._plan()
        self.numbers = cycle(range(max(1, len(self.plan) - 1)))

    def _plan(self) -> BatchPlan:
        found = documents(self.workload, DOCUMENTS if self.workload.lengths != "full" else 4 * self.workload.rows)
        learn = [np.arange(len(tokens)) > prompt for tokens, prompt in found]
        pieces = packing.split_documents(
            [Document(t, m) for (t, _), m in zip(found, learn, strict=True)], self.workload.length
        )
        # On a CPU a step's rows are micro-batches that run side by side; a GPU takes them at once.
        rows, times = (1, self.workload.rows) if numerics.on_cpu() else (self.workload.rows, 1)
        data = DataConfig(max_seq_length=self.workload.length)
        return BatchPlan.plan(Split(pieces, len(pieces)), data, 1, rows, times, self.workload.seed)

    def batches(self) -> list[MicroBatch]:
        """The next step's micro-batches on the device; random features stand for the cached ones."""
        made = []
        for b in self.plan.step(next(self.numbers)):
            features = self.rng.standard_normal((*b.inputs.shape, self.dims), np.float32).astype(np.float16)
            made.append(micro_batch(b.inputs, b.targets, b.loss_mask, b.segment_ids, features, self.model.window))
        return made

    def step(self) -> Sample:
        batches = self.batches()
        started = time.perf_counter()
        outcome = self.step_function(batches, self.memory, mx.array(1.0))
        mx.eval(outcome, self.step_function.state)
        return Sample(time.perf_counter() - started, sum(b.targets.size for b in batches))

    def parts(self, runs: int) -> dict[str, float]:
        """Median seconds of each part of a step by itself, over all its micro-batches."""
        batches = self.batches()
        adapters = self.model.adapters()
        young = lora.stack_dense(self.model.experts, [len(self.model.experts)], self.model.base.model.norm.weight.dtype)
        joined = lora.join_stacks(self.step_function.frozen, young)
        states = [mx.array(self.rng.standard_normal((b.targets.size, self.dims), np.float32)) for b in batches]
        states = [s.astype(self.model.base.model.norm.weight.dtype) for s in states]
        mx.eval(batches, adapters, young, joined, states)
        routing = Routing(None, mx.array(1.0))

        def routed(batch: MicroBatch, laid_out: Any) -> mx.array:
            return forward_routed(self.model, batch, routing, laid_out).hidden

        def gradient(batch: MicroBatch) -> Any:
            def summed(pairs: lora.FactorPairs) -> mx.array:
                layers = {
                    layer: {name: f._replace(trainable=pairs[layer][name]) for name, f in named.items()}
                    for layer, named in joined.layers.items()
                }
                return routed(batch, adapters._replace(stack=joined._replace(layers=layers))).sum()

            return mx.value_and_grad(summed)(lora.factor_pairs(young))

        def loss_head(s: mx.array, batch: MicroBatch) -> mx.array:
            tile = chunked_loss.tile_size(len(s))
            return mx.grad(lambda h: chunked_loss.token_losses(self.model.head, h, batch.targets, tile, True).sum())(s)

        zeros = tree_map(mx.zeros_like, self.model.experts[-1].trainable_parameters())
        held = self.model.experts[-1].trainable_parameters()
        spare = optim.AdamW(1e-3)
        work: dict[str, Callable[[], Any]] = {
            "features": lambda: streams.run_concurrently(
                [partial(self.model.router_features, b.inputs, batch_layout(b, self.model.window)) for b in batches]
            ),
            "trunk forward": lambda: streams.run_concurrently([partial(routed, b, adapters) for b in batches]),
            "trunk forward and backward": lambda: streams.run_concurrently([partial(gradient, b) for b in batches]),
            "head and loss, with gradient": lambda: streams.run_concurrently(
                [partial(loss_head, s, b) for s, b in zip(states, batches, strict=True)]
            ),
            "optimizer": lambda: mx.eval(spare.apply_gradients(zeros, held)),
            "host (batches)": lambda: self.batches(),
        }
        found: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(runs):
            for name, piece in work.items():
                started = time.perf_counter()
                mx.eval(piece())
                found[name].append(time.perf_counter() - started)
        return {name: float(np.median(seconds)) for name, seconds in found.items()}


def padding(workload: Workload) -> float:
    """Share of positions of our packed rows that carry no token."""
    found = documents(workload, 4 * DOCUMENTS)
    pieces = packing.split_documents([Document(t, np.arange(len(t)) > p) for t, p in found], workload.length)
    return (
        BatchPlan.plan(Split(pieces, len(pieces)), DataConfig(max_seq_length=workload.length), 1, 1, 2, 0)
        .statistics()
        .padding_fraction
    )


def blocks(workload: Workload) -> list[tuple[int, int]]:
    """(queries, keys) of the score blocks of one full row, a global layer's, as this device computes them."""
    if not numerics.on_cpu():
        return [(workload.length, workload.length)]
    segments = np.ones((1, workload.length), np.int32)
    found = packed_attention.find_documents(segments, workload.length)
    return [(b.end - b.begin, b.high - b.low) for b in found.groups[0].full]
