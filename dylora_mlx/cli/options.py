"""The command line: options from the config's dataclasses, YAML files, dotted overrides; one line for a user's mistake."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from dylora_mlx.cli import parser as commands
from dylora_mlx.config import Config, Source
from dylora_mlx.config import yaml_files as config_files
from dylora_mlx.config.options import Option, in_words, is_section, sections
from dylora_mlx.errors import UserError
from dylora_mlx.system.files import parse_yaml, too_deep

Mode = Literal["text", "quiet", "json"]
MODES: dict[str, Mode] = {"--quiet": "quiet", "--json": "json"}
"""How a command speaks."""
EXAMPLES = """\
  python -m dylora_mlx.train                                   the quickstart on the embedded base
  python -m dylora_mlx.train --seed 1 --name second            another seed, into runs/second
  python -m dylora_mlx.train --config gemma3-270m              a shipped config (or a path to your own)
  python -m dylora_mlx.train --training.epochs 8 --model.rank 16
  python -m dylora_mlx.train --resume runs/quickstart          go on where a run was stopped
  python -m dylora_mlx.train --json > events.jsonl             for scripts: an event a line
"""
ADD_EXAMPLES = """\
  dylora add runs/quickstart notes.jsonl --name notes
  dylora add runs/my google-research-datasets/mbpp --name mbpp --preset mbpp --rank 16 --alpha 32
"""
PLAN_EXAMPLES = """\
  dylora plan my.yaml                                          similarities, decisions, parameters, memory and time
  dylora plan quickstart --growth.threshold 0.6                a shipped config, with another option
"""
ESTIMATE_EXAMPLES = """\
  dylora estimate my.yaml                                      time, memory and disk, in about ten seconds
  dylora estimate quickstart --training.epochs 8 --json        a shipped config, with another option; for scripts
  python -m dylora_mlx.train --config my.yaml --estimate       the same, then the run, and at its end both side by side
"""
Made = TypeVar("Made", Config, Source)


class Options(NamedTuple):
    """What `train` was asked for. config is None when a run is resumed: the run folder has its own; estimate: say first
    what it will take."""

    config: Config | None
    folder: Path
    resume: bool
    yaml: str
    mode: Mode = "text"
    estimate: bool = False


def parse(argv: list[str]) -> Options:
    """Read the command line. Raises UserError with one line for anything wrong with it; --help exits with 0."""
    mode = _mode(argv)
    if any(a == "--resume" or a.startswith("--resume=") for a in argv):
        return Options(None, _resumed([a for a in argv if a not in MODES]), True, "", mode)
    made = commands.Parser(
        "python -m dylora_mlx.train", "Learn a stream of skills, one expert for each that is new.", EXAMPLES
    )
    made.add_argument("--config", help="a YAML file, or the name of a shipped config; later ones override earlier ones")
    made.add_argument("--name", help="name of the run folder (default: the config's name)")
    made.add_argument("--runs", default="runs", help="folder that holds the runs")
    made.add_argument("--resume", help="run folder to go on with")
    made.add_argument(
        "--estimate", action="store_true", help="say first what the run will take, and at the end what it took"
    )
    _speaking(made)
    made.add_argument("--print_config", action="store_true", help="print every option as YAML, and leave")
    _declare(made, Config)
    made.usage = "python -m dylora_mlx.train [--config CONFIG] [--section.option VALUE ...] | --resume RUN"
    paths, rest = config_files.named(argv)
    values = made.parse_args(rest)
    config = _of_files(paths, values)
    if values.print_config:
        print(as_yaml(config), end="")
        sys.exit(0)
    name = commands.run_name(paths[-1].stem if values.name is None else values.name)
    return Options(config, Path(values.runs) / name, False, as_yaml(config), mode, values.estimate)


def parse_plan(argv: list[str]) -> Config:
    """The config of a plan: the first word, or the quickstart, with options changed. Raises UserError; --help exits with 0."""
    made = commands.Parser("dylora plan", "What a config would do, before any training.", PLAN_EXAMPLES)
    return _before_a_run(made, argv)[0]


def parse_estimate(argv: list[str]) -> Options:
    """What is to be estimated, as a run would begin; or without a config, the run folder that is compared.

    Raises UserError; --help exits with 0.
    """
    made = commands.Parser("dylora estimate", "Time, memory and disk that a run will take.", ESTIMATE_EXAMPLES)
    made.add_argument("--runs", default="runs", help="folder that would hold the run: its disk is timed")
    made.add_argument("--quiet", action="store_true", help="print warnings and errors alone")
    made.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    mode, rest = _mode(argv), [word for word in argv if word not in MODES]
    folder = Path(rest[0]).expanduser() if rest else Path("quickstart")
    if folder.is_dir():
        if len(rest) > 1:
            raise UserError(f"{rest[1]}: a run is estimated with the settings that it had; give no option")
        return Options(None, folder, False, "", mode)
    config, values = _before_a_run(made, argv)
    return Options(config, Path(values.runs) / "estimated", False, "", mode)


def _before_a_run(made: commands.Parser, argv: list[str]) -> tuple[Config, argparse.Namespace]:
    """The config that the first word names, with options changed, and all that was given."""
    made.add_argument("config", nargs="?", default="quickstart", help="a YAML file, or the name of a shipped config")
    _declare(made, Config)
    made.usage = f"{made.prog} [CONFIG] [--section.option VALUE ...]"
    paths, rest = config_files.named(argv) if any(a.split("=")[0] == "--config" for a in argv) else ([], argv)
    values = made.parse_args(rest)
    return _of_files(paths or [config_files.path_of(values.config)], values), values


def parse_add(argv: list[str]) -> tuple[Path, Source, Mode]:
    """A run folder, one more skill, and how to speak. Raises UserError; --help exits with 0."""
    made = commands.Parser("dylora add", "Teach one more skill to a run that has finished.", ADD_EXAMPLES)
    made.add_argument("run", help="a run folder")
    made.add_argument("source", help="packaged/NAME, a .jsonl file, a folder, or a hub data set")
    _speaking(made)
    _declare(made, Source, given=("source",), file=False)
    made.usage = "dylora add RUN SOURCE --name NAME [--option VALUE ...]"
    values = made.parse_args(argv)
    return Path(values.run), _made(Source, [{"source": values.source}], values), _mode(argv)


def load_config(path: Path, changes: Iterable[str] = ()) -> Config:
    """The config of a run folder, with options changed as on a command line: growth.threshold=0.7.

    Raises UserError when it cannot be read, or for a change that is no option.
    """
    if not path.is_file():
        raise UserError(f"{path}: missing; give a run folder")
    made = commands.Parser("dylora", None, "")
    _declare(made, Config)
    values = made.parse_args([f"--{change}" for change in changes])
    return _of_files([path], values)


def as_yaml(config: Config) -> str:
    """Every option, those that are null too: a run resumes with what it began with, not with the defaults."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def _declare(made: argparse.ArgumentParser, kind: type, given: Sequence[str] = (), file: bool = True) -> None:
    """Every option of a dataclass but the given ones, taken as text: what it means depends on its type. file: options may
    come from a file, so none is required."""
    for section in sections(kind):
        about = (section.kind.__doc__ or "").split("\n")[0]
        group = made.add_argument_group(
            section.prefix.removesuffix(".") or "options of the run", about.replace("%", "%%")
        )
        for option in section.options:
            if option.name in given:
                continue
            default = "must be given" if option.default is None else f"default: {option.default}"
            told = f"{option.about} ({in_words(option.kind)}; {default})".replace("%", "%%")
            group.add_argument(
                f"--{option.name}", default=argparse.SUPPRESS, metavar=option.name.split(".")[-1].upper(), help=told,
                required=option.default is None and not file,
            )  # fmt: skip


