"""Validate plain values against the types of the config's dataclasses and build instances from them."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from functools import cache
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from dylora_mlx.config import Source
from dylora_mlx.config.options import REMOVED, is_section, renamed, type_name
from dylora_mlx.system.yaml_loader import PlainText

Dataclass = TypeVar("Dataclass")
_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_INTEGER = re.compile(rf"[+-]?{_DIGITS}")
"""A whole number in decimal, with or without leading zeros; 1_000 is 1000, as in Python."""
_FLOAT = re.compile(rf"[+-]?(?:{_DIGITS}\.?(?:{_DIGITS})?|\.{_DIGITS})(?:[eE][+-]?[0-9]+)?")
_EXPONENT = re.compile(r"[+-]?[0-9]+[eE][+-]?[0-9]+")
_OTHER_BASE = re.compile(r"[+-]?0(?:[xX][0-9a-fA-F]{1,15}|[oO][0-7]{1,15}|[bB][01]{1,15})")
_BOOLEANS = {form: word in ("yes", "on") for word in ("yes", "no", "on", "off")
             for form in (word, word.capitalize(), word.upper())}  # fmt: skip
"""Booleans by their words in YAML 1.1, besides true and false."""
MAX_NUMBER_CHARS = 1000
"""Maximum length of a text that is read as a number. Python converts no integer of more than 4300 digits."""


def build(kind: type[Dataclass], tree: dict[str, Any]) -> Dataclass:
    """Build a dataclass from plain values, nested as its sections are.

    Types are strict: a string is not accepted as a number, nor a number as a string. Raises ValueError with one line
    that names the option: for an unknown name, for a wrong type, and for a value that the dataclass itself rejects.
    Text that had no quotes in YAML (PlainText) becomes a number or a boolean where one is expected: 010 is 10, yes is true.
    """
    for problem in _unknown_names(kind, tree):
        raise ValueError(problem)
    try:
        # Validate JSON, not Python values: in strict mode pydantic accepts a mapping for a dataclass only from JSON.
        return _adapter(kind).validate_json(json.dumps(_convert_plain(kind, tree), default=_reject_value), strict=True)
    except ValidationError as error:
        raise ValueError(_error_message(kind, error.errors()[0])) from error


@cache
def _adapter(kind: type[Dataclass]) -> TypeAdapter[Dataclass]:
    return TypeAdapter(kind)


def _reject_value(value: Any) -> Any:
    """Raise ValueError for a YAML value that JSON cannot represent, such as a date."""
    raise ValueError(f"'{value!s:.80}' is read as a {type(value).__name__}; put it in quotes if it is text")


def _convert_plain(kind: type, tree: dict[str, Any]) -> dict[str, Any]:
    """Return the values with plain text such as 1e-5, 010 and yes converted where the option is a number or a boolean."""
    hints = get_type_hints(kind)
    converted = {}
    for name, value in tree.items():
        hint = hints[name]
        if is_section(hint) and isinstance(value, dict):
            value = _convert_plain(hint, value)
        elif isinstance(value, str):
            value = _convert_word(_accepted_types(hint), value)
        elif Source in get_args(hint):
            entries = value if isinstance(value, list) else [value]
            entries = [_convert_plain(Source, entry) if isinstance(entry, dict) else entry for entry in entries]
            value = entries if isinstance(value, list) else entries[0]
        converted[name] = value
    return converted


def _accepted_types(hint: Any) -> set[Any]:
    """Return the members of a union, or the type itself."""
    return set(get_args(hint)) if get_origin(hint) in (Union, UnionType) else {hint}


def _convert_word(accepted: set[Any], value: str) -> Any:
    """Return text as the number or boolean that it stands for, or as it is.

    Args:
        accepted: the types that the option accepts. Where text is one of them, the text is kept.
        value: the text. In quotes it is only a number as 1e-5 is, which some tools write so.
    """
    if str in accepted or len(value) > MAX_NUMBER_CHARS:
        return value
    plain = isinstance(value, PlainText)
    if bool in accepted and plain and value in _BOOLEANS:
        return _BOOLEANS[value]
    if int in accepted and plain and _INTEGER.fullmatch(value):
        return int(value)
    if float in accepted and (_FLOAT if plain else _EXPONENT).fullmatch(value):
        return float(value)
    return value


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
    if kind is not Source and name in REMOVED:
        return f"{name}: no longer an option, {REMOVED[name]}; leave it out"
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
    return f"{name}: '{_truncate(error['input'])}' should be {type_name(hint)}{_advice(hint, error['input'])}"


def _advice(hint: Any, value: Any) -> str:
    """Return how to write a value of the wrong type, as the end of a message; empty where that is not clear."""
    accepted = _accepted_types(hint)
    if str in accepted:
        return "; put it in quotes if it is text"
    if not isinstance(value, str):
        return ""
    if accepted & {int, float} and _OTHER_BASE.fullmatch(value):
        return f"; in decimal it is {int(value, 0)}"
    # The same without quotes would have been accepted.
    unquoted = _convert_word(accepted, PlainText(value))
    return "; leave out the quotes" if unquoted is not value and not isinstance(unquoted, str) else ""


def _truncate(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
