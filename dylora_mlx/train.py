"""Learn a stream of skills: python -m dylora_mlx.train [--config quickstart] [--section.option VALUE] [--resume RUN]"""

from __future__ import annotations

import sys

from dylora_mlx import cli, commands


def command(argv: list[str]) -> int:
    options = cli.parse(argv)
    from dylora_mlx import console, loop, runs  # only now: --help needs no MLX

    with console.speaking(options.mode):
        loop.learn_stream(runs.resume(options.folder) if options.resume else runs.begin(options), options.estimate)
    return 0


def main(argv: list[str] | None = None) -> int:
    return commands.guarded(command, argv)


if __name__ == "__main__":
    sys.exit(main())
