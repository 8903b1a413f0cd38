"""Two ways to search: random mutation that follows outcomes, and Atheris (libFuzzer), which follows coverage."""

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

KEPT, LONGEST = 400, 16_000
"""Inputs that a search by outcomes mutates further, at most, and their bytes."""


class Search:
    """Executions of one target, and what they found: one input for each place that an error came from.

    before: called with every input before it is executed; findings: (input, what is wrong) by place.
    """

    def __init__(self, run: Run, before: Callable[[bytes], None] = lambda data: None):
        self.run, self.before = run, before
        self.findings: dict[str, tuple[bytes, str]] = {}
        self.executions = 0

    def once(self, data: bytes) -> Outcome:
        self.before(data)
        self.executions += 1
        found = execute(self.run, data)
        if found.finding and found.place not in self.findings:
            self.findings[found.place] = (data, found.finding)
            self.report(data, found)
        return found

    def report(self, data: bytes, found: Outcome) -> None:
        """Of something new; a campaign saves it."""


def words_of(seeds: Sequence[bytes]) -> list[str]:
    """Names that stand in quotes in the seeds."""
    found: dict[str, None] = {}
    for seed in seeds:
        for part in seed[:20_000].split(b'"')[1::2]:
            if 0 < len(part) < 60 and part.isascii():
                found[part.decode()] = None
    return list(found)[:300]


def by_outcome(search: Search, target: Target, seeds: Sequence[bytes], runs: int, seconds: float, seed: int) -> None:
    """Mutate what ended in a way not seen before; the same executions for the same seed, if the time does not end first."""
    rng, kept, seen = Random(f"{target.name} {seed}"), list(seeds), set()
    words, until = words_of(seeds), time.monotonic() + seconds
    for data in seeds[:runs]:
        seen.add(search.once(data).place)
    for number in range(runs - len(seeds)):
        if number % 32 == 0 and time.monotonic() > until:
            return
        data = mutate.mutated(rng.choice(kept), target.form, rng, rng.choice(kept), words)
        found = search.once(data)
        if found.place not in seen and len(kept) < KEPT and len(data) < LONGEST:
            seen.add(found.place)
            kept.append(data)


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
    """libFuzzer with our mutators beside its own. It ends the process: nothing after this call is reached."""
    corpus.mkdir(parents=True, exist_ok=True)
    for data in seeds:
        (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    words = words_of(seeds)

    def other(data: bytes, size: int, number: int) -> bytes:
        rng = Random(number)
        if rng.random() < 0.3:
            return atheris.Mutate(data, size)
        return mutate.mutated(data, target.form, rng, rng.choice(seeds), words)[:size]

    options = [
        f"-runs={runs}", f"-max_total_time={max(1, round(seconds))}", f"-seed={seed + 1}", f"-max_len={LARGEST}", "-verbosity=0",
        "-rss_limit_mb=0", "-timeout=600", f"-artifact_prefix={corpus}/", str(corpus),
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options], search.once, custom_mutator=other)
    atheris.Fuzz()
