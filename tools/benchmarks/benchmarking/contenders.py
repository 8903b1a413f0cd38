"""Contenders: our step, mlx-lm's trainer step, the two-pass scheme of an earlier attempt, and PyTorch with PEFT.

Each contender trains LoRA factors of the same rank on the same projections of the same model. Each batches the
documents in its own usual way: ours packs them into rows, mlx-lm sorts by length and pads to a multiple of 32, the
two-pass scheme pads to the row length, and PEFT pads random batches to their longest document. decoding.py measures
generation.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX, for every contender)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from benchmarking.decoding import Decoding
from benchmarking.ours import DOCUMENTS, Ours, Sample, language_model
from benchmarking.workload import Workload, arguments, documents
from dylora_mlx.adapters import mlx_lm
from dylora_mlx.model.kernels import numerics


class _Mlx:
    """Base of the two MLX contenders: mlx-lm's LoRA layers, AdamW, and batches of padded rows [B, L + 1]."""

    def __init__(self, workload: Workload):
        from mlx_lm.tuner.utils import linear_to_lora_layers

        self.workload, self.model = workload, language_model(workload.size)
        config = {"rank": workload.rank, "scale": workload.alpha / workload.rank, "dropout": 0.0}
        keys = [mlx_lm.module_key(name) for name in workload.projections]
        linear_to_lora_layers(self.model, len(self.model.layers), config | {"keys": keys})
        self.model.train()
        self.optimizer = optim.AdamW(1e-4)
        self.optimizer.init(self.model.trainable_parameters())
        mx.eval(self.model.parameters(), self.optimizer.state)
        self.rows = self.batches(documents(workload, DOCUMENTS if workload.lengths != "full" else 4 * workload.rows))

    def batches(self, docs: list[tuple[np.ndarray, int]]) -> Iterator[Any]:
        """Yield batches forever, from (tokens, prompt length) of each document."""
        raise NotImplementedError


class MlxLm(_Mlx):
    """The step of mlx-lm's trainer, on batches from its own iterator."""

    def __init__(self, workload: Workload):
        super().__init__(workload)
        from mlx_lm.tuner.trainer import default_loss

        gradient = nn.value_and_grad(self.model, default_loss)

        def step(batch: mx.array, lengths: mx.array) -> Any:
            (loss, tokens), grads = gradient(self.model, batch, lengths)
            self.optimizer.update(self.model, grads)
            return loss, tokens

        # mlx-lm's trainer compiles its step. On a CPU that gains nothing and needs a C++ compiler.
        state = [self.model.state, self.optimizer.state]
        self.run = step if numerics.on_cpu() else mx.compile(step, inputs=state, outputs=state)

    def batches(self, docs: list[tuple[np.ndarray, int]]) -> Iterator[Any]:
        from mlx_lm.tuner.trainer import iterate_batches

        rows = self.workload.rows if self.workload.lengths == "full" else 4  # 4 is mlx-lm's default batch size
        data = [(tokens.tolist(), prompt) for tokens, prompt in docs]
        longest = self.workload.length + 1
        return iterate_batches(data, rows, longest, loop=True, seed=self.workload.seed)

    def step(self) -> Sample:
        batch, lengths = next(self.rows)
        started = time.perf_counter()
        loss, tokens = self.run(batch, lengths)
        mx.eval(loss, tokens, self.model.trainable_parameters(), self.optimizer.state)
        return Sample(time.perf_counter() - started, int(tokens.item()))


