"""The command line: options from the config's dataclasses, YAML files, dotted overrides; one line for a user's mistake."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from dylora_mlx.cli.parser import Parser, check_run_name
from dylora_mlx.config import Config, Source
from dylora_mlx.config.load import build, config_from_files, to_yaml
from dylora_mlx.config.options import renamed, sections, type_name
from dylora_mlx.config.yaml_files import find_config, split_config_arguments
from dylora_mlx.errors import UserError

PrintMode = Literal["text", "quiet", "json"]
PRINT_MODES: dict[str, PrintMode] = {"--quiet": "quiet", "--json": "json"}
"""How a command prints, by its option."""
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


class TrainOptions(NamedTuple):
    """What `train` or `estimate` was asked for."""

    config: Config | None
    """None for a run folder that exists: it has its own."""
    folder: Path
    """Of the run."""
    resume: bool
    mode: PrintMode = "text"
    estimate: bool = False
    """Print an estimate first."""


def parse_train(argv: list[str]) -> TrainOptions:
    """Read the command line. Raises UserError with one line for anything wrong with it; --help exits with 0."""
    mode = _print_mode(argv)
    if any(word == "--resume" or word.startswith("--resume=") for word in argv):
        return TrainOptions(None, _parse_resume([word for word in argv if word not in PRINT_MODES]), True, mode)
    parser = Parser(
        "python -m dylora_mlx.train", "Learn a stream of skills, one expert for each that is new.", EXAMPLES
    )
    add = parser.add_argument
    add("--config", help="a YAML file, or the name of a shipped config; later ones override earlier ones")
    add("--name", help="name of the run folder (default: the config's name)")
    add("--runs", default="runs", help="folder that holds the runs")
    add("--resume", help="run folder to go on with")
    add("--estimate", action="store_true", help="print first what the run will take, and at the end what it took")
    _add_print_mode(parser)
    add("--print_config", action="store_true", help="print every option as YAML, and exit")
    _add_config_options(parser, Config)
    parser.usage = "python -m dylora_mlx.train [--config CONFIG] [--section.option VALUE ...] | --resume RUN"
    paths, rest = split_config_arguments(argv)
    _refuse_old_names(rest, Config)
    values = parser.parse_args(rest)
    config = config_from_files(paths, _overrides(Config, values))
    if values.print_config:
        print(to_yaml(config), end="")
        sys.exit(0)
    name = check_run_name(paths[-1].stem if values.name is None else values.name)
    return TrainOptions(config, Path(values.runs) / name, False, mode, values.estimate)


def parse_plan(argv: list[str]) -> Config:
    """The config to plan: the first word, or the quickstart, with options changed.

    Raises UserError; --help exits with 0.
    """
    parser = Parser("dylora plan", "What a config would do, before any training.", PLAN_EXAMPLES)
    return _parse_config_command(parser, argv)[0]


def parse_estimate(argv: list[str]) -> TrainOptions:
    """The config to estimate; or, where the first word is a run folder, that folder and no config.

    Raises UserError; --help exits with 0.
    """
    parser = Parser("dylora estimate", "Time, memory and disk that a run will take.", ESTIMATE_EXAMPLES)
    parser.add_argument("--runs", default="runs", help="folder that would hold the run: its disk is timed")
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors alone")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    mode, rest = _print_mode(argv), [word for word in argv if word not in PRINT_MODES]
    folder = Path(rest[0]).expanduser() if rest else Path("quickstart")
    if folder.is_dir():
        if len(rest) > 1:
            raise UserError(f"{rest[1]}: a run is estimated with the settings that it had; give no option")
        return TrainOptions(None, folder, False, mode)
    config, values = _parse_config_command(parser, argv)
    return TrainOptions(config, Path(values.runs) / "estimated", False, mode)


def parse_add(argv: list[str]) -> tuple[Path, Source, PrintMode]:
    """A run folder, one more skill, and how to print. Raises UserError; --help exits with 0."""
    parser = Parser("dylora add", "Teach one more skill to a run that has finished.", ADD_EXAMPLES)
    parser.add_argument("run", help="a run folder")
    parser.add_argument("source", help="packaged/NAME, a .jsonl file, a folder, or a hub data set")
    _add_print_mode(parser)
    _add_config_options(parser, Source, given=("source",), file=False)
    parser.usage = "dylora add RUN SOURCE --name NAME [--option VALUE ...]"
    _refuse_old_names(argv, Source)
    values = parser.parse_args(argv)
    source = build(Source, [{"source": values.source}], _overrides(Source, values, given=("source",)))
    return Path(values.run), source, _print_mode(argv)


def _parse_config_command(parser: Parser, argv: list[str]) -> tuple[Config, argparse.Namespace]:
    """The config that the first word names, with options changed, and all values that were given."""
    parser.add_argument("config", nargs="?", default="quickstart", help="a YAML file, or the name of a shipped config")
    _add_config_options(parser, Config)
    parser.usage = f"{parser.prog} [CONFIG] [--section.option VALUE ...]"
    named = any(word.split("=")[0] == "--config" for word in argv)
    paths, rest = split_config_arguments(argv) if named else ([], argv)
    _refuse_old_names(rest, Config)
    values = parser.parse_args(rest)
    return config_from_files(paths or [find_config(values.config)], _overrides(Config, values)), values


def _add_config_options(
    parser: argparse.ArgumentParser, kind: type, given: Sequence[str] = (), file: bool = True
) -> None:
    """Declare every option of a dataclass but the given ones. Values stay text: what it means depends on the option.

    file: options may come from a file too, so the command line must have none of them.
    """
    for section in sections(kind):
        about = (section.type.__doc__ or "").split("\n")[0]
        title = section.prefix.removesuffix(".") or "options of the run"
        group = parser.add_argument_group(title, about.replace("%", "%%"))
        for option in section.options:
            if option.name in given:
                continue
            default = "must be given" if option.default is None else f"default: {option.default}"
            group.add_argument(
                f"--{option.name}", default=argparse.SUPPRESS, metavar=option.name.split(".")[-1].upper(),
                help=f"{option.help} ({type_name(option.type)}; {default})".replace("%", "%%"),
                required=option.default is None and not file,
            )  # fmt: skip


def _overrides(kind: type, values: argparse.Namespace, given: Sequence[str] = ()) -> dict[str, str]:
    """The options that a command line has, as text by full name."""
    names = (option.name for section in sections(kind) for option in section.options)
    return {name: getattr(values, name) for name in names if name in vars(values) and name not in given}


def _refuse_old_names(argv: Sequence[str], kind: type) -> None:
    """Raises UserError with the new name of an option that is called otherwise now."""
    for word in argv:
        name = word.removeprefix("--").partition("=")[0]
        if word.startswith("--") and (new := renamed(name, kind)):
            raise UserError(f"--{name} is now called --{new}")


def _add_print_mode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors alone")
    parser.add_argument("--json", action="store_true", help="print an event a line, for scripts, instead of text")


def _print_mode(argv: list[str]) -> PrintMode:
    asked: list[PrintMode] = [PRINT_MODES[a] for a in argv if a in PRINT_MODES]
    if len(set(asked)) > 1:
        raise UserError("--quiet and --json: one of them is enough, JSON is quiet by itself")
    return asked[0] if asked else "text"


def _parse_resume(argv: list[str]) -> Path:
    folder = argv[0].removeprefix("--resume=") if len(argv) == 1 and "=" in argv[0] else argv[-1]
    if not folder or folder.startswith("--") or len(argv) != (1 if "=" in argv[0] else 2):
        raise UserError(
            "--resume takes one run folder and no other option but --quiet or --json: a run goes on with the settings it began with"
        )
    return Path(folder)
