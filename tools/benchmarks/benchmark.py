"""Benchmark a training step against mlx-lm, PEFT and a two-pass scheme, and decoding against the base.

Contenders run in separate processes and take turns; ratios of medians have 95% bootstrap intervals.

    python tools/benchmarks/benchmark.py                          the table of docs/performance.md (on two CPU cores some 15 minutes)
    python tools/benchmarks/benchmark.py --size embedded --runs 9 the same on the small embedded base
    python tools/benchmarks/benchmark.py --only step snippets --contenders ours mlx-lm peft --json out.json
    python tools/benchmarks/benchmark.py --only decode --runs 5   decoding, for every way to serve a run
    python tools/benchmarks/benchmark.py --only run --base FOLDER a whole run with its evaluations, against mlx-lm's trainer
    python tools/benchmarks/benchmark.py --size embedded --experts 1,4,16,64,256,1024    the cost of a large pool

It runs on CPU, Metal and CUDA. PyTorch with PEFT takes part if both are installed.
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

SCENARIOS = ("step", "snippets", "mbpp", "memory", "experts", "matmuls", "parts", "padding", "decode", "run")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python tools/benchmarks/benchmark.py", __doc__)
    parser.add_argument(
        "--size", choices=["gemma3-270m", "embedded"], default="gemma3-270m", help="model (random weights)"
    )
    parser.add_argument("--length", type=int, default=512, help="positions per row (sequence length)")
    parser.add_argument(
        "--projections",
        nargs="+",
        choices=Workload.projections,
        default=Workload.projections,
        metavar="NAME",
        help="linear layers with LoRA factors (default: all)",
    )
    parser.add_argument("--runs", type=int, default=3, help="measured steps per contender, after one warm-up step")
    parser.add_argument("--prompt", type=int, default=64, help="decode: prompt tokens")
    parser.add_argument("--tokens", type=int, default=128, help="decode: generated tokens")
    parser.add_argument(
        "--experts",
        type=_counts,
        metavar="N,N,...",
        help="only benchmark pools of these sizes: a training step and a generated token of each",
    )
    parser.add_argument(
        "--expert-memory-mb",
        type=int,
        metavar="MB",
        help="with --experts: also offload frozen experts to files, keeping this much of them in memory",
    )
    parser.add_argument("--base", default="embedded", help="run: the base, embedded or a model folder")
    parser.add_argument("--documents", type=int, metavar="N", help="run: at most N training documents of each skill")
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, metavar="SCENARIO")
    parser.add_argument("--contenders", nargs="+", choices=["ours", "mlx-lm", "two-pass", "peft"], metavar="NAME")
    parser.add_argument(
        "--cache-gb", type=float, default=4.0, help="limit of MLX's allocator cache, for every contender"
    )
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    options = parser.parse_args(argv)
    options.only = ["pools"] if options.experts else options.only or list(SCENARIOS)
    if options.runs < 1 or options.length < 32:
        parser.error("--runs must be at least 1 and --length at least 32")
    if options.prompt < 2 or options.tokens < 2:
        parser.error("--prompt and --tokens must be at least 2")
    if options.documents is not None and options.documents < 32:
        parser.error("--documents must be at least 32, growth.min_samples of the run")
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
    """Run named contenders in turns, each in its own process, and return the measurements of each.

    Args:
        workloads: (contender, workload) by the name of the result.
        options: Command-line options; `runs` is the number of measured steps.
        after: Called with the workers after the last step; its result is returned under "after".
    """
    workers = {name: Worker(contender, workload) for name, (contender, workload) in workloads.items()}
    try:
        for worker in workers.values():
            worker.ask("start", options.cache_gb)
        samples: dict[str, list] = {name: [] for name in workers}
        for _ in range(options.runs):
            for name, worker in workers.items():
                samples[name].append(worker.ask("step"))
        results = {}
        for name, worker in workers.items():
            seconds, tokens = zip(*samples[name], strict=True)
            first = worker.ask("__getattribute__", "first")
            rates = [num_tokens / elapsed for elapsed, num_tokens in samples[name]]
            results[name] = {"seconds": seconds, "tokens": tokens, "rates": rates, "first": first} | worker.ask(
                "memory"
            )
        if after is not None:
            results["after"] = after(workers)
        return results
    finally:
        for worker in workers.values():
            worker.close()


def workload_of(options: argparse.Namespace, **fields: Any) -> Workload:
    """Return a workload of the options' size, length and projections, two full rows unless `fields` say otherwise."""
    return Workload(**{"size": options.size, "length": options.length, "projections": options.projections} | fields)


def contest(lengths: str, rows: int, options: argparse.Namespace, names: list[str]) -> dict:
    """Measure each rival in turns with ours, one rival at a time: two models fit in memory where four would not."""
    workload, results = workload_of(options, lengths=lengths, rows=rows), {}
    for rival in [name for name in names if name != "ours"] or ["ours"]:
        pair = ["ours", rival] if "ours" in names else [rival]
        measured = turns({name: (name, workload) for name in dict.fromkeys(pair)}, options)
        if "ours" in measured and rival != "ours":
            measured[rival]["ours_against_it"] = ratio(measured["ours"]["rates"], measured[rival]["rates"])
            measured[f"ours (with {rival})"] = measured.pop("ours")
        results |= measured
    return results


def run_step(options: argparse.Namespace) -> dict:
    """Measure a step of two full rows."""
    return contest("full", 2, options, [n for n in options.contenders if n != "two-pass"])


def run_snippets(options: argparse.Namespace) -> dict:
    """Measure a step on documents with the lengths of API snippets."""
    return contest("snippets", 2, options, options.contenders)


