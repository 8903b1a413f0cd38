"""A config from YAML files and changes to single options, and back to YAML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from dylora_mlx.config import Config, Source
from dylora_mlx.config.options import Option, is_section, sections
from dylora_mlx.config.yaml_files import error_location, read_config_file
from dylora_mlx.errors import UserError
from dylora_mlx.system.files import is_too_deep, parse_yaml

Built = TypeVar("Built", Config, Source)


def load_config(path: Path, changes: Iterable[str] = ()) -> Config:
    """The config of a run folder, with options changed as in growth.threshold=0.7.

    Raises UserError when it cannot be read, or for a change that is no option.
    """
    if not path.is_file():
        raise UserError(f"{path}: missing; give a run folder")
    overrides = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise UserError(f"{change}: give an option and its value, such as growth.threshold=0.7")
        overrides[name] = text
    return config_from_files([path], overrides)


def to_yaml(config: Config) -> str:
    """Every option, null ones too: a resumed run keeps the values it began with, whatever the defaults are then."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def config_from_files(paths: Sequence[Path], overrides: Mapping[str, str]) -> Config:
    """The options of files, later ones over earlier ones, and over all of them the overrides.

    overrides: text by the option's full name, as on a command line. Raises UserError; a mistake in a file is told with
    its line.
    """
    trees = [read_config_file(path) for path in paths]
    try:
        return build(Config, trees, overrides)
    except UserError as error:
        named = str(error).partition("; did you mean")[0]
        raise UserError(f"{error_location(named, paths, overrides)}{error}") from error


def build(kind: type[Built], trees: Sequence[dict[str, Any]], overrides: Mapping[str, str]) -> Built:
    """A dataclass from nested values, later trees over earlier ones, and overrides over all. Raises UserError."""
    from dylora_mlx.config import validate  # only now: --help needs no validation

    tree: dict[str, Any] = {}
    for values in trees:
        _merge(tree, values, kind)
    options = {option.name: option for section in sections(kind) for option in section.options}
    for name, text in overrides.items():
        _set(tree, name.split("."), _parse_value(options[name], text) if name in options else text)
    try:
        return validate.build(kind, tree)
    except ValueError as error:
        raise UserError(str(error)) from error


def _parse_value(option: Option, text: str) -> Any:
    """The value that an override's text stands for. Text stays text where the option takes text."""
    kinds = get_args(option.type) if get_origin(option.type) in (Union, UnionType) else (option.type,)
    named = {value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)}
    try:
        if is_too_deep(text):
            raise ValueError("nested too deeply")
        if text in named or (str in kinds and not (text == "null" and type(None) in kinds)):
            return text
        return parse_yaml(text)
    except ValueError as error:
        raise UserError(f"--{option.name} {text[:80]}: {error}") from error


def _merge(into: dict[str, Any], values: dict[str, Any], kind: type) -> None:
    """Later options over earlier ones; lists and sources are replaced as a whole."""
    hints = get_type_hints(kind)
    for name, value in values.items():
        section = hints.get(name)
        if is_section(section) and isinstance(value, dict):
            _merge(into.setdefault(name, {}), value, section)
        else:
            into[name] = value


def _set(tree: dict[str, Any], names: list[str], value: Any) -> None:
    for name in names[:-1]:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise UserError(f"{'.'.join(names)}: no such option")
    tree[names[-1]] = value
