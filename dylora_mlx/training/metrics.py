"""Numbers of a run: counted FLOPs, parameters, and where records go (JSONL always, W&B on request)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from dylora_mlx.config import Config, Log
from dylora_mlx.model.gemma3 import RoutedGemma3


def step_flops(model: RoutedGemma3, rows: int, length: int, targets: int, features_known: bool) -> int:
    """Floating-point operations of one micro-batch's matrix products, forward and backward, a multiply-add as two.

    The backward computes gradients of activations only, from the lowest layer that carries experts upwards; attention
    is counted over whole score matrices, of which a CPU computes little more than half.
    """
    args, tokens, layers = model.base.args, rows * length, model.base.args.num_hidden_layers
    routed = layers - min(model.shapes)
    widths = args.head_dim * 2 * (args.num_attention_heads + args.num_key_value_heads)
    projections = 2 * args.hidden_size * (widths + 3 * args.intermediate_size)
    attention = 4 * length * args.head_dim * args.num_attention_heads
    forwards = layers + (layers if model.tap == "final" and not features_known else 0)
    forwards += routed if model.grad_checkpoint else 0
    trunk = forwards * (projections + attention) + routed * (projections + 2 * attention)
    ranks = sum(expert.rank for expert in model.experts)
    adapters = 6 * ranks * sum(i + o for names in model.shapes.values() for i, o in names.values())
    return tokens * (trunk + adapters) + 4 * targets * args.hidden_size * args.vocab_size


def trainable_parameters(model: RoutedGemma3) -> int:
    return sum(v.size for v in dict(tree_flatten(model.trainable_parameters())).values())


def base_parameters(model: RoutedGemma3) -> int:
    return sum(v.size for v in dict(tree_flatten(model.base.parameters())).values())


class Recorder:
    """Appends records to metrics.jsonl and mirrors them to W&B when asked.

    `records` counts the lines of metrics.jsonl. A failing W&B is reported once through `warn` and then left alone.
    """

    def __init__(self, folder: Path, config: Config, plain_config: dict, run_id: str, warn: Callable[[str], None]):
        self.folder, self.warn = folder, warn
        path = folder / "metrics.jsonl"
        self.records = len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0
        self.wandb = self._start(config.log, plain_config, run_id)

    def _start(self, log: Log, plain_config: dict, run_id: str) -> Any:
        if log.wandb == "disabled":
            return None
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            import wandb

            settings = wandb.Settings(init_timeout=30)
            return wandb.init(
                project=log.project, name=self.folder.name, dir=str(self.folder), config=plain_config,
                mode=log.wandb, id=run_id, resume="allow", settings=settings,
            )  # fmt: skip
        except Exception as error:  # whatever W&B raises, the run goes on
            self.warn(f"W&B could not start, metrics.jsonl has everything: {_first_line(error)}")
            return None

    def log(self, step: int, record: dict[str, Any]) -> None:
        _append(self.folder / "metrics.jsonl", {"step": step, **record})
        self.records += 1
        if self.wandb is not None:
            try:
                self.wandb.log(record, step=step)
            except Exception as error:
                self._lose(error)

    def finish(self, summary: dict[str, Any]) -> None:
        if self.wandb is not None:
            try:
                self.wandb.summary.update(summary)
                self.wandb.finish()
            except Exception as error:
                self._lose(error)

    def _lose(self, error: Exception) -> None:
        self.warn(f"W&B stopped answering, metrics.jsonl goes on: {_first_line(error)}")
        self.wandb = None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def truncate(path: Path, records: int) -> None:
    """Keep a JSONL file's first `records` lines; what a later checkpoint would have covered goes, a torn line with it.

    Written beside, then renamed.
    """
    if not path.exists():
        return
    kept = path.read_text(encoding="utf-8").splitlines(keepends=True)[:records]
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(kept), encoding="utf-8")
    beside.replace(path)
