"""The two errors that a command prints as one line: `UserError` for wrong input, `Failure` for a failed system call."""

from __future__ import annotations


class UserError(ValueError):
    """Wrong input or a wrong state that the user can fix. Commands print the message and exit with code 2.

    The message is one line: what is wrong, where, and what to do.
    """


class Failure(RuntimeError):
    """An outside failure, such as a full disk or a lost rank. Commands print the message and exit with code 1.

    The message is one line: what failed, what is left, and what to do.
    """
