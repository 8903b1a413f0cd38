"""Forecast a config without training: dylora plan CONFIG [--section.option VALUE]."""

from __future__ import annotations

import sys
from pathlib import Path

from dylora_mlx.cli.options import parse_plan
from dylora_mlx.cli.parser import run_command


def command(argv: list[str]) -> int:
    config = parse_plan(argv)
    # Imported after parsing: --help needs no MLX.
    from dylora_mlx.run import forecast
    from dylora_mlx.run.build import build_run

    forecast.forecast(build_run(config, Path("."), None))
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
