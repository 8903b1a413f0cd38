"""Measure the cost of network delay: train on two ranks over a slow link and print a table, one row per delay.

    python tests/stress/parallel_delay.py                        no delay, then 1, 5 and 20 ms each way (a few minutes)
    python tests/stress/parallel_delay.py --delays 0 50          other delays
    python tests/stress/parallel_delay.py --rate 100             also limit the link to 100 megabits per second

Each rank (world_size 2) runs in its own network namespace. A virtual cable connects the two and delays every packet
(delaying/cable.py). Needs Linux, root and iproute2. Nothing outside the two namespaces is changed, and they are removed
afterwards. The losses must be bit-identical for all delays.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

from delaying import cable

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.errors import Failure

PORT = 31415
ROOT = Path(__file__).parents[2]
STREAM = """
skills: [{name: requests, source: packaged/requests, limit: 64}]
growth: {base_skill: {name: python, source: packaged/python, limit: 40}, dense_steps: 1, anneal_steps: 1}
training: {grad_accumulation_steps: 2, epochs: 99, max_steps: STEPS, steps_per_eval: 999, save_every: 999, memory_tokens: 512}
log: {steps_per_report: 1}
"""


class Cost(NamedTuple):
    """Cost of training with one delay; medians over the steps."""

    speed: float
    """Tokens per second."""
    waited: float
    """Time per step spent in communication, including waiting for the other rank, in milliseconds."""
    sent: float
    """Data per step that a rank passes to all_reduce and other collectives, in kilobytes."""
    losses: list[float]
    """Loss of every step."""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python tests/stress/parallel_delay.py", __doc__)
    parser.add_argument("--delays", type=float, nargs="+", default=[0, 1, 5, 20], help="milliseconds each way")
    parser.add_argument("--steps", type=int, default=30, help="training steps with each delay")
    parser.add_argument("--rate", type=float, help="bandwidth of the link in megabits per second (default: no limit)")
    options = parser.parse_args(argv)
    if not all(0 <= delay <= 10_000 for delay in options.delays):
        parser.error("--delays: give numbers from 0 to 10000")
    if options.steps < 2:
        parser.error(f"--steps: {options.steps} is not at least 2")
    if options.rate is not None and not 0 < options.rate < 1e6:
        parser.error(f"--rate: {options.rate} is not between 0 and a million")
    return options


def train(folder: Path, names: list[str], config: Path) -> Cost:
    """Train on two ranks, one in each namespace. Raises Failure if a rank does not finish."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"{address}:{PORT}"] for address in cable.ADDRESSES]))
    words = [sys.executable, "-m", "dylora_mlx.train", "--config", str(config), "--runs", str(folder), "--name", "run"]
    ranks = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, *words, "--quiet"], stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)},
        )
        for rank, name in enumerate(names)
    ]  # fmt: skip
    try:
        error_texts = [rank.communicate()[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(rank.returncode for rank in ranks):
        raise Failure(f"the ranks did not finish: {' '.join(error_texts).strip()[-300:]}")
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return cost([line for line in lines if "tokens_per_second" in line])


def cost(steps: list[dict]) -> Cost:
    """Return the cost from the records of steps. The first step is left out: its counters include the work before it."""
    seconds, sent = ([line[f"communication_{kind}"] for line in steps] for kind in ("seconds", "mb"))
    waited = median(after - before for before, after in pairwise(seconds))
    speed = median(line["tokens_per_second"] for line in steps[1:])
    return Cost(speed, 1000 * waited, 1000 * (sent[1] - sent[0]), [line["lm_loss"] for line in steps])


def command(argv: list[str]) -> int:
    options = parse(argv)
    cable.check()
    print(
        "| delay each way, ms | tokens/s, median | waiting, ms per step, median | two hops alone, ms | sent, KB per step |"
    )
    print("| ---: | ---: | ---: | ---: | ---: |", flush=True)
    costs = []
    rate = options.rate and options.rate * 1e6 / 8
    for delay in options.delays:
        with tempfile.TemporaryDirectory() as temp_dir, cable.joined(delay / 1000, rate) as names:
            config = Path(temp_dir) / "delay.yaml"
            config.write_text(STREAM.replace("STEPS", str(options.steps)), encoding="utf-8")
            costs.append(train(Path(temp_dir), names, config))
        speed, waited, sent, _ = costs[-1]
        print(f"| {delay:g} | {speed:.0f} | {waited:.1f} | {2 * delay:g} | {sent:.1f} |", flush=True)
    if any(result.losses != costs[0].losses for result in costs):
        raise Failure("the losses differ between delays; they must be bit-identical")
    print(f"All {options.steps} losses are the same with every delay, to the bit.")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
