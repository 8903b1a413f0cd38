"""Cost of decoding relative to the base alone: measured in turns, and counted in bytes and FLOPs."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.table import Table

from benchmarking.decoding import WAYS
from benchmarking.ratios import paired
from benchmarking.workers import Worker
from benchmarking.workload import Workload, arguments, projection_shapes
from dylora_mlx.model.kernels import numerics

TURN = 16
"""Tokens that each way decodes per turn."""


def counted(workload: Workload, name: str) -> dict[str, float]:
    """Count the bytes that one token must read and the FLOPs that it takes, in the middle of the generated text.

    A single token reads every weight once and uses it once, so the bytes of weights and of the key-value cache bound
    its speed. The FLOPs are two per weight, plus those of attention scores and outputs. If the router reads the final
    states, each token passes through the trunk twice.
    """
    args, router_layer = arguments(workload.size), WAYS[name].router_layer
    hidden_size, intermediate_size, layers, head_dim = (
        args["hidden_size"],
        args["intermediate_size"],
        args["num_hidden_layers"],
        args["head_dim"],
    )
    heads, kv_heads = args["num_attention_heads"], args["num_key_value_heads"]
    passes = 2 if router_layer == "final" else 1
    weights = (
        passes * layers * (hidden_size * head_dim * (2 * heads + 2 * kv_heads) + 3 * hidden_size * intermediate_size)
        + hidden_size * args["vocab_size"]
    )
    if router_layer is not None:
        adapted_layers, total_rank = (
            layers if router_layer == "final" else layers - layers // 2,
            workload.experts * workload.rank,
        )
        weights += (
            adapted_layers * total_rank * sum(map(sum, projection_shapes(workload).values()))
            + (workload.experts + 1) * hidden_size
        )
    context, global_layers = workload.prompt + workload.tokens // 2, layers // args["sliding_window_pattern"]
    cached_keys = passes * (global_layers * context + (layers - global_layers) * min(context, args["sliding_window"]))
    bytes_per_value = 4 if numerics.on_cpu() else 2
    return {
        "bytes": bytes_per_value * (weights + 2.0 * cached_keys * kv_heads * head_dim),
        "flops": 2.0 * weights + 4.0 * cached_keys * heads * head_dim,
    }


def measure(workload: Workload, runs: int, cache_gb: float) -> dict[str, dict[str, Any]]:
    """Measure every way to serve a run, and compare it with the base.

    Each way decodes `runs` texts. All run in one process, to read the same weights, and take turns of a few tokens
    each, so that a change of the machine's speed within a text affects all of them alike.

    Returns:
        By way: seconds per token of each turn, seconds to the first token of each text, and the cost relative to the
        base, counted and measured.
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
                # Shuffle the order each time: what is in the CPU's caches depends on the way that ran before.
                for name in order.permutation(list(WAYS)).tolist():
                    seconds[name].append(worker.ask("proceed", name, turn)[0])
    finally:
        worker.close()
    results, base_bytes = {}, counted(workload, "base")["bytes"]
    for name in WAYS:
        cost = counted(workload, name)
        results[name] = {
            "seconds": seconds[name], "prompt": prompt[name], "counted": cost | {"ratio": cost["bytes"] / base_bytes},
            "time_against_base": paired(seconds[name], seconds["base"]),
        }  # fmt: skip
    return results


def table(results: dict[str, Any]) -> Table:
    """Return a table of measured and counted costs, both also relative to the base."""
    table = Table(title="decode")
    for heading in ("", "tokens/s", "ms/token", "to first, s", "MB/token", "MFLOP/token", "counted", "measured"):
        table.add_column(heading, justify="right")
    for name, measured in results.items():
        seconds, cost, against = np.median(measured["seconds"]), measured["counted"], measured["time_against_base"]
        table.add_row(
            name, f"{1 / seconds:.1f}", f"{1e3 * seconds:.2f}", f"{np.median(measured['prompt']):.2f}",
            f"{cost['bytes'] / 1e6:.1f}", f"{cost['flops'] / 1e6:.1f}", f"{cost['ratio']:.3f}",
            f"{against['ratio']:.2f} ({against['low']:.2f} to {against['high']:.2f})",
        )  # fmt: skip
    return table
