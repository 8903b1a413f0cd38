"""The command line: options from the config's dataclasses, YAML files, dotted overrides; one line for a user's mistake."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from functools import cache
from pathlib import Path
from traceback import walk_tb
from typing import Literal, NamedTuple, get_type_hints

import yaml
from jsonargparse import (
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
    DefaultHelpFormatter,
    Namespace,
    set_loader,
    set_parsing_settings,
)

from dylora_mlx import commands
from dylora_mlx.config import Config, Source
from dylora_mlx.errors import UserError
from dylora_mlx.files import parse_yaml

Mode = Literal["text", "quiet", "json"]
MODES: dict[str, Mode] = {"--quiet": "quiet", "--json": "json"}
"""How a command speaks."""
CONFIGS = [Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs"]
EXAMPLES = """examples:
  python -m dylora_mlx.train                                   the quickstart on the embedded base
  python -m dylora_mlx.train --seed 1 --name second            another seed, into runs/second
  python -m dylora_mlx.train --config gemma3-270m              a shipped config (or a path to your own)
  python -m dylora_mlx.train --training.epochs 8 --model.rank 16
  python -m dylora_mlx.train --resume runs/quickstart          go on where a run was stopped
  python -m dylora_mlx.train --json > events.jsonl             for scripts: an event a line
"""
ADD_EXAMPLES = """examples:
  dylora add runs/quickstart notes.jsonl --name notes
  dylora add runs/my google-research-datasets/mbpp --name mbpp --preset mbpp --rank 16 --alpha 32
"""
PLAN_EXAMPLES = """examples:
  dylora plan my.yaml                                          similarities, decisions, parameters, memory and time
  dylora plan quickstart --growth.threshold 0.6                a shipped config, with another option
"""

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class Options(NamedTuple):
    """What `train` was asked for. config is None when a run is resumed: the run folder has its own."""

    config: Config | None
    folder: Path
    resume: bool
    yaml: str
    mode: Mode = "text"


class Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that leaves the lines of the examples as they are."""


@cache
def parser(plan: bool = False) -> ArgumentParser:
    """plan: the help is that of `dylora plan`, which takes the same options."""
    about = (
        "What a config would do, before any training."
        if plan
        else "Learn a stream of skills, one expert for each that is new."
    )
    made = ArgumentParser(
        prog="dylora plan" if plan else "python -m dylora_mlx.train",
        description=about,
        epilog=PLAN_EXAMPLES if plan else EXAMPLES,
        formatter_class=Formatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    made.add_argument("--config", action=ActionConfigFile, help="a YAML file, or the name of a shipped config")
    made.add_argument("--name", type=str, default=None, help="name of the run folder (default: the config's name)")
    made.add_argument("--runs", type=str, default="runs", help="folder that holds the runs")
    made.add_argument("--resume", type=str, default=None, help="run folder to go on with")
    _speaking(made)
    made.add_class_arguments(Config)
    return made


def parse(argv: list[str]) -> Options:
    """Read the command line. Raises UserError with one line for anything wrong with it; --help exits with 0."""
    made, mode = parser(), _mode(argv)
    if any(a == "--resume" or a.startswith("--resume=") for a in argv):
        return Options(None, _resumed([a for a in argv if a not in MODES]), True, "", mode)
    arguments, stem = _named_config(argv)
    try:
        values = made.parse_args(arguments)
        config = _config(made, values)
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(_section(error) + _one_line(error)) from error
    name = commands.run_name(stem if values.name is None else values.name)
    return Options(config, Path(values.runs) / name, False, as_yaml(config), mode)


def load_config(path: Path, changes: Sequence[str] = ()) -> Config:
    """The config of a run folder, with options changed as on a command line. Raises UserError when it cannot be read."""
    made = parser() if changes else _exact()
    if not path.is_file():
        raise UserError(f"{path}: missing; give a run folder")
    try:
        if changes:
            return _config(made, made.parse_args(["--config", str(path), *changes]))
        found = parse_yaml(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no options in this file")
        return _config(made, made.parse_object(found))
    except (ArgumentError, ValueError, TypeError, OSError) as error:
        where = f"{' '.join(changes)}: " if changes else f"{path}: "
        raise UserError(f"{where}{_section(error)}{_one_line(error)}") from error


@cache
def _exact() -> ArgumentParser:
    """Takes values as a file of our own has them: on a command line the text 1e3 is a number, there it is what it is."""

    def refuse(_: str) -> None:
        raise ValueError

    set_loader("exact", refuse, exceptions=(ValueError,))
    made = ArgumentParser(exit_on_error=False, parser_mode="exact")
    made.add_class_arguments(Config)
    return made


def parse_plan(argv: list[str]) -> Config:
    """The config of a plan: the options of `train`, the first word being a config if it is no option."""
    if {"-h", "--help"} & set(argv):
        parser(plan=True).parse_args(["--help"])
    first = ["--config", argv[0], *argv[1:]] if argv and not argv[0].startswith("-") else argv
    options = parse(first)
    if options.config is None:
        raise UserError("a plan is made of a config; a run that has begun is explained by dylora explain")
    return options.config


def parse_add(argv: list[str]) -> tuple[Path, Source, Mode]:
    """A run folder, one more skill, and how to speak. Raises UserError; --help exits with 0."""
    made = ArgumentParser(
        prog="dylora add", description="Teach one more skill to a run that has finished.", epilog=ADD_EXAMPLES,
        formatter_class=Formatter, exit_on_error=False, allow_abbrev=False,
    )  # fmt: skip
    made.add_argument("run", type=str, help="a run folder")
    made.add_argument("source", type=str, help="packaged/NAME, a .jsonl file, a folder, or a hub data set")
    _speaking(made)
    made.add_class_arguments(Source, skip={"source"})
    try:
        values = made.parse_args(argv)
        given = {name: values[name] for name in Source.__dataclass_fields__}
        return Path(values.run), Source(**given), _mode(argv)
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(f"{_one_line(error)}; see dylora add --help") from error


def _speaking(made: ArgumentParser) -> None:
    made.add_argument("--quiet", action="store_true", help="print warnings and errors alone")
    made.add_argument("--json", action="store_true", help="print an event a line, for scripts, instead of text")


def _config(made: ArgumentParser, values: Namespace) -> Config:
    made_objects = made.instantiate(values)
    return Config(**{name: made_objects[name] for name in Config.__dataclass_fields__})


def as_yaml(config: Config) -> str:
    """Every option, those that are null too: a run resumes with what it began with, not with the defaults."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def _mode(argv: list[str]) -> Mode:
    asked: list[Mode] = [MODES[a] for a in argv if a in MODES]
    if len(set(asked)) > 1:
        raise UserError("--quiet and --json: one of them is enough, JSON is quiet by itself")
    return asked[0] if asked else "text"


def _resumed(argv: list[str]) -> Path:
    folder = argv[0].removeprefix("--resume=") if len(argv) == 1 and "=" in argv[0] else argv[-1]
    if not folder or folder.startswith("--") or len(argv) != (1 if "=" in argv[0] else 2):
        raise UserError(
            "--resume takes one run folder and no other option but --quiet or --json: a run goes on with the settings it began with"
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
