"""Mutate JSON values: types, sizes, nesting, missing and extra keys, strings that are not valid text."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from random import Random
from typing import Any

DEEP = "@deep@"
"""Placeholder in a tree for lists nested too deeply for any encoder; `encode` expands it."""
DIGITS = "@digits@"
"""Placeholder for an integer of more digits than Python converts; `encode` expands it."""
NUMBERS = (
    0, 1, -1, 2, 3, 7, 8, 64, 255, 256, 1000, 65536, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64,
    10**12, 10**19, 10**400, -(10**400), 0.0, -0.0, 0.5, 1.0, 1.5, -1.5, 1e-9, 5e-324, 1e38, 3.5e38, 1e300,
    1.7976931348623157e308, -1e308, math.nan, math.inf, -math.inf,
)  # fmt: skip
STRINGS = (
    "", " ", "a", "0", "1", "-1", "1.5", "nan", "null", "true", "\0", "a\0b", "\ud800", "x\udfffy", "\ufeff", "\u202e",
    "\U0001f600", "e\u0301", "\n", "a\nb", "\r\n", "\x1b[31m", "{", "{}", "{text}", "{0}", "{a.b}", "%s", "../x", "/", "/etc/passwd",
    "C:\\", ".", "..", "~", "a/b", "F32", "float32", "lora", "LORA", "XLORA", "final", "base", "create", "merge", "evict", "import",
    DEEP, DIGITS,
)  # fmt: skip
SIMPLE: tuple[Any, ...] = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    [0],
    [1, 2],
    [""],
    {"": None},
    {"a": 1},
    [{}],
    [[1.0]],
)
LONG = (100, 1000, 20_000)
"""Lengths of long strings and lists."""
MANY = 2000
"""Maximum number of places of a tree that a mutation chooses from."""
DEPTHS = (20, 300, 5000, 100_000)
"""Depths of nesting that DEEP expands to."""


def odd(rng: Random) -> Any:
    """Return a value that a reader may not expect."""
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(NUMBERS)
    if kind < 0.7:
        return rng.choice(STRINGS)
    if kind < 0.97:
        return _copy(rng.choice(SIMPLE))
    size = rng.choice(LONG)
    return [0] * size if rng.random() < 0.3 else rng.choice("ax{\u00e9\U0001f600\\") * size


def _copy(value: Any) -> Any:
    return json.loads(json.dumps(value))


def nodes(root: Any) -> list[tuple[Any, Any]]:
    """Return the places of a tree as (container, key or index); at most a few thousand of a large tree."""
    places: list[tuple[Any, Any]] = []
    pending = [root]
    while pending and len(places) < MANY:
        container = pending.pop()
        for key in range(min(len(container), MANY)) if isinstance(container, list) else list(container):
            places.append((container, key))
            if isinstance(container[key], (dict, list)):
                pending.append(container[key])
    return places


def change(root: Any, rng: Random, donor: Any = None, words: Sequence[str] = ()) -> Any:
    """Return the tree with one to four places changed. It is modified in place, unless its root is replaced.

    Args:
        root: the tree.
        rng: the source of randomness.
        donor: another tree, from which values may be copied.
        words: names that mean something to the reader.
    """
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        places = nodes(root) if isinstance(root, (dict, list)) else []
        if not places or rng.random() < 0.01:
            root = odd(rng)
            continue
        container, key = rng.choice(places)
        _change_at(container, key, rng, donor, words)
    return root


def _change_at(container: Any, key: Any, rng: Random, donor: Any, words: Sequence[str]) -> None:
    kind, value = rng.random(), container[key]
    if kind < 0.34:
        container[key] = odd(rng)
    elif kind < 0.56:
        container[key] = _near(value, rng)
    elif kind < 0.68:
        del container[key]
    elif kind < 0.76:
        _add(container, rng.choice(words) if words and rng.random() < 0.7 else rng.choice(STRINGS), odd(rng), rng)
    elif kind < 0.82:
        container[key] = rng.choice(([value], {"a": value}, [value, value], str(value)))
    elif kind < 0.88 and isinstance(container, dict):
        _add(container, str(rng.choice(words or STRINGS)), container.pop(key), rng)
    elif kind < 0.94 and isinstance(donor, (dict, list)) and (donor_places := nodes(donor)):
        donor_container, donor_key = rng.choice(donor_places)
        container[key] = _copy(donor_container[donor_key])
    elif isinstance(container, list):
        container[key:key] = [value] * rng.choice((1, 2, 50))
    else:
        container[key] = container[rng.choice(list(container))]


def _add(container: Any, name: str, value: Any, rng: Random) -> None:
    if isinstance(container, list):
        container.insert(rng.randint(0, len(container)), value)
    else:
        container[name] = value


def _near(value: Any, rng: Random) -> Any:
    """Return a value similar to this one."""
    if isinstance(value, bool) or value is None:
        return rng.choice((True, False, None, 0, 1))
    if isinstance(value, (int, float)):
        if abs(value) > 1e100:  # an integer may exceed the range of floats
            return rng.choice((-value, str(value), value * 10))
        return rng.choice((value + 1, value - 1, -value, value * 2, value * 0.5, value * 1e9, float(value), str(value)))
    if isinstance(value, str):
        at = rng.randint(0, len(value))
        inserted = value[:at] + rng.choice(STRINGS) + value[at:]
        return rng.choice((inserted, value[:at], value[at:], value.upper(), value * 2, f" {value}", [value]))
    if isinstance(value, list):
        shuffled = rng.sample(value, len(value))
        return rng.choice((value[: len(value) // 2], value + value, value[::-1], shuffled, dict.fromkeys("ab", value)))
    return list(value.values()) if rng.random() < 0.5 else dict(reversed(value.items()))


def decode(data: bytes) -> Any:
    """Parse JSON bytes. Raises ValueError and RecursionError."""
    return json.loads(data)


def encode(root: Any, rng: Random) -> bytes:
    """Return a tree as JSON bytes: sometimes with a duplicate key, text that is not valid UTF-8, or a byte order mark."""
    ascii_only = rng.random() < 0.85
    text = json.dumps(root, ensure_ascii=ascii_only, indent=1 if rng.random() < 0.05 else None)
    if DEEP in text:
        depth = rng.choice(DEPTHS)
        opening, closing = rng.choice((("[", "]"), ('{"a":', "}"), ("[[", "")))
        text = text.replace(f'"{DEEP}"', opening * depth + "1" + closing * depth, 1)
    if DIGITS in text:
        text = text.replace(f'"{DIGITS}"', rng.choice("19") * 5000, 1)
    if rng.random() < 0.05 and isinstance(root, dict) and root and text.startswith("{"):
        duplicate_key = json.dumps(rng.choice(list(root)))
        text = f"{{{duplicate_key}: {json.dumps(rng.choice(SIMPLE))}, {text[1:]}"
        if rng.random() < 0.5:
            text = f"{text[:-1]}, {duplicate_key}: {rng.choice((0, 'null', '[]'))}}}"
    content = text.encode("utf-8", "surrogatepass")
    return b"\xef\xbb\xbf" + content if rng.random() < 0.01 else content
