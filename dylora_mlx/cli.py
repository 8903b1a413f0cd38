"""The command line: options from the config's dataclasses, YAML files, dotted overrides; one line for a user's mistake."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace

from dylora_mlx.config import Config
from dylora_mlx.errors import UserError

CONFIGS = [Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs"]
EXAMPLES = """examples:
  python -m dylora_mlx.train                                   the quickstart: four skills on the embedded base
  python -m dylora_mlx.train --seed 1 --name second            another seed, into runs/second
  python -m dylora_mlx.train --config gemma3-270m              a shipped config (or a path to your own)
  python -m dylora_mlx.train --training.epochs 8 --model.rank 16
  python -m dylora_mlx.train --resume runs/quickstart          go on where a run was stopped
"""


class Options(NamedTuple):
    """What `train` was asked for. config is None when a run is resumed: the run folder has its own."""

    config: Config | None
    folder: Path
    resume: bool
    yaml: str


def parser() -> ArgumentParser:
    made = ArgumentParser(
        prog="python -m dylora_mlx.train",
        description="Learn a stream of skills, one expert for each that is new.",
        epilog=EXAMPLES,
        exit_on_error=False,
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
        raise UserError(_one_line(error)) from error
    return Options(config, Path(values.runs) / _run_name(values.name or stem), False, _yaml(made, values))


def load_config(path: Path) -> Config:
    """The config of a run folder. Raises UserError when it cannot be read."""
    made = parser()
    try:
        return _config(made, made.parse_path(str(path)))
    except (ArgumentError, ValueError, TypeError, OSError) as error:
        raise UserError(f"{path}: {_one_line(error)}") from error


def _config(made: ArgumentParser, values: Namespace) -> Config:
    made_objects = made.instantiate_classes(values)
    return Config(**{name: made_objects[name] for name in Config.__dataclass_fields__})


def _yaml(made: ArgumentParser, values: Namespace) -> str:
    kept = values.clone()
    for name in ("config", "name", "runs", "resume"):
        kept.pop(name, None)
    return made.dump(kept, skip_validation=True)


def _resumed(argv: list[str]) -> Path:
    folder = argv[0].removeprefix("--resume=") if len(argv) == 1 and "=" in argv[0] else argv[-1]
    if folder.startswith("--") or len(argv) != (1 if "=" in argv[0] else 2):
        raise UserError(
            "--resume takes one run folder and no other option: a run goes on with the settings it began with"
        )
    return Path(folder)


def _named_config(argv: list[str]) -> tuple[list[str], str]:
    """Replace the name of a shipped config by its path, and add the quickstart where none is named."""
    given = [i for i, a in enumerate(argv) if a == "--config" or a.startswith("--config=")]
    if not given:
        if {"-h", "--help"} & set(argv):
            return argv, "quickstart"
        return ["--config", _path_of("quickstart"), *argv], "quickstart"
    joined = " ".join(argv[given[0] : given[0] + 2]).replace("=", " ", 1).split(" ")
    if len(joined) < 2:
        raise UserError("--config needs a YAML file or the name of a shipped config")
    value, width = joined[1], 1 if "=" in argv[given[0]] else 2
    return [*argv[: given[0]], "--config", _path_of(value), *argv[given[0] + width :]], Path(value).stem


def _path_of(config: str) -> str:
    found = [folder / f"{config}.yaml" for folder in CONFIGS]
    path = next((p for p in (*found, Path(config)) if p.is_file()), None)
    if path is None:
        shipped = sorted({p.stem for folder in CONFIGS for p in folder.glob("*.yaml")})
        raise UserError(f"{config}: no such config file; shipped are {', '.join(shipped)}")
    return str(path)


def _run_name(name: str) -> str:
    if not name or name in (".", "..") or "/" in name or "\\" in name:
        raise UserError(f"--name {name}: a plain folder name is needed (use --runs for the folder around it)")
    return name


def _one_line(error: BaseException) -> str:
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return text[:600] or type(error).__name__


def guarded(work: Callable[[list[str]], int], argv: list[str] | None = None) -> int:
    """Run a command; print a user's mistake as one line and return 2, an interrupt as one line and return 130."""
    try:
        return work(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
