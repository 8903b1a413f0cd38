"""What a run will take: python -m dylora_mlx.estimate CONFIG [--section.option VALUE]; or what one took, beside it."""

from __future__ import annotations

import json
import sys

from dylora_mlx.cli import options as cli
from dylora_mlx.cli import parser as commands


def command(argv: list[str]) -> int:
    options = cli.parse_estimate(argv)
    from dylora_mlx.run import build as assembly  # only now: --help needs no MLX
    from dylora_mlx.run import folder as runs
    from dylora_mlx.run.cost import estimate
    from dylora_mlx.run.cost import tables as show
    from dylora_mlx.system import console

    with console.speaking(options.mode):
        if options.config is not None:
            found = estimate.estimate(assembly.assemble(options.config, options.folder, None))
            show.estimate(found)
        else:
            run, taken = runs.reopened(options.folder)
            decided = estimate.decided(run)
            found = estimate.estimate(run)
            found |= {"as_decided": estimate.as_decided(run, decided, found), "taken": taken}
            show.estimate(found)
            show.beside(found, found["as_decided"], taken)
    if options.mode == "json":
        print(json.dumps(found))
    return 0


def main(argv: list[str] | None = None) -> int:
    return commands.guarded(command, argv)


if __name__ == "__main__":
    sys.exit(main())
