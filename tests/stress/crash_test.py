"""Kill a training run again and again, resume it each time, and compare what it ends with to a run that nobody killed.

    python tests/stress/crash_test.py --kills 50            fifty times SIGKILL, then the bits are compared (some ten minutes)
    python tests/stress/crash_test.py --kills 5 --seed 3    other moments

Half of the moments are drawn from the clock. The others lie at the beginning or the end of something that must not be torn:
the files and renames of a checkpoint, a new expert, a merge, an evaluation, a line of the ledger. A run that comes to its
end is compared and begun again, until all kills are done.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dylora_mlx.assets import SKILLS
from dylora_mlx.cli.parser import Parser, run_command

CHILD = Path(__file__).parent / "crashing" / "child.py"
NAME = "crashed"
STREAM = """
skills:
  - {name: requests, source: DATA/requests}
  - {name: sql, source: DATA/sql}
  - {name: requests_more, source: DATA/requests_more}
  - {name: stripe, source: DATA/stripe}
growth:
  {base_skill: null, dense_steps: 1, anneal_steps: 1, bootstrap: 50, when_known: refine, epsilon: 9.0, min_samples: 8, min_tokens: 100,
   policy: threshold, budget: {adapters: 79872, merge_distance: 1.5, merge_steps: 2}}
data: {max_seq_length: 256}
training:
  {grad_accumulation_steps: 1, epochs: 2, max_steps: 5, steps_per_eval: 3, save_every: 2, memory_tokens: 128, router_fit_steps: 10,
   keep_checkpoints: 2}
log: {steps_per_report: 1}
"""
SIZES = {"train": 30, "validation": 8, "test": 8}
"""Documents of each split: the beginnings of the packaged skills'."""
CHANGING = {"seconds", "tokens_per_second", "peak_memory_gb", "cache_memory_gb", "compilations"}
"""What a record has from the clock and the machine, not from the run."""


class Life(NamedTuple):
    """One process: its exit code, what it printed, and how long it lived."""

    code: int
    said: str
    seconds: float


def live(words: list[str], point: str = "none", number: int = 0, until: float | None = None) -> Life:
    """Run a child until it ends, kills itself at a point, or is killed by the clock."""
    started = time.perf_counter()
    arguments = [sys.executable, str(CHILD), point, str(number), *words]
    child = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said, _ = child.communicate(timeout=until)
    except subprocess.TimeoutExpired:
        child.kill()
        said, _ = child.communicate()
    return Life(child.returncode, said, time.perf_counter() - started)


def outcome(run: Path, checkpoints: str = "checkpoints/final") -> dict[str, str]:
    """Hashes of everything that a finished run must have the same, by file; records without what the clock says.

    checkpoints: "checkpoints" for all that it has kept. Their manifests but the last have hashes of times, and do not count.
    """
    found = {}
    for path in sorted((run / checkpoints).rglob("*")):
        if path.is_file() and (path.name != "MANIFEST.json" or path.parent.name == "final"):
            found[path.relative_to(run).as_posix()] = _digest(path)
    return found | {name: _digest(run / name) for name in ("metrics.jsonl", "decisions.jsonl", "results.json")}


def _digest(path: Path) -> str:
    """sha256 of a file; of JSON, of its values without what the clock says."""
    content = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        values = [json.loads(line) for line in (content.splitlines() if path.suffix == ".jsonl" else [content])]
        content = json.dumps([_timeless(value) for value in values]).encode()
    return hashlib.sha256(content).hexdigest()


def _timeless(value: object) -> object:
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if key not in CHANGING}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def prepare(folder: Path) -> Path:
    """Write a stream of short documents into a folder; return its config."""
    for skill in ("requests", "sql", "requests_more", "stripe"):
        (folder / skill).mkdir()
        for split, count in SIZES.items():
            lines = (SKILLS / skill / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
            short = [json.dumps({"text": json.loads(line)["text"][:220]}) for line in lines]
            (folder / skill / f"{split}.jsonl").write_text("\n".join(short) + "\n", encoding="utf-8")
    config = folder / "stream.yaml"
    config.write_text(STREAM.replace("DATA", str(folder)), encoding="utf-8")
    return config


def kill(folder: Path, seen: dict[str, int], whole: float, rng: np.random.Generator) -> tuple[Life, str]:
    """Begin or resume the run in a folder, and kill it at a moment drawn at random. Returns what it came to, and where."""
    run = folder / NAME
    begin = ["--config", str(folder / "stream.yaml"), "--name", NAME, "--runs", str(folder), "--quiet"]
    words = ["--resume", str(run), "--quiet"] if run.exists() else begin
    if rng.random() < 0.5:
        until = float(rng.uniform(0.2, 1.0) * whole)
        return live(words, until=until), f"after {until:.1f} s"
    point = str(rng.choice([name for name, count in seen.items() if count]))
    number = int(rng.integers(1, max(2, seen[point] // 2)))
    return live(words, point, number), f"at {point}, {number}"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python tests/stress/crash_test.py", __doc__)
    parser.add_argument("--kills", type=int, default=50, help="how often to kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args(argv)
    if options.kills < 1:
        parser.error("--kills must be at least 1")
    if options.seed < 0:
        parser.error("--seed must be at least 0")
    return options


def command(argv: list[str]) -> int:
    options = parse(argv)
    rng = np.random.default_rng(options.seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config = ["--config", str(prepare(folder)), "--runs", str(folder), "--quiet"]
        whole = live([*config, "--name", "whole"], "count")
        if whole.code:
            print(f"the run that nobody kills failed: {whole.said}")
            return 1
        seen, wanted = json.loads(whole.said.splitlines()[-1]), outcome(folder / "whole")
        print(f"a run takes {whole.seconds:.0f} s and comes to {sum(seen.values())} points: {seen}", flush=True)
        kills, ends = 0, 0
        while kills < options.kills or (folder / NAME).exists():
            if kills < options.kills:
                life, where = kill(folder, seen, whole.seconds, rng)
            else:
                life, where = live(["--resume", str(folder / NAME), "--quiet"]), "never"
            finished = life.code == 0 or "this run is finished" in life.said
            if life.code < 0:
                kills += 1
                print(f"kill {kills} of {options.kills} {where}", flush=True)
            elif not finished:
                print(f"exit code {life.code} {where}, expected a kill or the end: {life.said}")
                return 1
            if finished:
                ends += 1
                found = outcome(folder / NAME)
                differing = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
                if differing:
                    print(
                        f"after {kills} kills these differ from the run that nobody killed: {', '.join(sorted(differing))}"
                    )
                    return 1
                print(f"end {ends}: all {len(wanted)} files are the same, to the bit", flush=True)
                (folder / NAME).rename(folder / f"ended-{ends}")
    print(f"{kills} kills, {ends} ends, no difference")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
