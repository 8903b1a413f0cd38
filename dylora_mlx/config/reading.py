"""Text options, read from YAML as they are written there, and written so that they come back.

jsonargparse reads every plain string as YAML once more to find numbers and lists in it. Of a template such as '# {title}'
nothing would be left, it is a comment; of 1e3 a number.
"""

from __future__ import annotations

from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import get_loader, set_loader

from dylora_mlx.config import Config

Section = TypeVar("Section")
_usual = get_loader("yaml")


class Text(str):
    """Text that is not read again: the parser does that with values whose type is str itself."""


def texts(section: type) -> set[str]:
    """Names of the options that hold any text, of a section and those within it."""
    found: set[str] = set()
    for name, kind in get_type_hints(section).items():
        parts = {kind, *get_args(kind)}
        found |= {name} if str in parts else set()
        found |= {inner for part in parts if is_dataclass(part) and isinstance(part, type) for inner in texts(part)}
    return found


_TEXTS = texts(Config)


def use() -> None:
    """Make jsonargparse read and print YAML in this way."""
    set_loader("yaml", lambda text: _marked(_usual(str(text)), ""), (yaml.YAMLError,))
    yaml.add_representer(Text, lambda dumper, text: dumper.represent_str(str(text)), Dumper=yaml.SafeDumper)


def _marked(found: Any, option: str) -> Any:
    if isinstance(found, dict):
        return {name: _marked(value, name) for name, value in found.items()}
    if isinstance(found, list):
        return [_marked(value, option) for value in found]
    return Text(found) if isinstance(found, str) and option in _TEXTS else found


def plain(section: Section) -> Section:
    """The same section with every Text a str again."""
    return _plain(section)


def _plain(found: Any) -> Any:
    if is_dataclass(found) and not isinstance(found, type):
        return replace(found, **{entry.name: _plain(getattr(found, entry.name)) for entry in fields(found)})
    if isinstance(found, list):
        return [_plain(value) for value in found]
    return str(found) if isinstance(found, Text) else found


class _Dumper(yaml.SafeDumper):
    """Writes text in quotes where it would be read as something else, such as 1e3, or would lose a line end."""


def _written(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    kept = _usual(yaml.safe_dump(text, allow_unicode=True)) == text
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if kept else '"')


_Dumper.add_representer(str, _written)


def as_yaml(config: Config) -> str:
    """Every option, those that are null too."""
    return yaml.dump(asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
