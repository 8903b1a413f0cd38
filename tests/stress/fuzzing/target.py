"""A target: one reader of one kind of file, its valid seeds, and how an execution ends."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dylora_mlx.errors import UserError

Run = Callable[[bytes], object]
Made = tuple[list[bytes], Run]
"""Valid files as our own writers leave them, and a function that reads bytes as such a file."""
SLOW = 5.0
"""Seconds of CPU that one execution may take: what needs more would hang a command."""
PACKAGE = f"{os.sep}dylora_mlx{os.sep}"
LARGEST = 1 << 18
"""Bytes of an input at most."""


@dataclass(frozen=True)
class Target:
    """make: from a scratch folder to seeds and the function under test; form: what the mutators know about the bytes;
    weight: share of the time that a campaign gives it."""

    name: str
    form: str
    make: Callable[[Path], Made]
    weight: float

    @property
    def about(self) -> str:
        return (self.make.__doc__ or "").splitlines()[0]


TARGETS: dict[str, Target] = {}


def target(name: str, form: str, weight: float = 1.0) -> Callable[[Callable[[Path], Made]], Callable[[Path], Made]]:
    """Register a function that makes a target."""

    def register(make: Callable[[Path], Made]) -> Callable[[Path], Made]:
        assert name not in TARGETS, name
        TARGETS[name] = Target(name, form, make, weight)
        return make

    return register


class Outcome(NamedTuple):
    """place: what distinguishes this end from others: empty for a success, else where the error was raised; finding:
    what is wrong, empty if the reader did its duty."""

    place: str
    finding: str


def execute(run: Run, data: bytes) -> Outcome:
    """One execution. A success and a UserError are what a reader may do; everything else is a finding."""
    begun = time.process_time()
    try:
        run(data)
    except UserError as error:
        return Outcome(_place(error), "" if _printable(error) else "a UserError without a message")
    except (Exception, SystemExit) as error:
        return Outcome(_place(error), f"{type(error).__name__}: {_short(error)}")
    spent = time.process_time() - begun
    return Outcome("", f"took {spent:.1f} s" if spent > SLOW else "")


def _printable(error: Exception) -> bool:
    return bool(" ".join(str(error).split()))


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _place(error: BaseException) -> str:
    """Type of the error and the innermost places in the package that it passed: the same for the same fault."""
    own, at = [], error.__traceback__
    while at is not None:  # by hand: traceback's own functions read the source
        file = at.tb_frame.f_code.co_filename
        if PACKAGE in file:
            own.append(f"{file.rsplit(PACKAGE, 1)[1]}:{at.tb_lineno}")
        at = at.tb_next
    return " < ".join([type(error).__name__, *reversed(own[-2:])])
