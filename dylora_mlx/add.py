"""Teach one more skill to a run that has finished: dylora add RUN SOURCE --name NAME."""

from __future__ import annotations

import sys

from dylora_mlx.cli import options as cli
from dylora_mlx.cli import parser as commands


def command(argv: list[str]) -> int:
    folder, source, mode = cli.parse_add(argv)
    from dylora_mlx.run import folder as runs
    from dylora_mlx.run import loop
    from dylora_mlx.system import console  # only now: --help needs no MLX

    with console.speaking(mode):
        loop.learn_stream(runs.extend(folder, source))
    return 0


def main(argv: list[str] | None = None) -> int:
    return commands.guarded(command, argv)


if __name__ == "__main__":
    sys.exit(main())
