"""What a config would do, before any training: python -m dylora_mlx.plan CONFIG [--section.option VALUE]."""

from __future__ import annotations

import sys
from pathlib import Path

from dylora_mlx import cli, commands


def command(argv: list[str]) -> int:
    config = cli.parse_plan(argv)
    from dylora_mlx import assembly, forecast  # only now: --help needs no MLX

    forecast.plan(assembly.assemble(config, Path("."), None))
    return 0


def main(argv: list[str] | None = None) -> int:
    return commands.guarded(command, argv)


if __name__ == "__main__":
    sys.exit(main())
