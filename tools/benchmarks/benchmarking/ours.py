"""Our training step for the benchmark, the parts of it measured separately, and the padding of our rows."""

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
from dylora_mlx.data.encoding import Document
from dylora_mlx.data.stream import BatchPlan, Split
from dylora_mlx.growth.pool import ExpertRecord, Pool
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder import packed_attention
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.experts import lora
from dylora_mlx.model.experts.offload import ExpertCache
from dylora_mlx.model.kernels import chunked_loss, numerics, streams
from dylora_mlx.model.routing.document_mean import DocumentMean
from dylora_mlx.model.routing.router import Routing
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.step.losses import MicroBatch, RehearsalBatch, batch_layout, forward_routed, micro_batch
from dylora_mlx.training.step.optimizers import make_optimizers
from dylora_mlx.training.step.step import Step

DOCUMENTS = 256
"""Documents drawn for a workload whose documents do not fill rows."""


class Sample(NamedTuple):
    """Measurement of one step."""

    seconds: float
    tokens: int
    """Tokens with a loss."""


def language_model(size: str) -> Any:
    """Return mlx-lm's Gemma 3 of this size, frozen, with random weights: float32 on a CPU, bfloat16 on a GPU."""
    from mlx_lm.models.gemma3_text import Model, ModelArgs

    rng, model = np.random.default_rng(0), Model(ModelArgs.from_dict(arguments(size)))
    dtype = mx.float32 if numerics.on_cpu() else mx.bfloat16

    def random_like(value: mx.array) -> mx.array:
        return mx.array(rng.standard_normal(value.shape, np.float32) * 0.02).astype(dtype)

    model.update(tree_map(random_like, model.parameters()))
    model.freeze()
    model.eval()
    mx.eval(model.parameters())
    return model