def run_mbpp(options: argparse.Namespace) -> dict:
    """Measure a step on documents with the lengths of MBPP, whose prompts are masked from the loss."""
    return contest("mbpp", 2, options, [n for n in options.contenders if n != "two-pass"])


def run_memory(options: argparse.Namespace) -> dict:
    """Measure peak memory with four rows, one contender at a time: two processes at their peak might not fit."""
    once = argparse.Namespace(**{**vars(options), "runs": 1})
    results: dict = {}
    for name in [n for n in options.contenders if n in ("ours", "mlx-lm", "peft")]:
        results |= turns({name: (name, workload_of(options, rows=4))}, once)
    return results


def run_experts(options: argparse.Namespace) -> dict:
    """Compare the step time of four densely computed experts with that of one."""
    sizes = {f"{count} experts": ("ours", workload_of(options, experts=count)) for count in (1, 4)}
    repeated = argparse.Namespace(**{**vars(options), "runs": max(3, options.runs)})
    results = turns(sizes, repeated)
    results["4 experts"]["time_against_1"] = ratio(results["4 experts"]["seconds"], results["1 experts"]["seconds"])
    return results


def run_matmuls(options: argparse.Namespace) -> dict:
    """Compare the step's matrix products, measured alone, with the whole step.

    Products and steps alternate in one process, so a change of the machine's speed affects both.
    """
    workload = workload_of(options)
    measured: list[dict] = []

    def after(workers: dict[str, Worker]) -> list[dict]:
        worker = workers["ours"]
        for _ in range(options.runs):
            products = worker.ask("matmuls", 3)
            measured.append({"products": products, "step": worker.ask("step")[0]})
        return measured

    results = turns({"ours": ("ours", workload)}, argparse.Namespace(**{**vars(options), "runs": 1}), after)
    product_seconds = [sum(part["seconds"] for part in measurement["products"].values()) for measurement in measured]
    results["share"] = ratio(product_seconds, [measurement["step"] for measurement in measured])
    results["flops"] = sum(part["flops"] for part in measured[0]["products"].values())
    return results


def run_parts(options: argparse.Namespace) -> dict:
    """Measure the parts of our step separately."""
    workload = workload_of(options)
    once = argparse.Namespace(**{**vars(options), "runs": 1})
    results = turns({"ours": ("ours", workload)}, once, lambda workers: workers["ours"].ask("parts", options.runs))
    return {"ours": results["ours"], "parts": results["after"]}


def run_padding(options: argparse.Namespace) -> dict:
    """Return the share of padding in our packed rows; needs no model."""
    from benchmarking.ours import padding

    return {name: padding(Workload("embedded", name, 2, options.length)) for name in ("snippets", "mbpp")}


def run_decode(options: argparse.Namespace) -> dict:
    """Measure greedy decoding for every way to serve a run of four experts."""
    from benchmarking import serving

    workload = workload_of(options, experts=4, prompt=options.prompt, tokens=options.tokens)
    return serving.measure(workload, options.runs, options.cache_gb)


def run_run(options: argparse.Namespace) -> dict:
    """Measure a whole run: reading, deciding, four skills, evaluation and report, against one LoRA of mlx-lm's trainer."""
    from benchmarking import whole_run

    return whole_run.measure(options.base, options.length, options.documents, options.runs)


def run_pools(options: argparse.Namespace) -> dict:
    """Measure a training step and decoding for pools of different sizes."""
    from benchmarking import pools

    settings = options.experts, options.runs, options.tokens, options.cache_gb
    return pools.measure(workload_of(options), *settings, options.expert_memory_mb)


def show(console: Console, name: str, results: dict) -> None:
    """Print the results of one scenario, most of them as a table."""
    if name == "padding":
        console.print("padding: " + ", ".join(f"{key} {value:.2%}" for key, value in results.items()))
        return
    if name == "pools":
        from benchmarking import pools

        console.print(pools.table(results))
        return
    if name == "decode":
        from benchmarking import serving

        console.print(serving.table(results))
        return
    if name == "run":
        from benchmarking import whole_run

        console.print(whole_run.table(results))
        return
    table = Table(title=name)
    for heading in ("", "s/step", "first s", "loss tokens/s", "peak GB", "cache GB", "process GB", "ours against it"):
        table.add_column(heading, justify="right")
    for contender, measured in results.items():
        if not isinstance(measured, dict) or "seconds" not in measured:
            continue
        against = measured.get("ours_against_it") or measured.get("time_against_1")
        table.add_row(
            contender,
            f"{np.median(measured['seconds']):.3f}", f"{measured['first']:.2f}", f"{np.median(measured['rates']):.0f}",
            *(f"{measured[k]:.2f}" if k in measured else "" for k in ("peak", "cache", "rss")),
            f"{against['ratio']:.2f} ({against['low']:.2f} to {against['high']:.2f})" if against else "",
        )  # fmt: skip
    console.print(table)
    for part, value in results.get("parts", {}).items():
        console.print(f"  {part}: {value:.3f} s")
    if "share" in results:
        last = results["after"][-1]
        for part, value in last["products"].items():
            rate = value["flops"] / value["seconds"] / 1e9
            console.print(
                f"  {part}: {value['flops'] / 1e9:.0f} GFLOP in {value['seconds']:.2f} s alone, {rate:.0f} GFLOPS"
            )
        share = results["share"]
        console.print(
            f"  products alone / whole step: {share['ratio']:.1%} ({share['low']:.1%} to {share['high']:.1%})"
        )


def machine() -> dict[str, Any]:
    """Return the platform, the library versions, the MLX device and the BLAS."""
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
