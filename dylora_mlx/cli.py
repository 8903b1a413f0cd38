"""The command line: options from the config's dataclasses, YAML files, dotted overrides; one line for a user's mistake."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from functools import cache
from pathlib import Path
from traceback import walk_tb
from typing import NamedTuple, get_type_hints

import yaml
from jsonargparse import (
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
    DefaultHelpFormatter,
    Namespace,
    set_parsing_settings,
)

from dylora_mlx.config import Config
from dylora_mlx.errors import UserError

CONFIGS = [Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs"]
EXAMPLES = """examples:
  python -m dylora_mlx.train                                   the quickstart on the embedded base
  python -m dylora_mlx.train --seed 1 --name second            another seed, into runs/second
  python -m dylora_mlx.train --config gemma3-270m              a shipped config (or a path to your own)
  python -m dylora_mlx.train --training.epochs 8 --model.rank 16
  python -m dylora_mlx.train --resume runs/quickstart          go on where a run was stopped
"""

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class Options(NamedTuple):
    """What `train` was asked for. config is None when a run is resumed: the run folder has its own."""

    config: Config | None
    folder: Path
    resume: bool
    yaml: str


class Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that leaves the lines of the examples as they are."""


@cache
def parser() -> ArgumentParser:
    made = ArgumentParser(
        prog="python -m dylora_mlx.train",
        description="Learn a stream of skills, one expert for each that is new.",
        epilog=EXAMPLES,
        formatter_class=Formatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    made.add_argument("--config", action=ActionConfigFile, help="a YAML file, or the name of a shipped config")
    made.add_argument("--name", type=str, default=None, help="name of the run folder (default: the config's name)")
    made.add_argument("--runs", type=str, default="runs", help="folder that holds the runs")
    made.add_argument("--resume", type=str, default=None, help="run folder to go on with")
    made.add_class_arguments(Config)
    return made


def parse(argv: list[str]) -> Options:
    """Read the command line. Raises UserError with one line for anything wrong with it; --help exits with 0."""
    made = parser()
    if any(a == "--resume" or a.startswith("--resume=") for a in argv):
        return Options(None, _resumed(argv), True, "")
    arguments, stem = _named_config(argv)
    try:
        values = made.parse_args(arguments)
        config = _config(made, values)
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(_section(error) + _one_line(error)) from error
    name = run_name(stem if values.name is None else values.name)
    return Options(config, Path(values.runs) / name, False, as_yaml(config))


def load_config(path: Path, changes: Sequence[str] = ()) -> Config:
    """The config of a run folder, with options changed as on a command line. Raises UserError when it cannot be read."""
    made = parser()
    if not path.is_file():
        raise UserError(f"{path}: missing; give a run folder")
    try:
        return _config(made, made.parse_args(["--config", str(path), *changes]))
    except (ArgumentError, ValueError, TypeError, OSError) as error:
        where = f"{' '.join(changes)}: " if changes else f"{path}: "
        raise UserError(f"{where}{_section(error)}{_one_line(error)}") from error


def parse_plan(argv: list[str]) -> Config:
    """The config of a plan: the options of `train`, the first word being a config if it is no option."""
    first = ["--config", argv[0], *argv[1:]] if argv and not argv[0].startswith("-") else argv
    options = parse(first)
    if options.config is None:
        raise UserError("a plan is made of a config; a run that has begun is explained by dylora explain")
    return options.config


def _config(made: ArgumentParser, values: Namespace) -> Config:
    made_objects = made.instantiate(values)
    return Config(**{name: made_objects[name] for name in Config.__dataclass_fields__})


def as_yaml(config: Config) -> str:
    """Every option, those that are null too: a run resumes with what it began with, not with the defaults."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def _resumed(argv: list[str]) -> Path:
    folder = argv[0].removeprefix("--resume=") if len(argv) == 1 and "=" in argv[0] else argv[-1]
    if not folder or folder.startswith("--") or len(argv) != (1 if "=" in argv[0] else 2):
        raise UserError(
            "--resume takes one run folder and no other option: a run goes on with the settings it began with"
        )
    return Path(folder)


def _named_config(argv: list[str]) -> tuple[list[str], str]:
    """Replace names of shipped configs by their paths, and add the quickstart where no config is named.

    Returns the arguments and the last config's name.
    """
    arguments, stem, rest = [], "", list(argv)
    while rest:
        word = rest.pop(0)
        if word != "--config" and not word.startswith("--config="):
            arguments.append(word)
            continue
        if word == "--config" and not rest:
            raise UserError("--config needs a YAML file or the name of a shipped config")
        value = rest.pop(0) if word == "--config" else word.removeprefix("--config=")
        path = _path_of(value)
        _check_yaml(path)
        arguments, stem = [*arguments, "--config", str(path)], path.stem
    if not stem and not {"-h", "--help"} & set(argv):
        return ["--config", str(_path_of("quickstart")), *argv], "quickstart"
    return arguments, stem


def _path_of(config: str) -> Path:
    found = [folder / f"{config}.yaml" for folder in CONFIGS]
    path = next((p for p in (*found, Path(config).expanduser()) if p.is_file()), None)
    if path is None:
        shipped = sorted({p.stem for folder in CONFIGS for p in folder.glob("*.yaml")})
        raise UserError(f"{config or '--config'}: no such config file; shipped are {', '.join(shipped)}")
    return path


def _check_yaml(path: Path) -> None:
    """What the parser's own messages leave in the dark: which file cannot be read, and what a source looks like."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8; convert the file") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({_one_line(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: no options in this file; it needs at least skills")
    for section in ("data", "model", "growth", "training", "log"):
        if not isinstance(content.get(section, {}), dict):
            raise UserError(
                f"{path}: {section}: '{content[section]}' should be options such as {section}: {{name: value}}"
            )
    for section in ("skills", "domains"):
        if not isinstance(content.get(section, []), list):
            raise UserError(
                f"{path}: {section}: should be a list of entries such as - {{name: sql, source: sql.jsonl}}"
            )
        for entry in content.get(section, []):
            if not isinstance(entry, dict):
                raise UserError(
                    f"{path}: {section}: '{entry}' should be an entry such as {{name: sql, source: sql.jsonl}}"
                )


def run_name(name: str) -> str:
    if name in ("", ".", "..") or {"/", "\\"} & set(name) or not name.isprintable() or len(name.encode()) > 200:
        raise UserError(f"--name {name[:80]}: a plain folder name is needed (use --runs for the folder around it)")
    return name


def _section(error: BaseException | None) -> str:
    """`growth.rank.` for an error that this section of the config raised about itself: its checks know only their own
    options' names. Empty for all other errors."""
    found = ""
    while error is not None:
        for frame, _ in walk_tb(error.__traceback__):
            found = _SECTIONS.get(type(frame.f_locals.get("self")), found)
        error = error.__cause__ or error.__context__
    return found


def _prefixes(section: type, prefix: str = "") -> dict[type, str]:
    """Of every section of the config, by its class."""
    found = {section: prefix}
    for name, kind in get_type_hints(section).items():
        found |= _prefixes(kind, f"{prefix}{name}.") if is_dataclass(kind) and isinstance(kind, type) else {}
    return found


_SECTIONS = _prefixes(Config)


def _one_line(error: BaseException) -> str:
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return text[:600] or type(error).__name__


def guarded(work: Callable[[list[str]], int], argv: list[str] | None = None) -> int:
    """Run a command; print a user's mistake as one line and return 2, an interrupt as one line and return 130; a reader of
    our output that is gone is no error to speak of (141)."""
    try:
        return work(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has had enough; the interpreter must not try to write the rest at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
