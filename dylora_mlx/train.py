"""Learn a stream of skills: python -m dylora_mlx.train [--config quickstart] [--section.option VALUE] [--resume RUN]"""

from __future__ import annotations

import sys

from dylora_mlx.cli.options import TrainOptions, parse_train
from dylora_mlx.cli.parser import run_command
from dylora_mlx.distributed import launcher
from dylora_mlx.errors import UserError


def command(argv: list[str]) -> int:
    options = _parsed(argv)
    from dylora_mlx.distributed.group import is_main_process
    from dylora_mlx.run import loop, run_folder
    from dylora_mlx.system import console  # only now: --help needs no MLX

    with console.output_mode(options.mode if is_main_process() else "silent"):
        config, folder = options.config, options.folder
        run = run_folder.resume_run(folder) if config is None else run_folder.start_run(config, folder)
        loop.learn_stream(run, options.estimate)
    return 0


def _parsed(argv: list[str]) -> TrainOptions:
    """The options; of several ranks one may lack a file that they name, and all must know."""
    if launcher.launched_rank() is None:
        return parse_train(argv)
    from dylora_mlx.distributed.group import world

    with world().raise_on_all_ranks():
        options = parse_train(argv)
        if options.estimate and world().world_size > 1:
            raise UserError("--estimate: times one process, not several ranks; leave it out")
        return options


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv, parallel=True)


if __name__ == "__main__":
    sys.exit(main())
