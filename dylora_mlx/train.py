"""Learn a stream of skills: python -m dylora_mlx.train [--config quickstart] [--section.option VALUE] [--resume RUN]"""

from __future__ import annotations

import sys

from dylora_mlx.cli import options as cli
from dylora_mlx.cli import parser as commands
from dylora_mlx.distributed import launcher as launched
from dylora_mlx.errors import UserError


def command(argv: list[str]) -> int:
    options = _parsed(argv)
    from dylora_mlx.distributed import group as ranks
    from dylora_mlx.run import folder as runs
    from dylora_mlx.run import loop
    from dylora_mlx.system import console  # only now: --help needs no MLX

    with console.speaking(options.mode if ranks.leads() else "silent"):
        run = runs.resume(options.folder) if options.resume else runs.begin(options)
        loop.learn_stream(run, options.estimate)
    return 0


def _parsed(argv: list[str]) -> cli.Options:
    """The options; of several ranks one may lack a file that they name, and all must know."""
    if launched.rank() is None:
        return cli.parse(argv)
    from dylora_mlx.distributed import group as ranks

    with ranks.group().agreed():
        options = cli.parse(argv)
        if options.estimate and ranks.group().size > 1:
            raise UserError("--estimate: times one process, not several ranks; leave it out")
        return options


def main(argv: list[str] | None = None) -> int:
    return commands.guarded(command, argv, parallel=True)


if __name__ == "__main__":
    sys.exit(main())
