"""Validate plain values against the types of the config's dataclasses and build instances from them."""

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
    """Build a dataclass from plain values, nested as its sections are.

    Types are strict: a string is not accepted as a number, nor a number as a string. Raises ValueError with one line
    that names the option: for an unknown name, for a wrong type, and for a value that the dataclass itself rejects.
    """
    for problem in _unknown_names(kind, tree):
        raise ValueError(problem)
    try:
        # Validate JSON, not Python values: in strict mode pydantic accepts a mapping for a dataclass only from JSON.
        return _adapter(kind).validate_json(
            json.dumps(_convert_exponents(kind, tree), default=_reject_value), strict=True
        )
    except ValidationError as error:
        raise ValueError(_error_message(kind, error.errors()[0])) from error


@cache
def _adapter(kind: type[Dataclass]) -> TypeAdapter[Dataclass]:
    return TypeAdapter(kind)


def _reject_value(value: Any) -> Any:
    """Raise ValueError for a YAML value that JSON cannot represent, such as a date."""
    raise ValueError(f"'{value!s:.80}' is read as a {type(value).__name__}; put it in quotes if it is text")


def _convert_exponents(kind: type, tree: dict[str, Any]) -> dict[str, Any]:
    """Return the values with text such as 1e-5 converted to float where a float is expected: YAML 1.1 reads it as
    text."""
    hints = get_type_hints(kind)
    converted = {}
    for name, value in tree.items():
        hint = hints[name]
        if is_section(hint) and isinstance(value, dict):
            value = _convert_exponents(hint, value)
        elif isinstance(value, str) and float in (hint, *get_args(hint)) and _EXPONENT.fullmatch(value):
            value = float(value)
        elif Source in get_args(hint):
            entries = value if isinstance(value, list) else [value]
            entries = [_convert_exponents(Source, entry) if isinstance(entry, dict) else entry for entry in entries]
            value = entries if isinstance(value, list) else entries[0]
        converted[name] = value
    return converted


def _unknown_names(kind: type, tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield an error message for every name that is not an option.

    `prefix` is that of the section, such as `growth.rank.`
    """
    hints = get_type_hints(kind)
    for name, value in tree.items():
        hint = hints.get(name)
        if hint is None:
            yield _unknown_name_message(f"{prefix}{name}", kind, hints)
        elif is_section(hint) and isinstance(value, dict):
            yield from _unknown_names(hint, value, f"{prefix}{name}.")
        elif Source in get_args(hint):
            entries = value if isinstance(value, list) else [value]
            for entry in (entry for entry in entries if isinstance(entry, dict)):
                yield from _unknown_names(Source, entry, f"{prefix}{name}.")


def _unknown_name_message(name: str, kind: type, hints: dict[str, Any]) -> str:
    current_name = renamed(name, kind)
    if current_name is not None:
        return f"{name} is now called {current_name}"
    section, _, field_name = name.rpartition(".")
    similar = difflib.get_close_matches(field_name, hints, 1)
    suggestion = f"; did you mean {section}{'.' * bool(section)}{similar[0]}?" if similar else ""
    return f"{name}: no such option{suggestion}"


def _error_message(kind: type, error: ErrorDetails) -> str:
    """Return a validation error as one line that names the option by its full name and its expected type."""
    hint: Any = kind
    names: list[str] = []
    for part in error["loc"]:
        if is_section(hint) and isinstance(part, str) and part in (hints := get_type_hints(hint)):
            hint = hints[part]
            names.append(part)
        elif isinstance(part, int):  # an entry of a list
            hint = get_args(hint)[0]
        elif part == Source.__name__:  # pydantic names the branch of the union `Source | None`
            hint = Source
        else:
            break
    name = ".".join(names)
    if error["type"] == "value_error":  # from `__post_init__`, whose message begins with the bare field name
        prefix = "" if hint in (kind, Source) else f"{name}."
        return prefix + str(error.get("ctx", {}).get("error", error["msg"]))
    if error["type"] == "missing":
        return f"{name}: must be given"
    return f"{name}: '{_truncate(error['input'])}' should be {type_name(hint)}"


def _truncate(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