class TwoPass(_Mlx):
    """The scheme of the earlier attempt: a routing pass with the head, then the training pass.

    Every row is padded to the full row length.
    """

    def __init__(self, workload: Workload):
        super().__init__(workload)

        def loss(inputs: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
            return (nn.losses.cross_entropy(self.model(inputs), targets) * weights).sum() / weights.sum()

        self.gradient = nn.value_and_grad(self.model, loss)

    def batches(self, docs: list[tuple[np.ndarray, int]]) -> Iterator[Any]:
        length, rows = self.workload.length, 2
        padded_rows = []
        for start in range(0, len(docs) - rows + 1, rows):
            tokens, weights = np.zeros((rows, length + 1), np.int32), np.zeros((rows, length), np.float32)
            for row, (document, prompt) in enumerate(docs[start : start + rows]):
                truncated = document[: length + 1]
                tokens[row, : len(truncated)] = truncated
                weights[row, prompt : len(truncated) - 1] = 1
            padded_rows.append((tokens, weights))
        return cycle(padded_rows)

    def step(self) -> Sample:
        tokens, weights = next(self.rows)
        inputs, targets, weight = mx.array(tokens[:, :-1]), mx.array(tokens[:, 1:]), mx.array(weights)
        started = time.perf_counter()
        # The routing pass; without eval, MLX would never compute these unused logits.
        mx.eval(self.model(inputs))
        loss, grads = self.gradient(inputs, targets, weight)
        self.optimizer.update(self.model, grads)
        mx.eval(loss, self.model.trainable_parameters(), self.optimizer.state)
        return Sample(time.perf_counter() - started, int(weights.sum()))


class Peft:
    """PyTorch with transformers and PEFT: SDPA attention, random batches padded to their longest document."""

    def __init__(self, workload: Workload):
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import Gemma3ForCausalLM, Gemma3TextConfig

        self.torch, self.device = torch, "cuda" if torch.cuda.is_available() else "cpu"
        model_args = {
            k: v for k, v in arguments(workload.size).items() if k not in ("model_type", "sliding_window_pattern")
        }
        pattern = arguments(workload.size).get("sliding_window_pattern", 6)
        layer_types = [
            "full_attention" if (i + 1) % pattern == 0 else "sliding_attention"
            for i in range(model_args["num_hidden_layers"])
        ]
        torch.manual_seed(0)
        config = Gemma3TextConfig(**{**model_args, "layer_types": layer_types, "attn_implementation": "sdpa"})
        model: Any = Gemma3ForCausalLM(config)
        model = model.to(self.device)
        if self.device == "cuda":
            model = model.to(torch.bfloat16)
        lora_config = LoraConfig(
            r=workload.rank,
            lora_alpha=int(workload.alpha),
            target_modules=list(workload.projections),
            task_type="CAUSAL_LM",
        )
        self.model = get_peft_model(model, lora_config)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)
        rows = workload.rows if workload.lengths == "full" else 4
        docs = documents(workload, DOCUMENTS if workload.lengths != "full" else 4 * workload.rows)
        self.rows = cycle([docs[i : i + rows] for i in range(0, len(docs) - rows + 1, rows)])

    def step(self) -> Sample:
        torch, batch = self.torch, next(self.rows)
        longest = max(len(tokens) for tokens, _ in batch)
        ids, labels = np.zeros((len(batch), longest), np.int64), np.full((len(batch), longest), -100, np.int64)
        mask = np.zeros_like(ids)
        for row, (tokens, prompt) in enumerate(batch):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
            labels[row, prompt + 1 : len(tokens)] = tokens[prompt + 1 :]
        arrays = [torch.from_numpy(a).to(self.device) for a in (ids, labels, mask)]
        started = time.perf_counter()
        loss = self.model(input_ids=arrays[0], labels=arrays[1], attention_mask=arrays[2]).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()  # CUDA is asynchronous: wait for the step
        return Sample(time.perf_counter() - started, int((labels >= 0).sum()))


CONTENDERS = {"ours": Ours, "mlx-lm": MlxLm, "two-pass": TwoPass, "peft": Peft, "decoding": Decoding}


def trainable(contender: Any) -> int:
    """Return the number of adapter parameters that a contender trains, without the router's rows."""
    if isinstance(contender, Peft):
        return sum(p.numel() for p in contender.model.parameters() if p.requires_grad)
    tree = contender.model.experts[-1] if isinstance(contender, Ours) else contender.model
    return sum(value.size for value in dict(tree_flatten(tree.trainable_parameters())).values())