def _of_files(paths: Sequence[Path], values: argparse.Namespace) -> Config:
    """The options of files and, over them, those of the command line. A mistake in a file is told with its line."""
    trees = [config_files.content(path) for path in paths]
    try:
        return _made(Config, trees, values)
    except UserError as error:
        raise UserError(f"{config_files.place(str(error), paths, _given(Config, values))}{error}") from error


def _given(kind: type, values: argparse.Namespace) -> list[str]:
    """Names of the options that a command line has."""
    return [option.name for section in sections(kind) for option in section.options if option.name in vars(values)]


def _made(kind: type[Made], trees: Sequence[dict[str, Any]], values: argparse.Namespace) -> Made:
    """The options of some trees and, over them, those of the command line."""
    from dylora_mlx.config import validate as typed  # only now: --help needs no parser of types

    tree: dict[str, Any] = {}
    for found in trees:
        _merge(tree, found, kind)
    for section in sections(kind):
        for option in section.options:
            if option.name in vars(values):
                _set(tree, option.name.split("."), _value(option, getattr(values, option.name)))
    try:
        return typed.made(kind, tree)
    except ValueError as error:
        raise UserError(str(error)) from error


def _value(option: Option, text: str) -> Any:
    """Text of a command line, for an option of this type: where text is wanted it stays text."""
    kinds = get_args(option.kind) if get_origin(option.kind) in (Union, UnionType) else (option.kind,)
    named = {value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)}
    try:
        if too_deep(text):
            raise ValueError("nested too deeply")
        if text in named or (str in kinds and not (text == "null" and type(None) in kinds)):
            return text
        return parse_yaml(text)
    except ValueError as error:
        raise UserError(f"--{option.name} {text[:80]}: {error}") from error


def _merge(into: dict[str, Any], found: dict[str, Any], kind: type) -> None:
    """Later options over earlier ones; lists and sources are replaced as a whole."""
    hints = get_type_hints(kind)
    for name, value in found.items():
        section = hints.get(name)
        if is_section(section) and isinstance(value, dict):
            kept = into.setdefault(name, {})
            _merge(kept, value, section)
        else:
            into[name] = value


def _set(tree: dict[str, Any], names: list[str], value: Any) -> None:
    for name in names[:-1]:
        tree = tree.setdefault(name, {})
    tree[names[-1]] = value


def _speaking(made: argparse.ArgumentParser) -> None:
    made.add_argument("--quiet", action="store_true", help="print warnings and errors alone")
    made.add_argument("--json", action="store_true", help="print an event a line, for scripts, instead of text")


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
