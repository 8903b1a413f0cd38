"""Cost of a training step and of a generated token by pool size, when a token uses few of the experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from rich.table import Table

from benchmarking.ratios import paired
from benchmarking.workers import Worker
from benchmarking.workload import Workload, arguments
from dylora_mlx.model.experts import autotune

TOP_K = 2
FORMS = {"dense product": float("inf"), "gather per token": 0.0, "gather, offloaded": 0.0}
"""Ways to compute a pool, with the gather threshold that selects each at any pool size.

`dense product` computes all experts in one dense matmul; `gather per token` only those that a token uses, from tables;
`gather, offloaded` does the same with the frozen experts in files.
"""
SERVED = "final states, top-3"
TURN = 8
"""Tokens that each pool decodes per turn."""


def measure(
    workload: Workload, counts: list[int], runs: int, tokens: int, cache_gb: float, memory_mb: int | None
) -> dict[str, Any]:
    """Measure pools of several sizes, which take turns.

    A step trains one expert, with top-2 routing over all of them.

    Args:
        workload: Model size, rows and projections.
        counts: Experts in each pool.
        runs: Measured steps per pool and form.
        tokens: Tokens to decode per pool, at least one turn of TURN.
        cache_gb: Limit of MLX's allocator cache.
        memory_mb: Memory for offloaded experts; None leaves that form out.

    Returns:
        The measured gather threshold ("crossover"), and by number of experts: seconds per step in each form, the form
        that a run would choose, memory in GB, seconds per generated token, and both times against the smallest pool's.

    Raises:
        Failed: A worker process failed.
    """
    args = arguments(workload.size)
    shape = args["hidden_size"], args["num_attention_heads"] * args["head_dim"]
    dtype = mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.bfloat16
    threshold = autotune.measure_gather_threshold(shape, workload.rank, workload.length, dtype)
    trainers: dict[tuple[int, str], Worker] = {}
    for count in counts:
        for form in _forms(count, memory_mb):
            budget_mb = memory_mb if form == "gather, offloaded" else None
            pool = replace(workload, experts=count, top_k=TOP_K, gather_threshold=FORMS[form], memory_mb=budget_mb)
            trainers[count, form] = Worker("ours", pool)
    results: dict[str, Any] = {"crossover": threshold, "pools": {}}
    steps = _step_seconds(trainers, "step", runs, cache_gb)
    memory = {key: worker.ask("memory") for key, worker in trainers.items()}
    for worker in trainers.values():
        worker.close()
    decoders = {count: Worker("decoding", replace(workload, experts=count)) for count in counts}
    decode_seconds = _decode_seconds(decoders, max(1, tokens // TURN), cache_gb)
    for worker in decoders.values():
        worker.close()
    smallest = min(counts)
    for count in counts:
        chosen = "gather per token" if autotune.use_gather(count - 1, TOP_K, threshold) else "dense product"
        forms = {form: steps[count, form] for form in FORMS if (count, form) in steps}
        results["pools"][count] = {
            "step": forms, "chosen": chosen, "held": {form: memory[count, form] for form in forms},
            "token": decode_seconds[count],
            "step_against_first": paired(forms[chosen], steps[smallest, "dense product"]),
            "token_against_first": paired(decode_seconds[count], decode_seconds[smallest]),
        }  # fmt: skip
    return results


def _forms(count: int, memory_mb: int | None) -> list[str]:
    if count - 1 < autotune.MIN_EXPERTS:
        return ["dense product"]
    return [form for form in FORMS if form != "gather, offloaded" or memory_mb is not None]


def _step_seconds(workers: dict[Any, Worker], request: str, runs: int, cache_gb: float) -> dict[Any, list[float]]:
    seconds: dict[Any, list[float]] = {key: [] for key in workers}
    for worker in workers.values():
        worker.ask("start", cache_gb)
    for _ in range(runs):
        for key, worker in workers.items():
            seconds[key].append(worker.ask(request)[0])
    return seconds


def _decode_seconds(workers: dict[int, Worker], turns: int, cache_gb: float) -> dict[int, list[float]]:
    """Return the seconds per token of each turn of TURN tokens, by number of experts."""
    for worker in workers.values():
        worker.ask("start", cache_gb)
        worker.ask("begin", SERVED)
        worker.ask("proceed", SERVED, 2)
    seconds: dict[int, list[float]] = {count: [] for count in workers}
    for _ in range(turns):
        for count, worker in workers.items():
            seconds[count].append(worker.ask("proceed", SERVED, TURN)[0])
    return seconds


def table(results: dict[str, Any]) -> Table:
    """Return a table with one row per pool size."""
    title = f"pools (top-{TOP_K}; gathering is faster above {results['crossover']:.1f} experts per used expert)"
    table = Table(title=title)
    for heading in (
        "experts",
        *FORMS,
        "s/step, chosen",
        "against the first",
        "ms/token",
        "against the first",
        "peak GB",
        "peak GB, offloaded",
    ):
        table.add_column(heading, justify="right")
    for count, pool in results["pools"].items():
        medians = {form: float(np.median(seconds)) for form, seconds in pool["step"].items()}
        table.add_row(
            str(count), *(f"{medians[form]:.3f}" if form in medians else "" for form in FORMS),
            f"{medians[pool['chosen']]:.3f} ({pool['chosen']})", _ratio_text(pool["step_against_first"]),
            f"{1e3 * float(np.median(pool['token'])):.2f}", _ratio_text(pool["token_against_first"]),
            *(f"{pool['held'][form]['peak']:.3f}" if form in pool["held"] else ""
              for form in (pool["chosen"], "gather, offloaded")),
        )  # fmt: skip
    return table


def _ratio_text(against: dict[str, float]) -> str:
    return f"{against['ratio']:.2f} ({against['low']:.2f} to {against['high']:.2f})"
