"""Fuzz targets: a target is one reader of one kind of file, with valid seed files. Also runs one execution of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dylora_mlx.errors import UserError

Run = Callable[[bytes], object]
Harness = tuple[list[bytes], Run]
"""Valid files, written by the package itself (the seeds), and the function under test, which reads bytes as a file of that kind."""
SLOW = 5.0
"""Seconds of CPU that one execution may take; a slower one is a finding, because a command would seem to hang."""
PACKAGE = f"{os.sep}dylora_mlx{os.sep}"
LARGEST = 1 << 18
"""Maximum size of an input, in bytes."""


@dataclass(frozen=True)
class Target:
    """A registered fuzz target."""

    name: str
    form: str
    """File format that the mutators use: a key of mutate.FORMS; any other value mutates raw bytes."""
    make: Callable[[Path], Harness]
    """Sets up the target in a scratch folder; returns the seeds and the function under test."""
    weight: float
    """Relative share of a campaign's time."""

    @property
    def about(self) -> str:
        """The first line of the docstring of `make`, which names the file and the module that reads it."""
        return (self.make.__doc__ or "").splitlines()[0]


TARGETS: dict[str, Target] = {}


def target(
    name: str, form: str, weight: float = 1.0
) -> Callable[[Callable[[Path], Harness]], Callable[[Path], Harness]]:
    """Return a decorator that registers a function as the `make` of a target."""

    def register(make: Callable[[Path], Harness]) -> Callable[[Path], Harness]:
        assert name not in TARGETS, name
        TARGETS[name] = Target(name, form, make, weight)
        return make

    return register


class Outcome(NamedTuple):
    """Outcome of one execution."""

    location: str
    """Type of the error and where it was raised, to tell outcomes apart; empty for a success."""
    finding: str
    """Description of the fault; empty if the reader succeeded or raised a proper UserError."""


def execute(run: Run, data: bytes) -> Outcome:
    """Execute the function under test once. Any outcome other than success or a UserError with a message is a finding."""
    start = time.process_time()
    try:
        run(data)
    except UserError as error:
        return Outcome(_location(error), "" if _has_message(error) else "a UserError without a message")
    except (Exception, SystemExit) as error:
        return Outcome(_location(error), f"{type(error).__name__}: {_shorten(error)}")
    seconds = time.process_time() - start
    return Outcome("", f"took {seconds:.1f} s" if seconds > SLOW else "")


def _has_message(error: Exception) -> bool:
    return bool(" ".join(str(error).split()))


def _shorten(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _location(error: BaseException) -> str:
    """Return the type of the error and the two innermost lines of the package in its traceback: equal for the same fault."""
    package_lines, tb = [], error.__traceback__
    # Walk the traceback by hand: the functions of `traceback` read source files.
    while tb is not None:
        file = tb.tb_frame.f_code.co_filename
        if PACKAGE in file:
            package_lines.append(f"{file.rsplit(PACKAGE, 1)[1]}:{tb.tb_lineno}")
        tb = tb.tb_next
    return " < ".join([type(error).__name__, *reversed(package_lines[-2:])])
