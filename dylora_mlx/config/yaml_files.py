"""The YAML files that a command line names, and what is in them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from dylora_mlx.config import Config
from dylora_mlx.config.options import is_section
from dylora_mlx.errors import UserError
from dylora_mlx.system.files import SafeLoader, parse_yaml

CONFIG_FOLDERS = [Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs"]
"""Where shipped configs lie, in an installed package and in a source folder."""
MAX_SECTION_DEPTH = 3
"""Names of sections within sections, at most."""


def split_config_arguments(argv: list[str]) -> tuple[list[Path], list[str]]:
    """Files of the configs that are named, the quickstart's where none is, and the other words."""
    paths, others, rest = [], [], list(argv)
    while rest:
        word = rest.pop(0)
        if word != "--config" and not word.startswith("--config="):
            others.append(word)
            continue
        if word == "--config" and not rest:
            raise UserError("--config needs a YAML file or the name of a shipped config")
        paths.append(find_config(rest.pop(0) if word == "--config" else word.removeprefix("--config=")))
    return paths or [find_config("quickstart")], others


def find_config(config: str) -> Path:
    """The file of a shipped config, or of another. Raises UserError when there is none."""
    found = [folder / f"{config}.yaml" for folder in CONFIG_FOLDERS]
    path = next((p for p in (*found, Path(config).expanduser()) if p.is_file()), None)
    if path is None:
        shipped = sorted({p.stem for folder in CONFIG_FOLDERS for p in folder.glob("*.yaml")})
        raise UserError(f"{config or '--config'}: no such config file; shipped are {', '.join(shipped)}")
    return path


def read_config_file(path: Path) -> dict[str, Any]:
    """A config file's options, their shape checked: the checks of types would not name the file or show what is wanted."""
    try:
        found = parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8; convert the file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not YAML ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: no options in this file; it needs at least skills")
    for section in (name for name, kind in get_type_hints(Config).items() if is_section(kind)):
        if not isinstance(found.get(section, {}), dict):
            raise UserError(
                f"{path}: {section}: '{found[section]}' should be options such as {section}: {{name: value}}"
            )
    for section in ("skills", "domains"):
        if not isinstance(found.get(section, []), list):
            raise UserError(
                f"{path}: {section}: should be a list of entries such as - {{name: sql, source: sql.jsonl}}"
            )
        for entry in found.get(section, []):
            if not isinstance(entry, dict):
                raise UserError(
                    f"{path}: {section}: '{entry}' should be an entry such as {{name: sql, source: sql.jsonl}}"
                )
    return found


def error_location(said: str, paths: Sequence[Path], given: Collection[str]) -> str:
    """Where the option stands that an error names, as `FILE, line 3: `; empty if it was given on the command line.

    given: names of those that were, as training.epochs.
    """
    if any(_mentions(said, name) for name in given):
        return ""
    found = [(name, path, line) for path in paths for name, line in _option_lines(path) if _mentions(said, name)]
    if found:  # the most particular one; of files the one that counts, which is the last
        parts = max(name.count(".") for name, _, _ in found)
        path, line = [(path, line) for name, path, line in found if name.count(".") == parts][-1]
        return f"{path}, line {line}: "
    return f"{paths[0]}: " if len(paths) == 1 and not given else ""


def _mentions(said: str, option: str) -> bool:
    """Whether a message names an option, in one word or by its parts."""
    return all(re.search(rf"(?<!\w){re.escape(part)}(?!\w)", said) for part in option.split("."))


def _option_lines(path: Path) -> Iterator[tuple[str, int]]:
    """Every option in a file, and its line."""
    node = yaml.compose(path.read_text(encoding="utf-8"), Loader=SafeLoader)
    sections = [("", node)]
    for prefix, section in sections:
        if isinstance(section, yaml.MappingNode) and prefix.count(".") < MAX_SECTION_DEPTH:
            for key, value in section.value:
                if isinstance(key, yaml.ScalarNode):
                    yield f"{prefix}{key.value}", key.start_mark.line + 1
                    sections.append((f"{prefix}{key.value}.", value))
