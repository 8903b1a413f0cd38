"""Plain values, checked against the types of the config's dataclasses and built into them."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from dylora_mlx.config import Source
from dylora_mlx.config.options import is_section, renamed, type_name

Dataclass = TypeVar("Dataclass")
_EXPONENT = re.compile(r"[+-]?[0-9]+[eE][+-]?[0-9]+")


def build(kind: type[Dataclass], tree: dict[str, Any]) -> Dataclass:
    """An instance of a dataclass from plain values, nested as its sections are.

    Types are strict: text is no number, and a number is no text. Raises ValueError with one line that names the option:
    for an unknown name, for a type that does not fit, and for a value that the dataclass itself refuses.
    """
    for problem in _unknown_names(kind, tree):
        raise ValueError(problem)
    try:
        # As JSON: only there does strict validation take an object for a dataclass.
        return _adapter(kind).validate_json(json.dumps(_with_floats(kind, tree), default=_refuse), strict=True)
    except ValidationError as error:
        raise ValueError(_one_line(kind, error.errors()[0])) from error


@cache
def _adapter(kind: type[Dataclass]) -> TypeAdapter[Dataclass]:
    return TypeAdapter(kind)


def _refuse(value: Any) -> Any:
    raise ValueError(f"'{value!s:.80}' is read as a {type(value).__name__}; put it in quotes if it is text")


def _with_floats(kind: type, tree: dict[str, Any]) -> dict[str, Any]:
    """The same values, with text such as 1e-5 as a number where a number is wanted: YAML 1.1 reads it as text."""
    hints = get_type_hints(kind)
    changed = {}
    for name, value in tree.items():
        hint = hints[name]
        if is_section(hint) and isinstance(value, dict):
            value = _with_floats(hint, value)
        elif isinstance(value, str) and float in (hint, *get_args(hint)) and _EXPONENT.fullmatch(value):
            value = float(value)
        elif Source in get_args(hint):
            entries = value if isinstance(value, list) else [value]
            entries = [_with_floats(Source, entry) if isinstance(entry, dict) else entry for entry in entries]
            value = entries if isinstance(value, list) else entries[0]
        changed[name] = value
    return changed


def _unknown_names(kind: type, tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """A line for every name that is no option. prefix: of the section, such as `growth.rank.`"""
    hints = get_type_hints(kind)
    for name, value in tree.items():
        hint = hints.get(name)
        if hint is None:
            yield _unknown(f"{prefix}{name}", kind, hints)
        elif is_section(hint) and isinstance(value, dict):
            yield from _unknown_names(hint, value, f"{prefix}{name}.")
        elif Source in get_args(hint):
            entries = value if isinstance(value, list) else [value]
            for entry in (entry for entry in entries if isinstance(entry, dict)):
                yield from _unknown_names(Source, entry, f"{prefix}{name}.")


def _unknown(name: str, kind: type, hints: dict[str, Any]) -> str:
    new = renamed(name, kind)
    if new is not None:
        return f"{name} is now called {new}"
    section, _, last = name.rpartition(".")
    close = difflib.get_close_matches(last, hints, 1)
    hint = f"; did you mean {section}{'.' * bool(section)}{close[0]}?" if close else ""
    return f"{name}: no such option{hint}"


def _one_line(kind: type, error: ErrorDetails) -> str:
    """What is wrong with which option, in the words of its declaration."""
    hint: Any = kind
    names: list[str] = []
    for part in error["loc"]:
        if is_section(hint) and isinstance(part, str) and part in (hints := get_type_hints(hint)):
            hint = hints[part]
            names.append(part)
        elif isinstance(part, int):  # an entry of a list
            hint = get_args(hint)[0]
        elif part == Source.__name__:  # a branch of `source or null`
            hint = Source
        else:
            break
    name = ".".join(names)
    if error["type"] == "value_error":  # raised by the dataclass itself, which knows its own options' names only
        prefix = "" if hint in (kind, Source) else f"{name}."
        return prefix + str(error.get("ctx", {}).get("error", error["msg"]))
    if error["type"] == "missing":
        return f"{name}: must be given"
    return f"{name}: '{_shown(error['input'])}' should be {type_name(hint)}"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
