"""Checks of option values: each raises ValueError with a message that begins with the option's name."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

MAX_INT = 2**31 - 1
"""Largest value of an int option: the largest int32, the limit of arrays and their sizes."""


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def require_finite(section: Any) -> None:
    """Require every float of a section to be finite and every int to fit into an int32."""
    for entry in fields(section):
        value = getattr(section, entry.name)
        large = isinstance(value, int) and abs(value) > MAX_INT
        require(not large, f"{entry.name}: {value} is beyond {MAX_INT}")
        require(not isinstance(value, float) or math.isfinite(value), f"{entry.name}: {value} is not a finite number")
