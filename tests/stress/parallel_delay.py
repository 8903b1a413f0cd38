"""Train on two ranks that a slow network joins, and tell what the delay costs: a table, a row for each delay.

    python tests/stress/parallel_delay.py                        no delay, then 1, 5 and 20 ms each way (some minutes)
    python tests/stress/parallel_delay.py --delays 0 50          others
    python tests/stress/parallel_delay.py --rate 100             at 100 megabits a second, too

Each rank has a network namespace of its own, and a cable joins them that delays every packet (delaying/cable.py). Linux, as
root, with iproute2. Nothing outside the two namespaces is touched, and they are gone afterwards.
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
    """Of one step, medians: tokens a second, milliseconds of waiting for the other rank; kilobytes that a rank gives to the
    engine; losses: of every step."""

    speed: float
    waited: float
    sent: float
    losses: list[float]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python tests/stress/parallel_delay.py", __doc__)
    parser.add_argument("--delays", type=float, nargs="+", default=[0, 1, 5, 20], help="milliseconds each way")
    parser.add_argument("--steps", type=int, default=30, help="to train with each")
    parser.add_argument("--rate", type=float, help="megabits a second of the cable; none: as fast as it is")
    options = parser.parse_args(argv)
    if not all(0 <= delay <= 10_000 for delay in options.delays):
        parser.error("--delays: give numbers from 0 to 10000")
    if options.steps < 2:
        parser.error(f"--steps: {options.steps} is not at least 2")
    if options.rate is not None and not 0 < options.rate < 1e6:
        parser.error(f"--rate: {options.rate} is not between 0 and a million")
    return options


def learned(folder: Path, names: list[str], config: Path) -> Cost:
    """Train on two ranks, one in each namespace. Raises Failure if they do not come to the end."""
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
        said = [rank.communicate()[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(rank.returncode for rank in ranks):
        raise Failure(f"the ranks did not finish: {' '.join(said).strip()[-300:]}")
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return cost([line for line in lines if "tokens_per_second" in line])


def cost(steps: list[dict]) -> Cost:
    """What the records of steps tell; the first has what went before it, and is left out."""
    seconds, sent = ([line[f"communication_{kind}"] for line in steps] for kind in ("seconds", "mb"))
    waited = median(after - before for before, after in pairwise(seconds))
    speed = median(line["tokens_per_second"] for line in steps[1:])
    return Cost(speed, 1000 * waited, 1000 * (sent[1] - sent[0]), [line["lm_loss"] for line in steps])


def command(argv: list[str]) -> int:
    options = parse(argv)
    cable.check()
    print(
        "| delay each way, ms | tokens/s, median | waiting, ms a step, median | two hops alone, ms | given to the engine, KB a step |"
    )
    print("| ---: | ---: | ---: | ---: | ---: |", flush=True)
    found = []
    rate = options.rate and options.rate * 1e6 / 8
    for delay in options.delays:
        with tempfile.TemporaryDirectory() as place, cable.joined(delay / 1000, rate) as names:
            config = Path(place) / "delay.yaml"
            config.write_text(STREAM.replace("STEPS", str(options.steps)), encoding="utf-8")
            found.append(learned(Path(place), names, config))
        speed, waited, sent, _ = found[-1]
        print(f"| {delay:g} | {speed:.0f} | {waited:.1f} | {2 * delay:g} | {sent:.1f} |", flush=True)
    if any(each.losses != found[0].losses for each in found):
        raise Failure("the losses depend on the delay, which they must not")
    print(f"All {options.steps} losses are the same with every delay, to the bit.")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
