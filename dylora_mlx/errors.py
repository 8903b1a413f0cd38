"""The one exception that means the user can mend it."""

from __future__ import annotations


class UserError(ValueError):
    """What is wrong, where, and what to do, in one line. Commands print it and leave with exit code 2."""
