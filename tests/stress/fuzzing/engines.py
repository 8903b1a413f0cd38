"""Two search engines: random mutation guided by outcomes, and Atheris (libFuzzer), guided by coverage."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from fuzzing import mutate
from fuzzing.target import LARGEST, Outcome, Run, Target, execute

MAX_POOL, MAX_POOL_BYTES = 400, 16_000
"""Limits of the pool of inputs that the search by outcome mutates further: their number, and the size of each in bytes."""


class Search:
    """Executes one target and collects its findings, one input for each location of an error.

    Args:
        run: the function under test.
        before: called with every input before it is executed.
    """

    def __init__(self, run: Run, before: Callable[[bytes], None] = lambda data: None):
        self.run, self.before = run, before
        self.findings: dict[str, tuple[bytes, str]] = {}
        """Input and description of each finding, by location."""
        self.executions = 0

    def run_once(self, data: bytes) -> Outcome:
        """Execute one input. Reports a finding whose location is new."""
        self.before(data)
        self.executions += 1
        outcome = execute(self.run, data)
        if outcome.finding and outcome.location not in self.findings:
            self.findings[outcome.location] = (data, outcome.finding)
            self.report(data, outcome)
        return outcome

    def report(self, data: bytes, outcome: Outcome) -> None:
        """Handle a new finding. Does nothing here; a campaign's search saves it."""


def words_of(seeds: Sequence[bytes]) -> list[str]:
    """Return strings in double quotes in the seeds: names that mean something to the reader."""
    words: dict[str, None] = {}
    for seed in seeds:
        for part in seed[:20_000].split(b'"')[1::2]:
            if 0 < len(part) < 60 and part.isascii():
                words[part.decode()] = None
    return list(words)[:300]


def by_outcome(search: Search, target: Target, seeds: Sequence[bytes], runs: int, seconds: float, seed: int) -> None:
    """Search by mutating inputs. An input whose outcome has a new location joins the pool of inputs to mutate.

    Deterministic for a given seed, unless the time limit ends the search first.
    """
    rng, pool, seen = Random(f"{target.name} {seed}"), list(seeds), set()
    words, deadline = words_of(seeds), time.monotonic() + seconds
    for data in seeds[:runs]:
        seen.add(search.run_once(data).location)
    for number in range(runs - len(seeds)):
        if number % 32 == 0 and time.monotonic() > deadline:
            return
        data = mutate.mutated(rng.choice(pool), target.form, rng, rng.choice(pool), words)
        outcome = search.run_once(data)
        if outcome.location not in seen and len(pool) < MAX_POOL and len(data) < MAX_POOL_BYTES:
            seen.add(outcome.location)
            pool.append(data)


def by_coverage(
    atheris: Any,
    search: Search,
    target: Target,
    seeds: Sequence[bytes],
    runs: int,
    seconds: float,
    seed: int,
    corpus: Path,
) -> None:
    """Search with libFuzzer, which uses our mutators in addition to its own. Ends the process: it does not return."""
    corpus.mkdir(parents=True, exist_ok=True)
    for data in seeds:
        (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    words = words_of(seeds)

    def mutate_input(data: bytes, size: int, number: int) -> bytes:
        rng = Random(number)
        if rng.random() < 0.3:
            return atheris.Mutate(data, size)
        return mutate.mutated(data, target.form, rng, rng.choice(seeds), words)[:size]

    arguments = [
        f"-runs={runs}", f"-max_total_time={max(1, round(seconds))}", f"-seed={seed + 1}", f"-max_len={LARGEST}", "-verbosity=0",
        "-rss_limit_mb=0", "-timeout=600", f"-artifact_prefix={corpus}/", str(corpus),
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *arguments], search.run_once, custom_mutator=mutate_input)
    atheris.Fuzz()
