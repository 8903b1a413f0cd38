"""What a command says in one line: a mistake that the user can mend, and a failure that nobody made."""

from __future__ import annotations


class UserError(ValueError):
    """What is wrong, where, and what to do, in one line. Commands print it and leave with exit code 2."""


class Failure(RuntimeError):
    """What failed, what is left, and what to do, in one line. Commands print it and leave with exit code 1."""
