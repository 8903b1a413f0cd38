"""Command lines of train, add, data, plan and estimate: YAML files, dotted overrides, and one-line errors."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal, NamedTuple

from dylora_mlx.cli.parser import Parser, check_run_name
from dylora_mlx.config import Config, Source
from dylora_mlx.config.load import build, config_from_files, to_yaml
from dylora_mlx.config.options import REMOVED, renamed, sections, type_name
from dylora_mlx.config.yaml_files import find_config, shipped_configs, split_config_arguments
from dylora_mlx.errors import UserError

PrintMode = Literal["text", "verbose", "quiet", "json"]
PRINT_MODES: dict[str, PrintMode] = {"--quiet": "quiet", "--json": "json"}
"""Print mode by command-line option."""
TRAINING_MODES: dict[str, PrintMode] = {**PRINT_MODES, "--verbose": "verbose", "-v": "verbose"}
"""The same for commands that train."""
EXAMPLES = """\
  python -m dylora_mlx.train                                   the quickstart on the embedded base
  python -m dylora_mlx.train --seed 1 --name second            another seed, into runs/second
  python -m dylora_mlx.train --config gemma3-270m              a shipped config (or a path to your own)
  python -m dylora_mlx.train --training.epochs 8 --model.rank 16
  python -m dylora_mlx.train --resume runs/quickstart          resume an interrupted run
  python -m dylora_mlx.train -v                                every figure of the run, not one screen
  python -m dylora_mlx.train --json > events.jsonl             for scripts: one event per line
"""
ADD_EXAMPLES = """\
  dylora add runs/quickstart notes.jsonl --name notes
  dylora add runs/my google-research-datasets/mbpp --name mbpp --preset mbpp --rank 16 --alpha 32
"""
PLAN_EXAMPLES = """\
  dylora plan my.yaml                                          similarities, decisions, parameters, memory and time
  dylora plan quickstart --growth.threshold 0.6                a shipped config, with another option
"""
DATA_EXAMPLES = """\
  dylora data my.yaml                                          every skill of a config: counts, and documents as they are learned
  dylora data notes.jsonl --prompt '{question} ' --completion '{answer}'     a source, with the options of dylora add
  dylora data notes.jsonl --model.base google/gemma-3-270m     the tokens of another base; its weights are not loaded
  dylora data my.yaml --show validation --docs 10              ten documents of the validation split
  dylora data my.yaml --json > documents.jsonl                 for scripts: one document per line, with ids and loss mask
"""
ESTIMATE_EXAMPLES = """\
  dylora estimate my.yaml                                      time, memory and disk, in about ten seconds
  dylora estimate quickstart --training.epochs 8 --json        a shipped config, with another option; for scripts
  python -m dylora_mlx.train --config my.yaml --estimate       the same, then the run, then a comparison at its end
