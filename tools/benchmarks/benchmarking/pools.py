"""What experts that are there and hardly used cost: a step and a token, by the size of the pool."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from rich.table import Table

from benchmarking.ratios import paired
from benchmarking.workers import Worker
from benchmarking.workload import Workload, arguments
from dylora_mlx.model.experts import autotune

TOP_K = 2
FORMS = {"all at once": float("inf"), "looked up": 0.0, "in files": 0.0}
"""Ratios that make a pool of any size computed so."""
SERVED = "tap final, top-3"
TURN = 8


def measure(
    size: str, length: int, counts: list[int], runs: int, tokens: int, cache_gb: float, memory_mb: int | None
) -> dict[str, Any]:
    """By number of experts: seconds a step (one expert learns, top-2 routing over all) in each form, the form that a run
    takes by its own measurement, seconds a token generated, and bytes held. memory_mb: for experts in files, None to leave
    that form out. All take turns.

    Raises Failed when a process cannot do it.
    """
    a = arguments(size)
    shape = a["hidden_size"], a["num_attention_heads"] * a["head_dim"]
    dtype = mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.bfloat16
    measured = autotune.measure_gather_threshold(shape, Workload.rank, length, dtype)
    trained: dict[tuple[int, str], Worker] = {}
    for count in counts:
        for form in _forms(count, memory_mb):
            room = memory_mb if form == "in files" else None
            load = Workload(size, "full", 2, length, count, top_k=TOP_K, gather_threshold=FORMS[form], memory_mb=room)
            trained[count, form] = Worker("ours", load)
    found: dict[str, Any] = {"crossover": measured, "pools": {}}
    steps = _turns(trained, "step", runs, cache_gb)
    held = {which: worker.ask("memory") for which, worker in trained.items()}
    for worker in trained.values():
        worker.close()
    served = {count: Worker("decoding", Workload(size, experts=count)) for count in counts}
    written = _written(served, max(1, tokens // TURN), cache_gb)
    for worker in served.values():
        worker.close()
    first = min(counts)
    for count in counts:
        chosen = "looked up" if autotune.use_gather(count - 1, TOP_K, measured) else "all at once"
        forms = {form: steps[count, form] for form in FORMS if (count, form) in steps}
        found["pools"][count] = {
            "step": forms, "chosen": chosen, "held": {form: held[count, form] for form in forms}, "token": written[count],
            "step_against_first": paired(forms[chosen], steps[first, "all at once"]),
            "token_against_first": paired(written[count], written[first]),
        }  # fmt: skip
    return found


def _forms(count: int, memory_mb: int | None) -> list[str]:
    if count - 1 < autotune.MIN_EXPERTS:
        return ["all at once"]
    return [form for form in FORMS if form != "in files" or memory_mb is not None]


def _turns(workers: dict[Any, Worker], request: str, runs: int, cache_gb: float) -> dict[Any, list[float]]:
    seconds: dict[Any, list[float]] = {which: [] for which in workers}
    for worker in workers.values():
        worker.ask("start", cache_gb)
    for _ in range(runs):
        for which, worker in workers.items():
            seconds[which].append(worker.ask(request)[0])
    return seconds


def _written(workers: dict[int, Worker], turns: int, cache_gb: float) -> dict[int, list[float]]:
    """Seconds a token of every turn of TURN tokens."""
    for worker in workers.values():
        worker.ask("start", cache_gb)
        worker.ask("begin", SERVED)
        worker.ask("proceed", SERVED, 2)
    found: dict[int, list[float]] = {count: [] for count in workers}
    for _ in range(turns):
        for count, worker in workers.items():
            found[count].append(worker.ask("proceed", SERVED, TURN)[0])
    return found


def table(found: dict[str, Any]) -> Table:
    """A row for each size of the pool."""
    title = f"pools (top-{TOP_K}; looking up pays from {found['crossover']:.1f} experts for each that a token uses)"
    made = Table(title=title)
    for column in (
        "experts",
        *FORMS,
        "s/step, chosen",
        "against the first",
        "ms/token",
        "against the first",
        "peak GB",
        "in files",
    ):
        made.add_column(column, justify="right")
    for count, m in found["pools"].items():
        medians = {form: float(np.median(seconds)) for form, seconds in m["step"].items()}
        made.add_row(
            str(count), *(f"{medians[form]:.3f}" if form in medians else "" for form in FORMS),
            f"{medians[m['chosen']]:.3f} ({m['chosen']})", _shown(m["step_against_first"]),
            f"{1e3 * float(np.median(m['token'])):.2f}", _shown(m["token_against_first"]),
            *(f"{m['held'][form]['peak']:.3f}" if form in m["held"] else "" for form in (m["chosen"], "in files")),
        )  # fmt: skip
    return made


def _shown(against: dict[str, float]) -> str:
    return f"{against['ratio']:.2f} ({against['low']:.2f} to {against['high']:.2f})"
