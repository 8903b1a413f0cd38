"""Soak test: a very long run on a tiny base, one expert after another, checked for growth of memory and of the time per step.

    python tests/stress/soak.py                           20 skills of 500 steps, then one more in a new process (about 15 minutes)
    python tests/stress/soak.py --skills 4 --steps 100    a short test

Prints a table of medians, one row per skill, and the growth per skill. The exit code is 1 if memory grows by more than the added
experts account for, or if a step takes longer than in a new process that has loaded the same number of experts.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from soaking import inputs, table
from soaking.child import EVERY
from soaking.table import Limits

CHILD = Path(__file__).parent / "soaking" / "child.py"


def parse(argv: list[str] | None) -> argparse.Namespace:
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--skills", type=int, default=20, help="number of skills, one expert each (20)")
    parser.add_argument("--steps", type=int, default=500, help="training steps per skill, a multiple of 100 (500)")
    parser.add_argument(
        "--resident", type=float, default=0.8, help="allowed growth of resident memory per skill, in MB (0.8)"
    )
    parser.add_argument("--arrays", type=float, default=0.1, help="allowed growth of MLX arrays per skill, in MB (0.1)")
    parser.add_argument(
        "--aged",
        type=float,
        default=1.3,
        help="allowed time of a step at the end, as a multiple of that in a new process (1.3)",
    )
    options = parser.parse_args(argv)
    if not 4 <= options.skills <= 23:
        parser.error(f"--skills: {options.skills} is not between 4 and 23")
    if options.steps < EVERY or options.steps % EVERY:
        parser.error(f"--steps: {options.steps} is not a multiple of {EVERY}")
    if min(options.resident, options.arrays, options.aged) <= 0:
        parser.error("--resident, --arrays and --aged must be above 0")
    return options


def live(notes: Path, *words: str) -> list[dict[str, float]]:
    """Run a child process that trains, and return its notes. Exits with code 1 if the child fails."""
    # One BLAS thread: idle BLAS threads spin, which would count as CPU time of a step.
    single_thread = dict.fromkeys(("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    arguments = [sys.executable, str(CHILD), str(notes), *words, "--quiet"]
    if subprocess.run(arguments, env=os.environ | single_thread).returncode:
        sys.exit(f"failed: the training process did not finish: {' '.join(words)}")
    return table.read(notes)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    with tempfile.TemporaryDirectory() as temp_dir:
        folder = Path(temp_dir)
        config = inputs.config(folder, options.skills, options.steps)
        words = ("--config", str(config), "--runs", str(folder), "--name", "long")
        rows = table.rows(live(folder / "long.jsonl", "train", *words), options.steps)
        add_words = (str(folder / "long"), str(inputs.skill(folder, options.skills)), "--name", "one_more")
        fresh_notes = live(folder / "fresh.jsonl", "add", *add_words)
    fresh = table.rows(fresh_notes, options.steps)[-1]
    print(table.markdown(rows))
    growth = table.slopes(rows)
    print(
        f"\nadded with each skill, beyond what experts account for: {growth.resident:+.3f} MB resident without the cache, "
        f"{growth.arrays:+.4f} MB of arrays; {growth.cpu:+.3f} ms of CPU for a quick step\nin a new process, with {fresh.experts} "
        f"experts: {fresh.quick:.1f} ms of CPU for a quick step, {fresh.rss:.1f} MB resident, {fresh.active:.2f} MB of arrays"
    )
    problems = table.verdict(rows, fresh.quick, Limits(options.resident, options.arrays, options.aged))
    for line in problems:
        print(f"failed: {line}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
