"""Kill a training run repeatedly with SIGKILL, resume it each time, and compare its final files to those of an uninterrupted run.

    python tests/stress/crash_test.py --kills 50            50 kills, then compare bit for bit (about ten minutes)
    python tests/stress/crash_test.py --kills 5 --seed 3    kill at other moments
    python tests/stress/crash_test.py --kills 20 --skills 40   a pool that grows to 40 experts, whose checkpoints link ever more files

Half of the kills happen after a random time. The others happen at the start or the end of work that must be atomic: the files,
links and renames of a checkpoint, the removal of an old one, a new expert, a merge, an evaluation, a record of the decision
log. A run that finishes is compared and started again, until all kills are done. The exit code is 1 if any file differs or a
process fails in another way.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dylora_mlx.assets import BASE, SKILLS
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
   policy: threshold, budget: {adapters: 417792, merge_distance: 1.5, merge_steps: 2}}
data: {max_seq_length: 256}
training:
  {grad_accumulation_steps: 1, epochs: 2, max_steps: 5, steps_per_eval: 3, save_every: 2, memory_tokens: 128, router_fit_steps: 10,
   keep_checkpoints: 2}
log: {steps_per_report: 1}
"""
GROWTH = """
skills: [SKILLS]
model: {base: BASE, rank: 2, alpha: 4, gather_threshold: 4.0}
growth:
  {base_skill: null, dense_steps: 1, anneal_steps: 1, bootstrap: 50, min_samples: 8, min_tokens: 100, split: false, acceptance: always,
   policy: threshold, threshold: 1.0, max_experts: 1000}
data: {max_seq_length: 128}
training:
  {grad_accumulation_steps: 1, max_steps: 2, steps_per_eval: 2, save_every: 1, memory_tokens: 64, router_fit_steps: 2, keep_checkpoints: 2}
log: {steps_per_report: 1}
"""
GROWTH_SIZES = {"train": 8, "validation": 2, "test": 2}
"""Number of documents of each split in a stream of many skills."""
SIZES = {"train": 30, "validation": 8, "test": 8}
"""Number of documents of each split: the first ones of each packaged skill."""
MAX_SKILLS = 40
"""Number of skills for which the packaged documents are enough."""
CHANGING = {"seconds", "tokens_per_second", "peak_memory_gb", "cache_memory_gb", "compilations"}
"""Keys of records that depend on the clock and the machine. They are not compared."""


class Life(NamedTuple):
    """Result of one process."""

    code: int
    """Exit code; negative if a signal killed it."""
    output: str
    """Its stdout and stderr together."""
    seconds: float


def live(words: list[str], point: str = "none", number: int = 0, until: float | None = None) -> Life:
    """Run a child process until it ends, kills itself at a point, or has run for `until` seconds and is killed.

    `point` and `number` are explained in crashing/child.py.
    """
    started = time.perf_counter()
    arguments = [sys.executable, str(CHILD), point, str(number), *words]
    child = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = child.communicate(timeout=until)
    except subprocess.TimeoutExpired:
        child.kill()
        output, _ = child.communicate()
    return Life(child.returncode, output, time.perf_counter() - started)


def outcome(run: Path, checkpoints: str = "checkpoints/final") -> dict[str, str]:
    """Return the hash of every file that must be the same in a finished run. Time-dependent values of records are left out.

    Args:
        run: the run folder.
        checkpoints: the folder of checkpoints to include; "checkpoints" for all that were kept. Only the manifest of the final
            one is included: the others contain hashes of files that hold times.
    """
    hashes = {}
    for path in sorted((run / checkpoints).rglob("*")):
        if path.is_file() and (path.name != "MANIFEST.json" or path.parent.name == "final"):
            hashes[path.relative_to(run).as_posix()] = _digest(path)
    return hashes | {name: _digest(run / name) for name in ("metrics.jsonl", "decisions.jsonl", "results.json")}


def _digest(path: Path) -> str:
    """Return the sha256 of a file; of a JSON file, that of its values without the keys in CHANGING."""
    content = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        values = [json.loads(line) for line in (content.splitlines() if path.suffix == ".jsonl" else [content])]
        content = json.dumps([_timeless(value) for value in values]).encode()
    return hashlib.sha256(content).hexdigest()