class Ours:
    """Our default training step: packed rows, cached features, one routed pass, fused head, rehearsal and z-loss."""

    def __init__(self, workload: Workload):
        self.workload, model = workload, language_model(workload.size)
        base = Base(model, None, "random", Path("."), "0" * 64)
        self.model = RoutedDecoder(base, list(workload.projections), "final")
        defaults = ModelConfig()
        self.model.document_mean = DocumentMean(defaults.document_mean_weight, defaults.document_mean_decay)
        pool = Pool(self.model, None if workload.memory_mb is None else ExpertCache(workload.memory_mb * 10**6))
        folder = Path(tempfile.mkdtemp(prefix="dylora-benchmark-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        for number in range(workload.experts):
            expert_id = pool.add(
                ExpertRecord(f"skill{number}", workload.rank, workload.alpha, 0), mx.random.key(number)
            )
            if expert_id < workload.experts:
                pool.freeze(expert_id)
            if expert_id < workload.experts and pool.cache:
                checkpoint.save_arrays(folder / f"{expert_id}.safetensors", mlx_lm.weights(self.model.experts[-1]))
                pool.offload(expert_id, folder / f"{expert_id}.safetensors", mlx_lm.factor_names(self.model.shapes))
        self.training, self.dims = TrainingConfig(), model.args.hidden_size
        self.optimizers = make_optimizers(self.training)
        self.optimizers.init(self.model)
        compiled = not numerics.on_cpu()
        rng = np.random.default_rng(1)
        for row in self.model.router.rows if workload.top_k else ():  # random rows: experts differ from token to token
            row.weight = mx.array(rng.standard_normal(row.weight.shape, np.float32) * 0.05)
        self.model.gather_threshold = workload.gather_threshold
        top_k, min_gate = workload.top_k, GrowthConfig().min_gate if workload.top_k else 0.0
        self.step_function = Step(
            self.model, self.optimizers, self.training, top_k, workload.experts, compiled, min_gate
        )
        memory = rng.standard_normal((self.training.rehearsal_tokens, self.dims), np.float32)
        num_rows = len(memory)
        self.memory = RehearsalBatch(
            mx.array(memory),
            mx.zeros(num_rows, mx.int32),
            mx.full((num_rows,), 1 / num_rows) if num_rows else mx.zeros(0),
        )
        mx.eval(self.memory)
        self.rng, self.plan = rng, self._plan()
        self.numbers = cycle(range(max(1, len(self.plan) - 1)))

    def _plan(self) -> BatchPlan:
        docs = documents(self.workload, DOCUMENTS if self.workload.lengths != "full" else 4 * self.workload.rows)
        loss_masks = [np.arange(len(tokens)) > prompt for tokens, prompt in docs]
        segments = packing.split_documents(
            [Document(token_ids, mask) for (token_ids, _), mask in zip(docs, loss_masks, strict=True)],
            self.workload.length,
        )
        # On a CPU each row is a micro-batch, and micro-batches run concurrently; a GPU takes all rows in one batch.
        rows, accumulation = (1, self.workload.rows) if numerics.on_cpu() else (self.workload.rows, 1)
        data = DataConfig(max_seq_length=self.workload.length)
        return BatchPlan.plan(Split(segments, len(segments)), data, 1, rows, accumulation, self.workload.seed)

    def batches(self) -> list[MicroBatch]:
        """Return the next step's micro-batches on the device, with random features in place of the feature cache."""
        micro_batches = []
        for batch in self.plan.step(next(self.numbers)):
            features = self.rng.standard_normal((*batch.inputs.shape, self.dims), np.float32).astype(np.float16)
            micro_batches.append(
                micro_batch(
                    batch.inputs, batch.targets, batch.loss_mask, batch.segment_ids, features, self.model.window
                )
            )
        return micro_batches

    def step(self) -> Sample:
        batches = self.batches()
        started = time.perf_counter()
        outcome = self.step_function(batches, self.memory, mx.array(1.0))
        mx.eval(outcome, self.step_function.state)
        return Sample(time.perf_counter() - started, sum(b.targets.size for b in batches))

    def parts(self, runs: int) -> dict[str, float]:
        """Return the median seconds of each part of a step, run separately over all micro-batches of the step."""
        batches = self.batches()
        adapters = self.model.adapters()
        trainable = lora.stack_dense(
            self.model.experts, [len(self.model.experts)], self.model.base.model.norm.weight.dtype
        )
        full_stack = lora.join_stacks(self.step_function.frozen, trainable)
        states = [mx.array(self.rng.standard_normal((b.targets.size, self.dims), np.float32)) for b in batches]
        states = [hidden.astype(self.model.base.model.norm.weight.dtype) for hidden in states]
        mx.eval(batches, adapters, trainable, full_stack, states)
        routing = Routing(None, mx.array(1.0))

        def routed(batch: MicroBatch, step_adapters: Any) -> mx.array:
            return forward_routed(self.model, batch, routing, step_adapters).hidden

        def gradient(batch: MicroBatch) -> Any:
            def summed(pairs: lora.FactorPairs) -> mx.array:
                layers = {
                    layer: {name: f._replace(trainable=pairs[layer][name]) for name, f in named.items()}
                    for layer, named in full_stack.layers.items()
                }
                return routed(batch, adapters._replace(stack=full_stack._replace(layers=layers))).sum()

            return mx.value_and_grad(summed)(lora.factor_pairs(trainable))

        def loss_head(hidden: mx.array, batch: MicroBatch) -> mx.array:
            tile = chunked_loss.tile_size(len(hidden))
            return mx.grad(lambda h: chunked_loss.token_losses(self.model.head, h, batch.targets, tile, True).sum())(
                hidden
            )

        zeros = tree_map(mx.zeros_like, self.model.experts[-1].trainable_parameters())
        weights = self.model.experts[-1].trainable_parameters()
        optimizer = optim.AdamW(1e-3)
        work: dict[str, Callable[[], Any]] = {
            "features": lambda: streams.run_concurrently(
                [partial(self.model.router_features, b.inputs, batch_layout(b, self.model.window)) for b in batches]
            ),
            "trunk forward": lambda: streams.run_concurrently([partial(routed, b, adapters) for b in batches]),
            "trunk forward and backward": lambda: streams.run_concurrently([partial(gradient, b) for b in batches]),
            "head and loss, with gradient": lambda: streams.run_concurrently(
                [partial(loss_head, hidden, b) for hidden, b in zip(states, batches, strict=True)]
            ),
            "optimizer": lambda: mx.eval(optimizer.apply_gradients(zeros, weights)),
            "host (batches)": lambda: self.batches(),
        }
        seconds: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(runs):
            for name, run_part in work.items():
                started = time.perf_counter()
                mx.eval(run_part())
                seconds[name].append(time.perf_counter() - started)
        return {name: float(np.median(samples)) for name, samples in seconds.items()}


def padding(workload: Workload) -> float:
    """Return the share of positions in our packed rows that hold no token."""
    docs = documents(workload, 4 * DOCUMENTS)
    segments = packing.split_documents(
        [Document(tokens, np.arange(len(tokens)) > prompt) for tokens, prompt in docs], workload.length
    )
    return (
        BatchPlan.plan(Split(segments, len(segments)), DataConfig(max_seq_length=workload.length), 1, 1, 2, 0)
        .statistics()
        .padding_fraction
    )


def blocks(workload: Workload) -> list[tuple[int, int]]:
    """Return (queries, keys) of each block of attention scores of one full row, as this device computes them.

    The blocks are those of a layer with global attention.
    """
    if not numerics.on_cpu():
        return [(workload.length, workload.length)]
    segments = np.ones((1, workload.length), np.int32)
    documents = packed_attention.find_documents(segments, workload.length)
    return [(b.end - b.begin, b.high - b.low) for b in documents.groups[0].full]
