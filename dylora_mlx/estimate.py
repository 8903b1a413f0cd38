"""What a run will take: python -m dylora_mlx.estimate CONFIG [--section.option VALUE]; or what one took, beside it."""

from __future__ import annotations

import json
import sys

from dylora_mlx.cli.options import parse_estimate
from dylora_mlx.cli.parser import run_command


def command(argv: list[str]) -> int:
    options = parse_estimate(argv)
    from dylora_mlx.run import run_folder
    from dylora_mlx.run.build import build_run  # only now: --help needs no MLX
    from dylora_mlx.run.cost.estimate import actual_arrivals, estimate_as_decided, estimate_run
    from dylora_mlx.run.cost.tables import print_comparison, print_estimate
    from dylora_mlx.system import console

    with console.output_mode(options.mode):
        if options.config is not None:
            found = estimate_run(build_run(options.config, options.folder, None))
            print_estimate(found)
        else:
            run, taken = run_folder.reopen_finished(options.folder)
            decided = actual_arrivals(run.folder, run.skills)
            found = estimate_run(run)
            found |= {"as_decided": estimate_as_decided(run, decided, found), "resources": taken}
            print_estimate(found)
            print_comparison(found, found["as_decided"], taken)
    if options.mode == "json":
        print(json.dumps(found))
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