def _timeless(value: object) -> object:
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if key not in CHANGING}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def prepare_growth(folder: Path, count: int) -> Path:
    """Write `count` small skills, each from documents of one packaged skill, a tiny base and a config; return its path."""
    base, names = folder / "base", sorted(path.name for path in SKILLS.iterdir() if path.is_dir())
    base.mkdir()
    for file in (*(Path(__file__).parents[1] / "base").iterdir(), *BASE.glob("tokenizer*.json")):
        shutil.copy(file, base / file.name)
    for number in range(count):
        lines = (SKILLS / names[number % len(names)] / "train.jsonl").read_text(encoding="utf-8").splitlines()
        texts = iter([json.loads(line)["text"][:220] for line in lines][12 * (number // len(names)) :])
        (folder / f"s{number}").mkdir()
        for split, documents in GROWTH_SIZES.items():
            records = "".join(json.dumps({"text": next(texts)}) + "\n" for _ in range(documents))
            (folder / f"s{number}" / f"{split}.jsonl").write_text(records, encoding="utf-8")
    skills = ", ".join(f"{{name: s{number}, source: {folder}/s{number}}}" for number in range(count))
    config = folder / "stream.yaml"
    config.write_text(GROWTH.replace("SKILLS", skills).replace("BASE", str(base)), encoding="utf-8")
    return config


def prepare(folder: Path, skills: int | None = None) -> Path:
    """Write skills of short documents and a config into a folder; return the path of the config.

    With a number of skills, as many that each get an expert; else four, whose experts are refined and merged.
    """
    if skills is not None:
        return prepare_growth(folder, skills)
    for skill in ("requests", "sql", "requests_more", "stripe"):
        (folder / skill).mkdir()
        for split, count in SIZES.items():
            lines = (SKILLS / skill / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
            short = [json.dumps({"text": json.loads(line)["text"][:220]}) for line in lines]
            (folder / skill / f"{split}.jsonl").write_text("\n".join(short) + "\n", encoding="utf-8")
    config = folder / "stream.yaml"
    config.write_text(STREAM.replace("DATA", str(folder)), encoding="utf-8")
    return config


def kill(folder: Path, counts: dict[str, int], duration: float, rng: np.random.Generator) -> tuple[Life, str]:
    """Start or resume the run in a folder and kill it at a random moment. Returns the result, and the moment as text.

    Args:
        folder: the folder with the config and the run.
        counts: how often an uninterrupted run reaches each point.
        duration: how long an uninterrupted run takes, in seconds.
        rng: the source of randomness.
    """
    run = folder / NAME
    start_words = ["--config", str(folder / "stream.yaml"), "--name", NAME, "--runs", str(folder), "--quiet"]
    words = ["--resume", str(run), "--quiet"] if run.exists() else start_words
    if rng.random() < 0.5:
        until = float(rng.uniform(0.2, 1.0) * duration)
        return live(words, until=until), f"after {until:.1f} s"
    point = str(rng.choice([name for name, count in counts.items() if count]))
    number = int(rng.integers(1, max(2, counts[point] // 2)))
    return live(words, point, number), f"at {point}, {number}"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python tests/stress/crash_test.py", __doc__)
    parser.add_argument("--kills", type=int, default=50, help="number of kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument(
        "--skills", type=int, help="let the pool grow to this many experts (default: four skills, merged to two)"
    )
    options = parser.parse_args(argv)
    if options.kills < 1:
        parser.error("--kills must be at least 1")
    if options.skills is not None and not 1 <= options.skills <= MAX_SKILLS:
        parser.error(f"--skills must be from 1 to {MAX_SKILLS}")
    if options.seed < 0:
        parser.error("--seed must be at least 0")
    return options


def command(argv: list[str]) -> int:
    options = parse(argv)
    rng = np.random.default_rng(options.seed)
    with tempfile.TemporaryDirectory() as temp_dir:
        folder = Path(temp_dir)
        config = ["--config", str(prepare(folder, options.skills)), "--runs", str(folder), "--quiet"]
        uninterrupted = live([*config, "--name", "whole"], "count")
        if uninterrupted.code:
            print(f"the uninterrupted run failed: {uninterrupted.output}")
            return 1
        counts, expected = json.loads(uninterrupted.output.splitlines()[-1]), outcome(folder / "whole")
        print(
            f"a run takes {uninterrupted.seconds:.0f} s and reaches {sum(counts.values())} points: {counts}", flush=True
        )
        kills, completions = 0, 0
        while kills < options.kills or (folder / NAME).exists():
            if kills < options.kills:
                life, moment = kill(folder, counts, uninterrupted.seconds, rng)
            else:
                life, moment = live(["--resume", str(folder / NAME), "--quiet"]), "never"
            finished = life.code == 0 or "this run is finished" in life.output
            if life.code < 0:
                kills += 1
                print(f"kill {kills} of {options.kills} {moment}", flush=True)
            elif not finished:
                print(f"exit code {life.code} {moment}, expected a kill or the end: {life.output}")
                return 1
            if finished:
                completions += 1
                hashes = outcome(folder / NAME)
                differing = [name for name in expected.keys() | hashes.keys() if expected.get(name) != hashes.get(name)]
                if differing:
                    print(
                        f"after {kills} kills these files differ from the uninterrupted run: {', '.join(sorted(differing))}"
                    )
                    return 1
                print(f"end {completions}: all {len(expected)} files are the same, to the bit", flush=True)
                (folder / NAME).rename(folder / f"ended-{completions}")
    print(f"{kills} kills, {completions} ends, no difference")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
