"""Remove experts that a finished run can do without."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.errors import UserError
from dylora_mlx.system.run_format import check_run_folder

EXAMPLES = """\
  dylora tidy runs/NAME --dry-run            what each expert is worth, and what would be removed
  dylora tidy runs/NAME --epsilon 0.002      remove what costs no domain more than 0.002 nats in all
"""
NOTES = """
An expert is tried if its skills lose at most epsilon when every token goes to another expert or to the base. Each removal
is measured on the mixture, after the router was fitted again, and undone if the loss of any domain has risen by more since
before the first removal. Removed experts are archived, and `dylora restore` puts them back; the checkpoint from before is
kept as before-tidy-NNN.
"""


def command(argv: list[str]) -> int:
    parser = Parser("dylora tidy", f"{__doc__}{NOTES}", EXAMPLES)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "--epsilon",
        type=float,
        default=0.005,
        metavar="NATS",
        help="largest rise of a domain's loss by all removals together, in nats per token",
    )
    parser.add_argument("--dry-run", action="store_true", help="change nothing, only print what would be removed")
    options = parser.parse_args(argv)
    if not 0 <= options.epsilon < math.inf:
        raise UserError(f"--epsilon {options.epsilon}: not a number of nats from 0 on")
    check_run_folder(options.run)
    # Imported after parsing: --help needs no MLX.
    from dylora_mlx.run.tidy import tidy

    tidy(options.run, options.epsilon, options.dry_run)
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