"""


SOURCE_SETTINGS = ("data.", "model.base", "seed")
"""Beginnings of the options of a config that apply to a source alone."""


class TrainOptions(NamedTuple):
    """The parsed command line of `train` or `estimate`."""

    config: Config | None
    """None for an existing run folder, which has its own config."""
    folder: Path
    """Run folder."""
    resume: bool
    mode: PrintMode = "text"
    estimate: bool = False
    """Whether to print an estimate before training."""


class DataOptions(NamedTuple):
    """The parsed command line of `data`."""

    config: Config
    """The config to look at; for a source, one with that skill alone."""
    is_source: bool
    """Whether the command line named a source."""
    docs: int | None
    """Documents to show of each skill and split; None for the default."""
    show: list[str]
    """Splits to show documents of; empty for the default."""
    json: bool
    """Whether to print JSON objects instead of text."""


def parse_train(argv: list[str]) -> TrainOptions:
    """Parse the command line of train. Raises UserError with one line for any mistake; --help exits with 0."""
    mode = _print_mode(argv, TRAINING_MODES)
    if any(word == "--resume" or word.startswith("--resume=") for word in argv):
        return TrainOptions(None, _parse_resume([word for word in argv if word not in TRAINING_MODES]), True, mode)
    parser = Parser(
        "python -m dylora_mlx.train", "Train on a stream of skills; each new skill gets an expert.", EXAMPLES
    )
    add = parser.add_argument
    add("--config", help="YAML file, or name of a shipped config; may be repeated, later files override earlier ones")
    add("--name", help="name of the run folder (default: the config's name)")
    add("--runs", default="runs", help="parent folder of the run folder")
    add("--resume", help="run folder to resume from its newest checkpoint; takes no option but -v, --quiet and --json")
    add(
        "--estimate",
        action="store_true",
        help="print an estimate of time, memory and disk first, and compare it with the run at the end",
    )
    _add_print_mode(parser)
    add("--print_config", action="store_true", help="print every option as YAML and exit")
    _add_config_options(parser, Config)
    parser.usage = "python -m dylora_mlx.train [--config CONFIG] [--section.option VALUE ...] | --resume RUN"
    paths, remaining = split_config_arguments(argv)
    _reject_former_options(remaining, Config)
    values = parser.parse_args(remaining)
    config = config_from_files(paths, _overrides(Config, values))
    if values.print_config:
        print(to_yaml(config), end="")
        sys.exit(0)
    name = check_run_name(paths[-1].stem if values.name is None else values.name)
    return TrainOptions(config, Path(values.runs) / name, False, mode, values.estimate)


def parse_plan(argv: list[str]) -> Config:
    """Return the config to plan: the first word, or the quickstart, with overrides applied.

    Raises UserError; --help exits with 0.
    """
    parser = Parser("dylora plan", "Forecast a config without training: similarities, decisions, cost.", PLAN_EXAMPLES)
    return _parse_config_command(parser, argv)[0]


def parse_estimate(argv: list[str]) -> TrainOptions:
    """Return the config to estimate, or the run folder if the first word is one.

    Raises UserError; --help exits with 0.
    """
    parser = Parser("dylora estimate", "Estimate the time, memory and disk of a run.", ESTIMATE_EXAMPLES)
    parser.add_argument(
        "--runs", default="runs", help="folder that would hold the run; the speed of its disk is measured"
    )
    parser.add_argument("--quiet", action="store_true", help="print only warnings and errors")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    mode, words = _print_mode(argv, PRINT_MODES), [word for word in argv if word not in PRINT_MODES]
    folder = Path(words[0]).expanduser() if words else Path("quickstart")
    if folder.is_dir():
        if len(words) > 1:
            raise UserError(f"{words[1]}: a run is estimated with the settings that it had; give no option")
        return TrainOptions(None, folder, False, mode)
    config, values = _parse_config_command(parser, argv)
    return TrainOptions(config, Path(values.runs) / "estimated", False, mode)


def parse_add(argv: list[str]) -> tuple[Path, Source, PrintMode]:
    """Return the run folder, the source of the new skill and the print mode. Raises UserError; --help exits with 0."""
    parser = Parser("dylora add", "Train a finished run on one more skill.", ADD_EXAMPLES)
    parser.add_argument("run", help="run folder of a finished run")
    parser.add_argument(
        "source", help="packaged/NAME, a file, a pattern such as data/*.jsonl, a folder, or a hub data set"
    )
    _add_print_mode(parser)
    _add_config_options(parser, Source, exclude=("source",), has_config_file=False)
    parser.usage = "dylora add RUN SOURCE --name NAME [--option VALUE ...]"
    _reject_former_options(argv, Source)
    values = parser.parse_args(argv)
    source = build(Source, [{"source": values.source}], _overrides(Source, values, exclude=("source",)))
    return Path(values.run), source, _print_mode(argv, TRAINING_MODES)


def parse_data(argv: list[str]) -> DataOptions:
    """Return the config, or the source as a config, whose data are shown. Raises UserError; --help exits with 0."""
    parser = Parser("dylora data", "Show what would be learned from a config's skills, or a source.", DATA_EXAMPLES)
    add = parser.add_argument
    add(
        "what",
        metavar="CONFIG|SOURCE",
        help="YAML file, or name of a shipped config; or a source: packaged/NAME, a file, a folder, or a hub data set",
    )
    add("--docs", type=int, help="documents to show of each skill (default: 3; with --json all)")
    add(
        "--show", choices=["train", "validation", "test"], action="append", default=[],
        help="split to show documents of (may be repeated; default: train, with --json all three)",
    )  # fmt: skip
    add(
        "--json",
        action="store_true",
        help="print one JSON object per document instead of text: token ids, loss mask, parts",
    )
    add("--name", default=argparse.SUPPRESS, help="name of a source's skill (default: the name of its file or folder)")
    _add_config_options(parser, Source, exclude=("source", "name"), title="options of a source")
    _add_config_options(parser, Config, title="options of a config; with a source, only seed, model.base and data.*")
    parser.usage = "dylora data CONFIG|SOURCE [--option VALUE ...]"
    _reject_former_options(argv, Config)
    _reject_former_options(argv, Source)
    values = parser.parse_args(argv)
    if values.docs is not None and values.docs < 0:
        raise UserError(f"--docs {values.docs}: out of its range, 0 or more")
    of_source, of_config = _overrides(Source, values, exclude=("source",)), _overrides(Config, values)
    is_source = not _is_config(values.what)
    if is_source:
        for name in of_config:
            if not name.startswith(SOURCE_SETTINGS):
                raise UserError(f"--{name}: an option of a config; with a source, only seed, model.base and data.* are")
        config = _config_of_source(values.what, of_source, of_config)
    else:
        for name in of_source:
            hint = "; --show chooses the split to show" if name == "split" else ""
            raise UserError(f"--{name}: an option of a source; in a config it belongs to an entry of skills{hint}")
        config = config_from_files([find_config(values.what)], of_config)
    return DataOptions(config, is_source, values.docs, values.show, values.json)


def _is_config(word: str) -> bool:
    return Path(word).suffix.lower() in (".yaml", ".yml") or word in shipped_configs()


def source_name(word: str) -> str:
    """Return a name for the skill of a source: that of its file or folder, without characters that a name cannot have."""
    path = Path(word).expanduser()
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", (path.resolve() if path.exists() else path).name.partition(".")[0])
    return re.sub(r"^[^A-Za-z0-9]+", "", name)[:64].rstrip("-") or "data"


def _config_of_source(word: str, of_source: dict[str, str], of_config: dict[str, str]) -> Config:
    """Return a config with one skill, read from the source that a word names."""
    path = Path(word).expanduser()
    if not word.strip() or (re.fullmatch(r"[\w-]+", word) and not path.exists()):
        raise UserError(
            f"{word or 'the empty text'}: neither a config nor a source; give a YAML file, one of "
            f"{', '.join(shipped_configs())}, packaged/NAME, a file, a folder, or a hub data set as OWNER/NAME"
        )
    if (path / "config.yaml").is_file() and (path / "checkpoints").is_dir():
        raise UserError(f"{word}: a run folder; for the data that it learns from, give {path / 'config.yaml'}")
    source = build(Source, [{"source": word, "name": source_name(word)}], of_source)
    return build(Config, [{"skills": [asdict(source)], "growth": {"base_skill": None}}], of_config)


def _parse_config_command(parser: Parser, argv: list[str]) -> tuple[Config, argparse.Namespace]:
    """Return the config named by the first word, with overrides applied, and all parsed values."""
    parser.add_argument("config", nargs="?", default="quickstart", help="YAML file, or name of a shipped config")
    _add_config_options(parser, Config)
    parser.usage = f"{parser.prog} [CONFIG] [--section.option VALUE ...]"
    has_config_option = any(word.split("=")[0] == "--config" for word in argv)
    paths, remaining = split_config_arguments(argv) if has_config_option else ([], argv)
    _reject_former_options(remaining, Config)
    values = parser.parse_args(remaining)
    return config_from_files(paths or [find_config(values.config)], _overrides(Config, values)), values


def _add_config_options(
    parser: argparse.ArgumentParser,
    kind: type,
    exclude: Sequence[str] = (),
    has_config_file: bool = True,
    title: str = "options of the run",
) -> None:
    """Declare a command-line option for every option of a dataclass.

    Args:
        exclude: names of options to leave out.
        has_config_file: whether options may come from a file too; then none is required on the command line.
        title: heading, in the help, of the options outside any section.

    Values stay text: their meaning depends on the option's type.
    """
    for section in sections(kind):
        description = (section.type.__doc__ or "").split("\n")[0]
        group = parser.add_argument_group(section.prefix.removesuffix(".") or title, description.replace("%", "%%"))
        for option in section.options:
            if option.name in exclude:
                continue
            default = "must be given" if option.default is None else f"default: {option.default}"
            group.add_argument(
                f"--{option.name}", default=argparse.SUPPRESS, metavar=option.name.split(".")[-1].upper(),
                help=f"{option.help} ({type_name(option.type)}; {default})".replace("%", "%%"),
                required=option.default is None and not has_config_file,
            )  # fmt: skip


def _overrides(kind: type, values: argparse.Namespace, exclude: Sequence[str] = ()) -> dict[str, str]:
    """Return the text of the options given on the command line, by full name."""
    names = (option.name for section in sections(kind) for option in section.options)
    return {name: getattr(values, name) for name in names if name in vars(values) and name not in exclude}


def _reject_former_options(argv: Sequence[str], kind: type) -> None:
    """Raise UserError with the current name of an option that was renamed, or why one is gone."""
    for word in argv:
        name = word.removeprefix("--").partition("=")[0]
        if word.startswith("--") and (current_name := renamed(name, kind)):
            raise UserError(f"--{name} is now called --{current_name}")
        if word.startswith("--") and name in REMOVED:
            raise UserError(f"--{name}: no longer an option, {REMOVED[name]}; leave it out")


def _add_print_mode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--verbose", "-v", action="store_true",
        help="print every figure: similarities, the router's fit, steps, the loss matrix, test losses with intervals",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="print only warnings and errors")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON event per line instead of text, for scripts"
    )


def _print_mode(argv: list[str], options: dict[str, PrintMode]) -> PrintMode:
    """Return the print mode of a command line. Raises UserError if it names more than one."""
    modes: list[PrintMode] = [options[a] for a in argv if a in options]
    if len(set(modes)) > 1:
        named = " and ".join(dict.fromkeys(f"--{mode}" for mode in modes))
        raise UserError(f"{named}: one of them is enough; --json prints no other text")
    return modes[0] if modes else "text"


def _parse_resume(argv: list[str]) -> Path:
    folder = argv[0].removeprefix("--resume=") if len(argv) == 1 and "=" in argv[0] else argv[-1]
    if not folder or folder.startswith("--") or len(argv) != (1 if "=" in argv[0] else 2):
        raise UserError(
            "--resume takes one run folder and no other option but -v, --quiet or --json: a resumed run keeps its settings"
        )
    return Path(folder)
