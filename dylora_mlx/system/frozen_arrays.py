"""Arrays that do not change any more, so that equal ones are recognised without comparing their values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


class FrozenArrays(dict[str, Any]):
    """Arrays by name that are replaced as a whole or not at all, never modified in place.

    Args:
        arrays: the arrays.
        key: the objects that the arrays are made from. By default they are the arrays themselves.
    """

    def __init__(self, arrays: Mapping[str, Any], key: Iterable[object] | None = None):
        super().__init__(arrays)
        self._key = tuple(arrays.values() if key is None else key)

    def is_same(self, other: FrozenArrays) -> bool:
        """Return whether both have the same names and are made from the same objects, so that they hold the same values."""
        return (
            self.keys() == other.keys()
            and len(self._key) == len(other._key)
            and all(one is another for one, another in zip(self._key, other._key, strict=True))
        )
