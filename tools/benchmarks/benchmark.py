"""Measure a training step against the alternatives: both sides in one run, taking turns, medians with intervals.

    python tools/benchmarks/benchmark.py                          the table of docs/performance.md (on two CPU cores some 15 minutes)
    python tools/benchmarks/benchmark.py --size embedded --runs 9 the same on the small embedded base
    python tools/benchmarks/benchmark.py --only step snippets --contenders ours mlx-lm peft --json out.json
    python tools/benchmarks/benchmark.py --only decode --runs 5   generation, in every way to serve a run
    python tools/benchmarks/benchmark.py --size embedded --experts 1,4,16,64,256,1024    what a large pool costs

It runs on CPU, Metal and CUDA alike. PyTorch and PEFT take part when they are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from benchmarking.ratios import ratio
from benchmarking.workers import Failed, Worker
from benchmarking.workload import Workload
from rich.console import Console
from rich.table import Table

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.errors import Failure
from dylora_mlx.system.files import check_output_file

SCENARIOS = ("step", "snippets", "mbpp", "memory", "experts", "matmuls", "parts", "padding", "decode")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python tools/benchmarks/benchmark.py", __doc__)
    parser.add_argument(
        "--size", choices=["gemma3-270m", "embedded"], default="gemma3-270m", help="model (random weights)"
    )
    parser.add_argument("--length", type=int, default=512, help="positions in a row")
    parser.add_argument("--runs", type=int, default=3, help="measured steps of each contender, after one that is not")
    parser.add_argument("--prompt", type=int, default=64, help="decode: tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=128, help="decode: tokens generated")
    parser.add_argument(
        "--experts",
        type=_counts,
        metavar="N,N,...",
        help="pools of these sizes, and nothing else: a step and a token of each",
    )
    parser.add_argument(
        "--expert-memory-mb",
        type=int,
        metavar="MB",
        help="experts: also with frozen experts in files, so much of them held",
    )
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, metavar="SCENARIO")
    parser.add_argument("--contenders", nargs="+", choices=["ours", "mlx-lm", "two-pass", "peft"], metavar="NAME")
    parser.add_argument(
        "--cache-gb", type=float, default=4.0, help="limit of MLX's allocator cache, for every contender"
    )
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    options = parser.parse_args(argv)
    options.only = ["pools"] if options.experts else options.only or list(SCENARIOS)
    if options.runs < 1 or options.length < 32:
        parser.error("--runs must be at least 1 and --length at least 32")
    if options.prompt < 2 or options.tokens < 2:
        parser.error("--prompt and --tokens must be at least 2")
    if options.expert_memory_mb is not None and not 0 <= options.expert_memory_mb < 10**9:
        parser.error("--expert-memory-mb must be at least 0")
    if not 0 <= options.cache_gb < math.inf:
        parser.error("--cache-gb must be at least 0")
    if options.json:
        check_output_file(options.json)
    if options.contenders is None:
        torch = all(importlib.util.find_spec(name) for name in ("torch", "peft"))
        options.contenders = ["ours", "mlx-lm", "two-pass"] + (["peft"] if torch else [])
    return options


def _counts(text: str) -> list[int]:
    counts = [int(word) for word in text.split(",")]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError("a pool has at least one expert")
    return sorted(set(counts))


def turns(
    workloads: dict[str, tuple[str, Workload]], options: argparse.Namespace, after: Callable | None = None
) -> dict:
    """Start a process for each named contender, let them take turns, and return what each measured."""
    workers = {name: Worker(contender, workload) for name, (contender, workload) in workloads.items()}
    try:
        for worker in workers.values():
            worker.ask("start", options.cache_gb)
        samples: dict[str, list] = {name: [] for name in workers}
        for _ in range(options.runs):
            for name, worker in workers.items():
                samples[name].append(worker.ask("step"))
        found = {}
        for name, worker in workers.items():
            seconds, tokens = zip(*samples[name], strict=True)
            first = worker.ask("__getattribute__", "first")
            rates = [t / s for s, t in samples[name]]
            found[name] = {"seconds": seconds, "tokens": tokens, "rates": rates, "first": first} | worker.ask("memory")
        if after is not None:
            found["after"] = after(workers)
        return found
    finally:
        for worker in workers.values():
            worker.close()


def contest(lengths: str, rows: int, options: argparse.Namespace, names: list[str]) -> dict:
    """Every rival takes turns with ours, one rival at a time: two models fit where four would not."""
    workload, found = Workload(options.size, lengths, rows, options.length), {}
    for rival in [name for name in names if name != "ours"] or ["ours"]:
        pair = ["ours", rival] if "ours" in names else [rival]
        measured = turns({name: (name, workload) for name in dict.fromkeys(pair)}, options)
        if "ours" in measured and rival != "ours":
            measured[rival]["ours_against_it"] = ratio(measured["ours"]["rates"], measured[rival]["rates"])
            measured[f"ours (with {rival})"] = measured.pop("ours")
        found |= measured
    return found


def run_step(options: argparse.Namespace) -> dict:
    return contest("full", 2, options, [n for n in options.contenders if n != "two-pass"])


def run_snippets(options: argparse.Namespace) -> dict:
    return contest("snippets", 2, options, options.contenders)


def run_mbpp(options: argparse.Namespace) -> dict:
    return contest("mbpp", 2, options, [n for n in options.contenders if n != "two-pass"])


def run_memory(options: argparse.Namespace) -> dict:
    """Four rows, one contender at a time: the process peaks would not fit side by side."""
    once = argparse.Namespace(**{**vars(options), "runs": 1})
    found: dict = {}
    for name in [n for n in options.contenders if n in ("ours", "mlx-lm", "peft")]:
        found |= turns({name: (name, Workload(options.size, "full", 4, options.length))}, once)
    return found


def run_experts(options: argparse.Namespace) -> dict:
    """Four experts, dense, against one: the same step otherwise."""
    sizes = {f"{count} experts": ("ours", Workload(options.size, "full", 2, options.length, count)) for count in (1, 4)}
    more = argparse.Namespace(**{**vars(options), "runs": max(3, options.runs)})
    found = turns(sizes, more)
    found["4 experts"]["time_against_1"] = ratio(found["4 experts"]["seconds"], found["1 experts"]["seconds"])
    return found


def run_matmuls(options: argparse.Namespace) -> dict:
    """The step's products by themselves, measured between steps in the same process, against whole steps."""
    workload = Workload(options.size, "full", 2, options.length)
    measured: list[dict] = []

    def after(workers: dict[str, Worker]) -> list[dict]:
        worker = workers["ours"]
        for _ in range(options.runs):
            products = worker.ask("matmuls", 3)
            measured.append({"products": products, "step": worker.ask("step")[0]})
        return measured

    found = turns({"ours": ("ours", workload)}, argparse.Namespace(**{**vars(options), "runs": 1}), after)
    alone = [sum(part["seconds"] for part in m["products"].values()) for m in measured]
    found["share"] = ratio(alone, [m["step"] for m in measured])
    found["flops"] = sum(part["flops"] for part in measured[0]["products"].values())
    return found


