"""Who is measured: our step, mlx-lm's trainer step, the two-pass scheme of an earlier attempt, and PyTorch with PEFT.

Each contender trains LoRA factors of the same rank on the same projections of the same model and takes the rows it
would take by itself: ours packs, mlx-lm sorts by length and pads to a multiple of 32, the two-pass scheme pads to the
row length, PEFT pads random batches to their longest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX, for every contender)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from benchmarking.workload import Workload, arguments, documents
from dylora_mlx.config import Data, Training
from dylora_mlx.data import packing
from dylora_mlx.data.formatting import Document
from dylora_mlx.data.stream import Split, Stream
from dylora_mlx.growth.pool import Pool, Record
from dylora_mlx.model import attention, head, lanes, lora, numerics
from dylora_mlx.model.base import Base
from dylora_mlx.model.gemma3 import RoutedGemma3
from dylora_mlx.model.router import Routing
from dylora_mlx.training import objective
from dylora_mlx.training.objective import MicroBatch, Rehearsal
from dylora_mlx.training.step import Step, make_optimizers

KEYS = ["self_attn.q_proj", "self_attn.v_proj"]
DOCUMENTS = 256


class Sample(NamedTuple):
    """One step: seconds, and the tokens that bore a loss in it."""

    seconds: float
    tokens: int


def language_model(size: str) -> Any:
    """mlx-lm's Gemma 3 of that size with random weights, float32 on a CPU and bfloat16 on a GPU, frozen."""
    from mlx_lm.models.gemma3_text import Model, ModelArgs

    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(arguments(size)))
    dtype = mx.float32 if numerics.on_cpu() else mx.bfloat16
    model.update(tree_map(lambda v: (mx.random.normal(v.shape) * 0.02).astype(dtype), model.parameters()))
    model.freeze()
    model.eval()
    mx.eval(model.parameters())
    return model


