"""Train a finished run on one more skill: dylora add RUN SOURCE --name NAME."""

from __future__ import annotations

import sys

from dylora_mlx.cli.options import parse_add
from dylora_mlx.cli.parser import run_command


def command(argv: list[str]) -> int:
    folder, source, mode = parse_add(argv)
    # Imported after parsing: --help needs no MLX.
    from dylora_mlx.run import loop, run_folder
    from dylora_mlx.system import console

    with console.output_mode(mode):
        loop.learn_stream(run_folder.extend_run(folder, source))
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
