"""What generation costs against the base: measured in turns, and counted."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.table import Table

from benchmarking.decoding import WAYS
from benchmarking.ratios import paired
from benchmarking.workers import Worker
from benchmarking.workload import Workload, arguments
from dylora_mlx.model.kernels import numerics

TURN = 16
"""Tokens that a way writes before it is the next one's turn."""


def counted(workload: Workload, name: str) -> dict[str, float]:
    """Bytes that one token must read and FLOPs that it takes, in the middle of the text.

    Of a token alone every weight is read once and used once, so what bounds a token is the bytes; FLOPs are twice the
    weights, and scores and outputs of attention. With tap final the trunk is passed through twice.
    """
    a, router_layer = arguments(workload.size), WAYS[name].router_layer
    d, inner, layers, h = a["hidden_size"], a["intermediate_size"], a["num_hidden_layers"], a["head_dim"]
    heads, shared = a["num_attention_heads"], a["num_key_value_heads"]
    passes = 2 if router_layer == "final" else 1
    weights = passes * layers * (d * h * (2 * heads + 2 * shared) + 3 * d * inner) + d * a["vocab_size"]
    if router_layer is not None:
        adapted, ranks = layers if router_layer == "final" else layers - layers // 2, workload.experts * workload.rank
        weights += adapted * ranks * (2 * d + heads * h + shared * h) + (workload.experts + 1) * d
    before, every = workload.prompt + workload.tokens // 2, layers // a["sliding_window_pattern"]
    keys = passes * (every * before + (layers - every) * min(before, a["sliding_window"]))
    width = 4 if numerics.on_cpu() else 2
    return {"bytes": width * (weights + 2.0 * keys * shared * h), "flops": 2.0 * weights + 4.0 * keys * heads * h}


def measure(workload: Workload, runs: int, cache_gb: float) -> dict[str, dict[str, Any]]:
    """By way: seconds a token of every turn, seconds to the first token of every text, and the cost against the base,
    counted and measured.

    Every way writes `runs` texts in one process, so that all read the very same weights, and they take turns of some
    tokens: a machine whose speed changes within a text is as slow for one as for the other.
    """
    worker = Worker("decoding", workload)
    prompt: dict[str, list[float]] = {name: [] for name in WAYS}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    turn, order = min(TURN, workload.tokens), np.random.default_rng(workload.seed)
    try:
        worker.ask("start", cache_gb)
        for _ in range(runs):
            for name in WAYS:
                prompt[name].append(worker.ask("begin", name))
            for _ in range(workload.tokens // turn):
                # In another order each time: what a way finds in the caches depends on who came before it.
                for name in order.permutation(list(WAYS)).tolist():
                    seconds[name].append(worker.ask("proceed", name, turn)[0])
    finally:
        worker.close()
    found, base = {}, counted(workload, "base")["bytes"]
    for name in WAYS:
        cost = counted(workload, name)
        found[name] = {
            "seconds": seconds[name], "prompt": prompt[name], "counted": cost | {"ratio": cost["bytes"] / base},
            "time_against_base": paired(seconds[name], seconds["base"]),
        }  # fmt: skip
    return found


def table(found: dict[str, Any]) -> Table:
    """What was measured, beside what was counted; both against the base."""
    made = Table(title="decode")
    for column in ("", "tokens/s", "ms/token", "to first, s", "MB/token", "MFLOP/token", "counted", "measured"):
        made.add_column(column, justify="right")
    for who, m in found.items():
        seconds, cost, against = np.median(m["seconds"]), m["counted"], m["time_against_base"]
        made.add_row(
            who, f"{1 / seconds:.1f}", f"{1e3 * seconds:.2f}", f"{np.median(m['prompt']):.2f}",
            f"{cost['bytes'] / 1e6:.1f}", f"{cost['flops'] / 1e6:.1f}", f"{cost['ratio']:.3f}",
            f"{against['ratio']:.2f} ({against['low']:.2f} to {against['high']:.2f})",
        )  # fmt: skip
    return made
