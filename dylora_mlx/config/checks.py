"""Checks of option values: ValueError with a message that begins with the option's name."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

MAX_INT = 2**31 - 1


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def require_finite(section: Any) -> None:
    """Every float of a section is a number, and every whole number one that arrays and their sizes can have."""
    for entry in fields(section):
        value = getattr(section, entry.name)
        large = isinstance(value, int) and abs(value) > MAX_INT
        require(not large, f"{entry.name}: {value} is beyond {MAX_INT}")
        require(not isinstance(value, float) or math.isfinite(value), f"{entry.name}: {value} is not a finite number")