class Ours:
    """Our step: packed rows, known features, one routed pass, the fused head, rehearsal and z-loss as by default."""

    def __init__(self, workload: Workload):
        self.workload, model = workload, language_model(workload.size)
        self.model = RoutedGemma3(Base(model, None, "random", Path("."), "0" * 64), ["q_proj", "v_proj"], "final")
        pool = Pool(self.model)
        for number in range(workload.experts):
            pool.add(Record(f"skill{number}", workload.rank, workload.alpha, 0), mx.random.key(number))
            if number + 1 < workload.experts:
                pool.freeze(number + 1)
        self.training, self.dims = Training(), model.args.hidden_size
        self.optimizers = make_optimizers(self.training)
        self.optimizers.init(self.model)
        compiled = not numerics.on_cpu()
        self.step_function = Step(self.model, self.optimizers, self.training, None, workload.experts, compiled)
        rng = np.random.default_rng(1)
        memory = rng.standard_normal((self.training.rehearsal_tokens, self.dims), np.float32)
        count = len(memory)
        self.memory = Rehearsal(
            mx.array(memory), mx.zeros(count, mx.int32), mx.full((count,), 1 / count) if count else mx.zeros(0)
        )
        mx.eval(self.memory)
        self.rng, self.plan = rng, self._plan()
        self.numbers = cycle(range(max(1, len(self.plan) - 1)))

    def _plan(self) -> Stream:
        found = documents(self.workload, DOCUMENTS if self.workload.lengths != "full" else 4 * self.workload.rows)
        learn = [np.arange(len(tokens)) > prompt for tokens, prompt in found]
        pieces = packing.cut([Document(t, m) for (t, _), m in zip(found, learn, strict=True)], self.workload.length)
        # On a CPU a step's rows are micro-batches that run side by side; a GPU takes them at once.
        rows, times = (1, self.workload.rows) if numerics.on_cpu() else (self.workload.rows, 1)
        data = Data(row_length=self.workload.length)
        return Stream.of(Split(pieces, len(pieces)), data, 1, rows, times, self.workload.seed)

    def batches(self) -> list[MicroBatch]:
        """The next step's micro-batches on the device; random features stand for the cached ones."""
        made = []
        for b in self.plan.step(next(self.numbers)):
            features = self.rng.standard_normal((*b.inputs.shape, self.dims), np.float32).astype(np.float16)
            made.append(objective.micro_batch(b.inputs, b.targets, b.learn, b.segments, features, self.model.window))
        return made

    def step(self) -> Sample:
        batches = self.batches()
        started = time.perf_counter()
        outcome = self.step_function(batches, self.memory, mx.array(1.0))
        mx.eval(outcome, self.model.state, self.optimizers.state)
        return Sample(time.perf_counter() - started, sum(b.targets.size for b in batches))

    def parts(self, runs: int) -> dict[str, float]:
        """Median seconds of each part of a step by itself, over all its micro-batches."""
        batches = self.batches()
        adapters = self.model.adapters()
        young = lora.stack(self.model.experts, [len(self.model.experts)], self.model.base.model.norm.weight.dtype)
        joined = lora.joined(self.step_function.frozen, young)
        states = [mx.array(self.rng.standard_normal((b.targets.size, self.dims), np.float32)) for b in batches]
        states = [s.astype(self.model.base.model.norm.weight.dtype) for s in states]
        mx.eval(batches, adapters, young, joined, states)
        routing = Routing(None, mx.array(1.0))

        def routed(batch: MicroBatch, laid_out: Any) -> mx.array:
            return self.model(batch.inputs, batch.where, routing, batch.features, adapters=laid_out).hidden

        def gradient(batch: MicroBatch) -> Any:
            def summed(pairs: lora.Pairs) -> mx.array:
                layers = {
                    layer: {name: f._replace(learned=pairs[layer][name]) for name, f in named.items()}
                    for layer, named in joined.layers.items()
                }
                return routed(batch, adapters._replace(stack=joined._replace(layers=layers))).sum()

            return mx.value_and_grad(summed)(lora.pairs(young))

        def loss_head(s: mx.array, batch: MicroBatch) -> mx.array:
            tile = head.tile_size(len(s))
            return mx.grad(lambda h: head.token_losses(self.model.head, h, batch.targets, tile, True).sum())(s)

        zeros = tree_map(mx.zeros_like, self.model.experts[-1].trainable_parameters())
        held = self.model.experts[-1].trainable_parameters()
        spare = optim.AdamW(1e-3)
        work: dict[str, Callable[[], Any]] = {
            "features": lambda: lanes.run([partial(self.model.features, b.inputs, b.where) for b in batches]),
            "trunk forward": lambda: lanes.run([partial(routed, b, adapters) for b in batches]),
            "trunk forward and backward": lambda: lanes.run([partial(gradient, b) for b in batches]),
            "head and loss, with gradient": lambda: lanes.run(
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


class _Mlx:
    """What the two MLX contenders share: mlx-lm's LoRA layers, AdamW, and a step over padded rows [B, L + 1]."""

    def __init__(self, workload: Workload):
        from mlx_lm.tuner.utils import linear_to_lora_layers

        self.workload, self.model = workload, language_model(workload.size)
        config = {"rank": workload.rank, "scale": workload.alpha / workload.rank, "dropout": 0.0, "keys": KEYS}
        linear_to_lora_layers(self.model, len(self.model.layers), config)
        self.model.train()
        self.optimizer = optim.AdamW(1e-4)
        self.optimizer.init(self.model.trainable_parameters())
        mx.eval(self.model.parameters(), self.optimizer.state)
        self.rows = self.batches(documents(workload, DOCUMENTS if workload.lengths != "full" else 4 * workload.rows))

    def batches(self, found: list[tuple[np.ndarray, int]]) -> Iterator[Any]:
        raise NotImplementedError


class MlxLm(_Mlx):
    """mlx-lm's own trainer step, on batches from its own iterator."""

    def __init__(self, workload: Workload):
        super().__init__(workload)
        from mlx_lm.tuner.trainer import default_loss

        gradient = nn.value_and_grad(self.model, default_loss)

        def step(batch: mx.array, lengths: mx.array) -> Any:
            (loss, tokens), grads = gradient(self.model, batch, lengths)
            self.optimizer.update(self.model, grads)
            return loss, tokens

        # The trainer compiles its step; on a CPU that gains nothing and needs a C++ compiler.
        state = [self.model.state, self.optimizer.state]
        self.run = step if numerics.on_cpu() else mx.compile(step, inputs=state, outputs=state)

    def batches(self, found: list[tuple[np.ndarray, int]]) -> Iterator[Any]:
        from mlx_lm.tuner.trainer import iterate_batches

        rows = self.workload.rows if self.workload.lengths == "full" else 4  # 4 is its default batch size
        data = [(tokens.tolist(), prompt) for tokens, prompt in found]
        longest = self.workload.length + 1
        return iterate_batches(data, rows, longest, loop=True, seed=self.workload.seed)

    def step(self) -> Sample:
        batch, lengths = next(self.rows)
        started = time.perf_counter()
        loss, tokens = self.run(batch, lengths)
        mx.eval(loss, tokens, self.model.trainable_parameters(), self.optimizer.state)
        return Sample(time.perf_counter() - started, int(tokens.item()))


class TwoPass(_Mlx):
    """The earlier attempt's scheme: rows padded to the row length, a routing pass with the head, then the pass that learns."""

    def __init__(self, workload: Workload):
        super().__init__(workload)

        def loss(inputs: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
            return (nn.losses.cross_entropy(self.model(inputs), targets) * weights).sum() / weights.sum()

        self.gradient = nn.value_and_grad(self.model, loss)

    def batches(self, found: list[tuple[np.ndarray, int]]) -> Iterator[Any]:
        size, rows = self.workload.length, 2
        made = []
        for begin in range(0, len(found) - rows + 1, rows):
            tokens, weights = np.zeros((rows, size + 1), np.int32), np.zeros((rows, size), np.float32)
            for r, (document, prompt) in enumerate(found[begin : begin + rows]):
                kept = document[: size + 1]
                tokens[r, : len(kept)] = kept
                weights[r, prompt : len(kept) - 1] = 1
            made.append((tokens, weights))
        return cycle(made)

    def step(self) -> Sample:
        tokens, weights = next(self.rows)
        inputs, targets, weight = mx.array(tokens[:, :-1]), mx.array(tokens[:, 1:]), mx.array(weights)
        started = time.perf_counter()
        mx.eval(self.model(inputs))
        loss, grads = self.gradient(inputs, targets, weight)
        self.optimizer.update(self.model, grads)
        mx.eval(loss, self.model.trainable_parameters(), self.optimizer.state)
        return Sample(time.perf_counter() - started, int(weights.sum()))


class Peft:
    """PyTorch with transformers and PEFT, sdpa attention, random batches padded to their longest."""

    def __init__(self, workload: Workload):
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import Gemma3ForCausalLM, Gemma3TextConfig

        self.torch, self.device = torch, "cuda" if torch.cuda.is_available() else "cpu"
        found = {k: v for k, v in arguments(workload.size).items() if k not in ("model_type", "sliding_window_pattern")}
        pattern = arguments(workload.size).get("sliding_window_pattern", 6)
        kinds = [
            "full_attention" if (i + 1) % pattern == 0 else "sliding_attention"
            for i in range(found["num_hidden_layers"])
        ]
        torch.manual_seed(0)
        config = Gemma3TextConfig(**{**found, "layer_types": kinds, "attn_implementation": "sdpa"})
        model: Any = Gemma3ForCausalLM(config)
        model = model.to(self.device)
        if self.device == "cuda":
            model = model.to(torch.bfloat16)
        lora_config = LoraConfig(
            r=workload.rank, lora_alpha=int(workload.alpha), target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        )
        self.model = get_peft_model(model, lora_config)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)
        rows = workload.rows if workload.lengths == "full" else 4
        drawn = documents(workload, DOCUMENTS if workload.lengths != "full" else 4 * workload.rows)
        self.rows = cycle([drawn[i : i + rows] for i in range(0, len(drawn) - rows + 1, rows)])

    def step(self) -> Sample:
        torch, batch = self.torch, next(self.rows)
        longest = max(len(tokens) for tokens, _ in batch)
        ids, labels = np.zeros((len(batch), longest), np.int64), np.full((len(batch), longest), -100, np.int64)
        seen = np.zeros_like(ids)
        for r, (tokens, prompt) in enumerate(batch):
            ids[r, : len(tokens)], seen[r, : len(tokens)] = tokens, 1
            labels[r, prompt + 1 : len(tokens)] = tokens[prompt + 1 :]
        arrays = [torch.from_numpy(a).to(self.device) for a in (ids, labels, seen)]
        started = time.perf_counter()
        loss = self.model(input_ids=arrays[0], labels=arrays[1], attention_mask=arrays[2]).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()
        return Sample(time.perf_counter() - started, int((labels >= 0).sum()))


CONTENDERS = {"ours": Ours, "mlx-lm": MlxLm, "two-pass": TwoPass, "peft": Peft}


def trainable(contender: Any) -> int:
    """Adapter parameters that a contender trains (the router's rows not counted)."""
    if isinstance(contender, Peft):
        return sum(p.numel() for p in contender.model.parameters() if p.requires_grad)
    tree = contender.model.experts[-1] if isinstance(contender, Ours) else contender.model
    return sum(v.size for v in dict(tree_flatten(tree.trainable_parameters())).values())


def padding(workload: Workload) -> float:
    """Share of positions of our packed rows that carry no token."""
    found = documents(workload, 4 * DOCUMENTS)
    pieces = packing.cut([Document(t, np.arange(len(t)) > p) for t, p in found], workload.length)
    return (
        Stream.of(Split(pieces, len(pieces)), Data(row_length=workload.length), 1, 1, 2, 0)
        .statistics()
        .padding_fraction
    )


def blocks(workload: Workload) -> list[tuple[int, int]]:
    """(queries, keys) of the score blocks of one full row, a global layer's, as this device computes them."""
    if not numerics.on_cpu():
        return [(workload.length, workload.length)]
    segments = np.ones((1, workload.length), np.int32)
    found = attention.documents(segments, workload.length)
    return [(b.end - b.begin, b.high - b.low) for b in found.groups[0].full]
