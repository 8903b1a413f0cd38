"""Find and read the YAML config files that a command line names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from dylora_mlx.config import Config
from dylora_mlx.config.options import is_section
from dylora_mlx.errors import UserError
from dylora_mlx.system.files import parse_yaml
from dylora_mlx.system.yaml_loader import RepeatedKeyError, SafeLoader

CONFIG_FOLDERS = [Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs"]
"""Folders of the shipped configs: in an installed package, and in a source checkout."""
MAX_SECTION_DEPTH = 3
"""Maximum nesting depth of sections that is searched for an option's line."""


def split_config_arguments(argv: list[str]) -> tuple[list[Path], list[str]]:
    """Split a command line into the paths of its --config files and the other words.

    Without --config the quickstart's config is returned. Raises UserError for a --config without a value or without a
    file.
    """
    paths, others, remaining = [], [], list(argv)
    while remaining:
        word = remaining.pop(0)
        if word != "--config" and not word.startswith("--config="):
            others.append(word)
            continue
        if word == "--config" and not remaining:
            raise UserError("--config needs a YAML file or the name of a shipped config")
        paths.append(find_config(remaining.pop(0) if word == "--config" else word.removeprefix("--config=")))
    return paths or [find_config("quickstart")], others


def find_config(config: str) -> Path:
    """Return the path of a shipped config by name, or of a config file by path. Raises UserError if neither exists."""
    candidates = [folder / f"{config}.yaml" for folder in CONFIG_FOLDERS]
    path = next((p for p in (*candidates, Path(config).expanduser()) if p.is_file()), None)
    if path is None:
        raise UserError(f"{config or '--config'}: no such config file; shipped are {', '.join(shipped_configs())}")
    return path


def shipped_configs() -> list[str]:
    """Return the names of the configs that come with the package."""
    return sorted({path.stem for folder in CONFIG_FOLDERS for path in folder.glob("*.yaml")})


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a config file and check that its sections are mappings and its sources a list of mappings.

    The later type checks could neither name the file nor show the expected form. Raises UserError, also for an option
    that is given twice.
    """
    try:
        options = parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8; convert the file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except RepeatedKeyError as error:
        raise UserError(f"{path}, {error.lines}: {error}") from error
    except ValueError as error:
        raise UserError(f"{path}: not YAML ({error})") from error
    if not isinstance(options, dict):
        raise UserError(f"{path}: no options in this file; it needs at least skills")
    for section in (name for name, kind in get_type_hints(Config).items() if is_section(kind)):
        if not isinstance(options.get(section, {}), dict):
            raise UserError(
                f"{path}: {section}: '{options[section]}' should be options such as {section}: {{name: value}}"
            )
    for section in ("skills", "domains"):
        if not isinstance(options.get(section, []), list):
            raise UserError(
                f"{path}: {section}: should be a list of entries such as - {{name: sql, source: sql.jsonl}}"
            )
        for entry in options.get(section, []):
            if not isinstance(entry, dict):
                raise UserError(
                    f"{path}: {section}: '{entry}' should be an entry such as {{name: sql, source: sql.jsonl}}"
                )
    return options


def error_location(message: str, paths: Sequence[Path], overridden: Collection[str]) -> str:
    """Return the place of the option that an error message names, as `FILE, line 3: `.

    Empty if the option was given on the command line. `overridden` holds the full names of those, such as
    training.epochs.
    """
    if any(_mentions(message, name) for name in overridden):
        return ""
    matches = [(name, path, line) for path in paths for name, line in _option_lines(path) if _mentions(message, name)]
    if matches:  # prefer the longest dotted name; among files the last, whose value is the one in effect
        most_parts = max(name.count(".") for name, _, _ in matches)
        path, line = [(path, line) for name, path, line in matches if name.count(".") == most_parts][-1]
        return f"{path}, line {line}: "
    return f"{paths[0]}: " if len(paths) == 1 and not overridden else ""


def _mentions(message: str, option: str) -> bool:
    """Return whether a message mentions every part of an option's dotted name as a whole word."""
    return all(re.search(rf"(?<!\w){re.escape(part)}(?!\w)", message) for part in option.split("."))


def _option_lines(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the full name of every option in a file with its line number."""
    node = yaml.compose(path.read_text(encoding="utf-8"), Loader=SafeLoader)
    # Breadth first: the list grows while the loop reads it.
    sections = [("", node)]
    for prefix, section in sections:
        if isinstance(section, yaml.MappingNode) and prefix.count(".") < MAX_SECTION_DEPTH:
            for key, value in section.value:
                if isinstance(key, yaml.ScalarNode):
                    yield f"{prefix}{key.value}", key.start_mark.line + 1
                    sections.append((f"{prefix}{key.value}.", value))
