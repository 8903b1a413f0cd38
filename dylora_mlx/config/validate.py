"""Values of a file or a command line, checked against the types of the dataclasses and made into them."""

from __future__ import annotations

from functools import cache
from traceback import walk_tb
from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_loader

from dylora_mlx.config.options import sections

Made = TypeVar("Made")
_NULL = "\0null"
"""Stands for the text null while the parser looks, which takes it for the value."""


def made(kind: type[Made], tree: dict[str, Any]) -> Made:
    """An instance of a dataclass from plain values, nested as its sections are.

    Text stays as it is: where text is wanted, 1e3 and null are text. Raises ValueError in one line that names the option,
    for a name or type that does not fit and for a value that the dataclass itself refuses.
    """
    parser = _parser(kind)
    try:
        parsed = _changed(parser.parse_object(_changed(tree, "null", _NULL)), _NULL, "null")
        values = parser.instantiate(parsed)
        return kind(**{name: values[name] for name in kind.__dataclass_fields__})  # type: ignore[attr-defined]
    except (ArgumentError, ValueError, TypeError) as error:
        raise ValueError(_section(error, kind) + _one_line(error)) from error


@cache
def _parser(kind: type) -> ArgumentParser:
    def refuse(_: str) -> None:
        raise ValueError

    set_loader("exact", refuse, exceptions=(ValueError,))  # else every text is read as YAML once more
    parser = ArgumentParser(exit_on_error=False, parser_mode="exact")
    parser.add_class_arguments(kind)
    return parser


def _changed(found: Any, old: str, new: str) -> Any:
    """The same values with one text for another."""
    if isinstance(found, Namespace):
        return Namespace(**{name: _changed(value, old, new) for name, value in vars(found).items()})
    if isinstance(found, dict):
        return {name: _changed(value, old, new) for name, value in found.items()}
    if isinstance(found, list):
        return [_changed(value, old, new) for value in found]
    return new if found == old else found


def _section(error: BaseException | None, kind: type) -> str:
    """`growth.rank.` for an error that this section raised about itself: its checks know only their own options' names.
    Empty for all other errors."""
    prefixes, found = {section.kind: section.prefix for section in sections(kind)}, ""
    while error is not None:
        for frame, _ in walk_tb(error.__traceback__):
            found = prefixes.get(type(frame.f_locals.get("self")), found)
        error = error.__cause__ or error.__context__
    return found


def _one_line(error: BaseException) -> str:
    text = " ".join(line.strip() for line in str(error).replace(_NULL, "null").splitlines() if line.strip())
    return text[:600] or type(error).__name__
