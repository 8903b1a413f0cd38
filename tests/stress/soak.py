"""Learn for very long on a tiny base, an expert after the other, and see whether memory or the time of a step creeps up.

    python tests/stress/soak.py                           20 skills of 500 steps, then one more in a new process (a quarter of an hour)
    python tests/stress/soak.py --skills 4 --steps 100    a short one

Prints a table of medians, a row for each skill, and what grows. Exit code 1 if memory grows by more than what the added
experts account for, or if a step takes longer than in a new process that has loaded as many experts.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from soaking import made, table
from soaking.child import EVERY
from soaking.table import Limits

CHILD = Path(__file__).parent / "soaking" / "child.py"


def parse(argv: list[str] | None) -> argparse.Namespace:
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--skills", type=int, default=20, help="how many to learn, an expert each (20)")
    parser.add_argument("--steps", type=int, default=500, help="of each skill, a multiple of 100 (500)")
    parser.add_argument("--resident", type=float, default=0.8, help="MB that may be added with each skill (0.8)")
    parser.add_argument("--arrays", type=float, default=0.1, help="MB of MLX's arrays, likewise (0.1)")
    parser.add_argument(
        "--aged", type=float, default=1.3, help="times a new process's step that one may take at the end (1.3)"
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
    """Have a child learn; return its notes. Leaves with exit code 1 if it could not."""
    # Idle threads of a BLAS spin, and count as CPU.
    one = dict.fromkeys(("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    arguments = [sys.executable, str(CHILD), str(notes), *words, "--quiet"]
    if subprocess.run(arguments, env=os.environ | one).returncode:
        sys.exit(f"failed: the process that learns ended before its time: {' '.join(words)}")
    return table.read(notes)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config = made.config(folder, options.skills, options.steps)
        words = ("--config", str(config), "--runs", str(folder), "--name", "long")
        found = table.rows(live(folder / "long.jsonl", "train", *words), options.steps)
        more = (str(folder / "long"), str(made.skill(folder, options.skills)), "--name", "one_more")
        late = live(folder / "fresh.jsonl", "add", *more)
    fresh = table.rows(late, options.steps)[-1]
    print(table.markdown(found))
    grown = table.slopes(found)
    print(
        f"\nadded with each skill, beyond what experts account for: {grown.resident:+.3f} MB resident without the cache, "
        f"{grown.arrays:+.4f} MB of arrays; {grown.cpu:+.3f} ms of CPU for a quick step\nin a new process, with {fresh.experts} "
        f"experts: {fresh.quick:.1f} ms of CPU for a quick step, {fresh.rss:.1f} MB resident, {fresh.active:.2f} MB of arrays"
    )
    wrong = table.verdict(found, fresh.quick, Limits(options.resident, options.arrays, options.aged))
    for line in wrong:
        print(f"failed: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
