"""Train on a stream of skills: dylora train [--config CONFIG] [--section.option VALUE] [--resume RUN]."""

from __future__ import annotations

import sys

from dylora_mlx.cli.options import TrainOptions, parse_train
from dylora_mlx.cli.parser import run_command
from dylora_mlx.distributed import launcher
from dylora_mlx.errors import UserError


def command(argv: list[str]) -> int:
    options = _parse_on_all_ranks(argv)
    # Imported after parsing: --help needs no MLX.
    from dylora_mlx.distributed.group import is_main_process
    from dylora_mlx.run import loop, run_folder
    from dylora_mlx.system import console

    with console.output_mode(options.mode if is_main_process() else "silent"):
        config, folder = options.config, options.folder
        run = run_folder.resume_run(folder) if config is None else run_folder.start_run(config, folder)
        loop.learn_stream(run, options.estimate)
    return 0


def _parse_on_all_ranks(argv: list[str]) -> TrainOptions:
    """Parse the options. With several ranks, an error on one, such as a missing file, is raised on all of them."""
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
