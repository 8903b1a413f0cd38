"""Local paths among the options, made absolute, so that a run works from any folder.

A path in a config file is looked for in the folder of that file, then in the current folder; one from the command line only
in the current folder. Names are no paths and stay as they are: `packaged/NAME`, `embedded`, hub ids, chat templates.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from dylora_mlx.config import CHAT_TEMPLATES, Config, Source

_SOURCE: dict[str, Any] = {"source": "source"}
_RULES: dict[str, Any] = {
    "skills": [_SOURCE],
    "domains": [_SOURCE],
    "data": {"chat_template": "template"},
    "model": {"base": "base"},
    "growth": {
        "base_skill": _SOURCE,
        "projection": "file",
        "rank": {"schedule": "file"},
        "bandit": {"history": ["file"]},
    },
}
"""Options that may be local paths, nested as in a config, with the kind of each; a list stands for its entries."""
_FILE_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".md", ".gz", ".jinja", ".gguf")
"""Endings of files that are no endings of hub ids."""


def resolve_options(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the options of a config file in `folder` with absolute local paths. Values of wrong types stay as they are."""
    return _change(_RULES, options, partial(_resolve, folder=folder))


def resolve_option(name: str, value: Any) -> Any:
    """Return the value of an option that the command line gives by its full name, with absolute local paths."""
    rule: Any = _RULES
    for part in name.split("."):
        rule = rule.get(part) if isinstance(rule, dict) else None
    return _change(rule, value, partial(_resolve, folder=Path()))


def resolve_config(config: Config) -> Config:
    """Return a config with local paths made absolute, relative ones from the current folder."""
    options = resolve_options(asdict(config), Path())
    growth, changed = config.growth, options["growth"]
    return replace(
        config,
        skills=[Source(**source) for source in options["skills"]],
        domains=[Source(**source) for source in options["domains"]],
        data=replace(config.data, chat_template=options["data"]["chat_template"]),
        model=replace(config.model, base=options["model"]["base"]),
        growth=replace(
            growth,
            base_skill=growth.base_skill and Source(**changed["base_skill"]),
            projection=changed["projection"],
            rank=replace(growth.rank, schedule=changed["rank"]["schedule"]),
            bandit=replace(growth.bandit, history=changed["bandit"]["history"]),
        ),
    )


def resolve_source(source: Source) -> Source:
    """Return a source whose local path is absolute, a relative one from the current folder."""
    return replace(source, source=_resolve("source", source.source, Path()))


def resolve_base(name: str) -> str:
    """Return the base `name` with an absolute path if it is a local folder or file, a relative one from the current folder."""
    return _resolve("base", name, Path())


def without_folders(config: Config) -> dict[str, Any]:
    """Return all options, with absolute paths cut to their last part: machines may keep the same files in different places."""
    return _change(_RULES, asdict(config), lambda _, text: Path(text).name if os.path.isabs(text) else text)


def _change(rule: Any, value: Any, change: Callable[[str, str], str]) -> Any:
    """Apply `change` to every text in `value` that the rule names, with its kind."""
    if isinstance(rule, dict):
        if not isinstance(value, dict):
            return value
        return {name: _change(rule.get(name), entry, change) for name, entry in value.items()}
    if isinstance(rule, list):
        return [_change(rule[0], entry, change) for entry in value] if isinstance(value, list) else value
    return change(rule, value) if isinstance(rule, str) and isinstance(value, str) else value


def _resolve(kind: str, text: str, folder: Path) -> str:
    is_name = {
        "source": text.startswith("packaged/"),
        "base": text == "embedded",
        "template": text in CHAT_TEMPLATES or is_template_text(text),
    }
    if is_name.get(kind) or not text.strip():
        return text
    try:
        path = Path(text).expanduser()
    except RuntimeError:  # ~NAME of a user that does not exist
        return text
    folders = [_absolute(folder), os.getcwd()]
    # Unlike Path.exists, os.path.exists is false for a name that no file can have.
    existing_path = next((place for start in folders if os.path.exists(place := os.path.join(start, path))), None)
    if existing_path is not None:
        return _absolute(Path(existing_path))
    if kind == "source" and glob.has_magic(text):
        patterns = [os.path.join(glob.escape(start), path) for start in folders]
        return next(filter(_matches, patterns), patterns[0])
    return text if kind in ("source", "base") and _may_be_hub_id(text) else _absolute(Path(folders[0], path))


def is_template_text(text: str) -> bool:
    """Return whether a value of data.chat_template is the text of a template rather than a name or a file."""
    return "{%" in text or "{{" in text


def _matches(pattern: str) -> bool:
    """Return whether there are files that a pattern such as data/*.jsonl names."""
    try:
        return next(glob.iglob(pattern, recursive=True), None) is not None
    except ValueError:  # a name that no file can have
        return False


def _may_be_hub_id(text: str) -> bool:
    """Return whether a text that is no path here may be a hub id, OWNER/NAME."""
    return (
        text.count("/") == 1
        and not text.startswith((".", "/", "~"))
        and Path(text).suffix.lower() not in _FILE_SUFFIXES
    )


def _absolute(path: Path) -> str:
    """Return a path from the root, without `..` where that leads to the same place: a folder before it may be a link."""
    absolute = os.fspath(path.absolute())
    normal = os.path.normpath(absolute)
    if os.path.exists(absolute) and not (os.path.exists(normal) and os.path.samefile(absolute, normal)):
        return absolute
    return normal
