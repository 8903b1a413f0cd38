"""Estimate a run's cost: dylora estimate CONFIG [--section.option VALUE], or compare the estimate with a finished
RUN."""

from __future__ import annotations

import json
import sys

from dylora_mlx.cli.options import parse_estimate
from dylora_mlx.cli.parser import run_command


def command(argv: list[str]) -> int:
    options = parse_estimate(argv)
    # Imported after parsing: --help needs no MLX.
    from dylora_mlx.run import run_folder
    from dylora_mlx.run.build import build_run
    from dylora_mlx.run.cost.estimate import actual_arrivals, estimate_as_decided, estimate_run
    from dylora_mlx.run.cost.tables import print_comparison, print_estimate
    from dylora_mlx.system import console

    with console.output_mode(options.mode):
        if options.config is not None:
            estimate = estimate_run(build_run(options.config, options.folder, None))
            print_estimate(estimate)
        else:
            run, resources = run_folder.reopen_finished(options.folder)
            arrivals = actual_arrivals(run.folder, run.skills)
            estimate = estimate_run(run)
            estimate |= {"as_decided": estimate_as_decided(run, arrivals, estimate), "resources": resources}
            print_estimate(estimate)
            print_comparison(estimate, estimate["as_decided"], resources)
    if options.mode == "json":
        print(json.dumps(estimate))
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
