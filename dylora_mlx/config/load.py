"""Load a config from YAML files with overrides of single options, and write one as YAML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from dylora_mlx.config import Config, Source
from dylora_mlx.config.options import REMOVED, Option, is_section, sections
from dylora_mlx.config.paths import resolve_option, resolve_options
from dylora_mlx.config.presets import preset_tree
from dylora_mlx.config.yaml_files import error_location, read_config_file
from dylora_mlx.errors import UserError
from dylora_mlx.system.files import is_too_deep, parse_yaml

Built = TypeVar("Built", Config, Source)


def load_config(path: Path, changes: Iterable[str] = ()) -> Config:
    """Load a run folder's config.yaml, with options changed as in growth.threshold=0.7.

    Relative paths stay as they are, so they mean the current folder: only runs of version 0.1.0 have any. Options that
    were removed since are ignored.

    A run from before there was an `eval` section keeps evaluating all documents, as its losses so far were measured. One
    from before `model.document_mean_decay` keeps the plain mean, which its router was fitted to.

    Raises UserError for an unreadable file and for a change that names no option.
    """
    if not path.is_file():
        raise UserError(f"{path}: missing; give a run folder")
    overrides = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise UserError(f"{change}: give an option and its value, such as growth.threshold=0.7")
        overrides[name] = text
    stored = _without_removed(read_config_file(path))
    stored["model"] = {"document_mean_decay": 1.0} | stored.get("model", {})
    return _from_trees([path], [{"eval": {"tokens": None}} | stored], overrides)


def _without_removed(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a run folder without those that no longer exist."""
    kept = dict(tree)
    for section, _, name in (full_name.rpartition(".") for full_name in REMOVED):
        if section in kept:
            kept[section] = {key: value for key, value in kept[section].items() if key != name}
    return kept


def to_yaml(config: Config) -> str:
    """Return every option as YAML, null ones too: a resumed run keeps its values even if defaults change later."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def config_from_files(paths: Sequence[Path], overrides: Mapping[str, str]) -> Config:
    """Merge config files in order, then apply the overrides. Local paths become absolute, see `config.paths`.

    Options that neither gives have the defaults of the base's preset, see `config.presets`.

    Args:
        paths: YAML files; options of later files replace those of earlier ones.
        overrides: option text as on the command line, by the option's full name.

    Raises UserError; for a mistake in a file the message begins with the file and the line.
    """
    trees = [resolve_options(read_config_file(path), path.parent) for path in paths]
    return _from_trees(paths, [preset_tree(trees, overrides), *trees], overrides)


def _from_trees(paths: Sequence[Path], trees: list[dict[str, Any]], overrides: Mapping[str, str]) -> Config:
    """Build a config from the options of some files. Raises UserError as `config_from_files` does."""
    try:
        return build(Config, trees, overrides)
    except UserError as error:
        message = str(error).partition("; did you mean")[0]
        raise UserError(f"{error_location(message, paths, overrides)}{error}") from error


def build(kind: type[Built], trees: Sequence[dict[str, Any]], overrides: Mapping[str, str]) -> Built:
    """Build a Config or Source from nested values. Later trees replace earlier ones, and overrides replace all.

    Raises UserError for an unknown option and for a value that does not fit.
    """
    # Imported here because it loads pydantic, which --help does not need.
    from dylora_mlx.config import validate

    merged: dict[str, Any] = {}
    for values in trees:
        _merge_options(merged, values, kind)
    options = {option.name: option for section in sections(kind) for option in section.options}
    for name, text in overrides.items():
        value = _parse_value(options[name], text) if name in options else text
        _set_option(merged, name.split("."), resolve_option(name, value) if kind is Config else value)
    try:
        return validate.build(kind, merged)
    except ValueError as error:
        raise UserError(str(error)) from error


def _parse_value(option: Option, text: str) -> Any:
    """Convert an override's text to a value: text where the option accepts text, otherwise YAML.

    An optional list of texts may be given as its only entry, which YAML would not read if it is a pattern such as *.py.
    """
    accepted_types = get_args(option.type) if get_origin(option.type) in (Union, UnionType) else (option.type,)
    literals = {value for kind in accepted_types if get_origin(kind) is Literal for value in get_args(kind)}
    try:
        if is_too_deep(text):
            raise ValueError("nested too deeply")
        if text in literals or (str in accepted_types and not (text == "null" and type(None) in accepted_types)):
            return text
        if _is_list_of_names(option.type) and not text.lstrip().startswith("["):
            return [name.strip() for name in text.split(",")]
        is_optional_list = list[str] in accepted_types and type(None) in accepted_types
        if is_optional_list and text != "null" and not text.lstrip().startswith("["):
            return [text]
        return parse_yaml(text)
    except ValueError as error:
        raise UserError(f"--{option.name} {text[:80]}: {error}") from error


def _is_list_of_names(kind: Any) -> bool:
    """Return whether an option is a list of names from a fixed set, which may be given as name,name."""
    return get_origin(kind) is list and get_origin(get_args(kind)[0]) is Literal


def _merge_options(target: dict[str, Any], values: dict[str, Any], kind: type) -> None:
    """Merge options into `target` section by section. Lists and sources are replaced as a whole."""
    hints = get_type_hints(kind)
    for name, value in values.items():
        section = hints.get(name)
        if is_section(section) and isinstance(value, dict):
            _merge_options(target.setdefault(name, {}), value, section)
        else:
            target[name] = value


def _set_option(tree: dict[str, Any], names: list[str], value: Any) -> None:
    """Set an option of a nested tree, given the parts of its dotted name."""
    for name in names[:-1]:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise UserError(f"{'.'.join(names)}: no such option")
    tree[names[-1]] = value
