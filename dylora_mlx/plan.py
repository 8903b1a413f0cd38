"""What a config would do, before any training: python -m dylora_mlx.plan CONFIG [--section.option VALUE]."""

from __future__ import annotations

import sys
from pathlib import Path

from dylora_mlx.cli import options as cli
from dylora_mlx.cli import parser as commands


def command(argv: list[str]) -> int:
    config = cli.parse_plan(argv)
    from dylora_mlx.run import build as assembly  # only now: --help needs no MLX
    from dylora_mlx.run import forecast

    forecast.plan(assembly.assemble(config, Path("."), None))
    return 0


def main(argv: list[str] | None = None) -> int:
    return commands.guarded(command, argv)


if __name__ == "__main__":
    sys.exit(main())