def run_parts(options: argparse.Namespace) -> dict:
    workload = Workload(options.size, "full", 2, options.length)
    once = argparse.Namespace(**{**vars(options), "runs": 1})
    found = turns({"ours": ("ours", workload)}, once, lambda workers: workers["ours"].ask("parts", options.runs))
    return {"ours": found["ours"], "parts": found["after"]}


def run_padding(options: argparse.Namespace) -> dict:
    from benchmarking.ours import padding

    return {name: padding(Workload("embedded", name, 2, options.length)) for name in ("snippets", "mbpp")}


def run_decode(options: argparse.Namespace) -> dict:
    from benchmarking import serving

    return serving.measure(
        Workload(options.size, experts=4, prompt=options.prompt, tokens=options.tokens), options.runs, options.cache_gb
    )


def run_pools(options: argparse.Namespace) -> dict:
    from benchmarking import pools

    asked = options.size, options.length, options.experts, options.runs, options.tokens, options.cache_gb
    return pools.measure(*asked, options.expert_memory_mb)


def show(console: Console, name: str, found: dict) -> None:
    """One scenario as a table."""
    if name == "padding":
        console.print("padding: " + ", ".join(f"{key} {value:.2%}" for key, value in found.items()))
        return
    if name == "pools":
        from benchmarking import pools

        console.print(pools.table(found))
        return
    if name == "decode":
        from benchmarking import serving

        console.print(serving.table(found))
        return
    table = Table(title=name)
    for column in ("", "s/step", "first s", "loss tokens/s", "peak GB", "cache GB", "process GB", "ours against it"):
        table.add_column(column, justify="right")
    for who, m in found.items():
        if not isinstance(m, dict) or "seconds" not in m:
            continue
        against = m.get("ours_against_it") or m.get("time_against_1")
        table.add_row(
            who, f"{np.median(m['seconds']):.3f}", f"{m['first']:.2f}", f"{np.median(m['rates']):.0f}",
            *(f"{m[k]:.2f}" if k in m else "" for k in ("peak", "cache", "rss")),
            f"{against['ratio']:.2f} ({against['low']:.2f} to {against['high']:.2f})" if against else "",
        )  # fmt: skip
    console.print(table)
    for part, value in found.get("parts", {}).items():
        console.print(f"  {part}: {value:.3f} s")
    if "share" in found:
        last = found["after"][-1]
        for part, value in last["products"].items():
            rate = value["flops"] / value["seconds"] / 1e9
            console.print(
                f"  {part}: {value['flops'] / 1e9:.0f} GFLOP in {value['seconds']:.2f} s alone, {rate:.0f} GFLOPS"
            )
        s = found["share"]
        console.print(f"  products alone / whole step: {s['ratio']:.1%} ({s['low']:.1%} to {s['high']:.1%})")


def machine() -> dict[str, Any]:
    import dylora_mlx  # noqa: F401
    from dylora_mlx.system import blas

    # isort: split
    import mlx.core as mx

    return {
        "platform": platform.platform(), "python": platform.python_version(), "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"), "device": str(mx.default_device()), "blas": blas.describe(), "lanes": blas.NUM_STREAMS,
    }  # fmt: skip


def command(argv: list[str]) -> int:
    options, console = parse(argv), Console(width=max(118, Console().width))
    results: dict[str, Any] = {"command": argv, "machine": machine()}
    console.print(
        f"{options.size}, rows of {options.length}; {results['machine']['device']}, {results['machine']['blas']}"
    )
    try:
        for name in [s for s in (*SCENARIOS, "pools") if s in options.only]:
            results[name] = globals()[f"run_{name}"](options)
            show(console, name, results[name])
            if options.json:
                options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    except Failed as error:
        raise Failure(str(error)) from error
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
