"""Numbers of a run: counted FLOPs, parameters, and metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from dylora_mlx import console, ranks
from dylora_mlx.errors import UserError
from dylora_mlx.model.routed import RoutedDecoder
from dylora_mlx.training.tracking import Tracker


def step_flops(
    model: RoutedDecoder, rows: int, length: int, targets: int, features_known: bool, ranks: int | None = None
) -> int:
    """Floating-point operations of one micro-batch's matrix products, forward and backward, a multiply-add as two.

    The backward computes gradients of activations only, from the lowest layer that carries experts upwards; attention
    is counted over whole score matrices, of which a CPU computes little more than half. ranks: that a token is multiplied
    with; None for those of all experts.
    """
    args, tokens, layers = model.base.args, rows * length, model.base.args.num_hidden_layers
    routed = layers - min(model.shapes)
    head_dim = model.family.head_dim
    widths = head_dim * 2 * (args.num_attention_heads + args.num_key_value_heads)
    projections = 2 * args.hidden_size * (widths + 3 * args.intermediate_size)
    attention = 4 * length * head_dim * args.num_attention_heads
    forwards = layers + (layers if model.tap == "final" and not features_known else 0)
    forwards += routed if model.grad_checkpoint else 0
    trunk = forwards * (projections + attention) + routed * (projections + 2 * attention)
    ranks = sum(expert.rank for expert in model.experts) if ranks is None else ranks
    adapters = 6 * ranks * sum(i + o for names in model.shapes.values() for i, o in names.values())
    return tokens * (trunk + adapters) + 4 * targets * args.hidden_size * args.vocab_size


def trainable_parameters(model: RoutedDecoder) -> int:
    return sum(v.size for v in dict(tree_flatten(model.trainable_parameters())).values())


def base_parameters(model: RoutedDecoder) -> int:
    return sum(v.size for v in dict(tree_flatten(model.base.parameters())).values())


class Recorder:
    """Appends records to metrics.jsonl, and passes them on to W&B and to scripts; rank 0's alone. `records` counts the file's
    lines."""

    def __init__(self, folder: Path, tracker: Tracker):
        self.folder, self.tracker = folder, tracker
        path = folder / "metrics.jsonl"
        self.records = len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0

    def log(self, step: int, record: dict[str, Any]) -> None:
        if not ranks.leads():
            return
        _append(self.folder / "metrics.jsonl", {"step": step, **record})
        self.records += 1
        console.event("metrics", step=step, **record)
        self.tracker.log(step, record)


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def truncate(path: Path, records: int) -> None:
    """Keep a JSONL file's first `records` lines; what a later checkpoint would have covered goes, a torn line with it.

    Written beside, then renamed. Raises UserError for what is no such file.
    """
    if not path.exists():
        return
    try:
        kept = path.read_text(encoding="utf-8").splitlines(keepends=True)[:records]
        beside = path.with_suffix(".tmp")
        beside.write_text("".join(kept), encoding="utf-8")
        beside.replace(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read or written anew; restore the file from a copy") from error
