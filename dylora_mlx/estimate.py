"""What a run will take: python -m dylora_mlx.estimate CONFIG [--section.option VALUE]; or what one took, beside it."""

from __future__ import annotations

import json
import sys

from dylora_mlx import cli, commands


def command(argv: list[str]) -> int:
    options = cli.parse_estimate(argv)
    from dylora_mlx import assembly, console, runs  # only now: --help needs no MLX
    from dylora_mlx.cost import estimate, show

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
