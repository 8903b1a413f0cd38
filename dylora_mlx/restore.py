"""Put experts that a run merged or evicted back into its pool, from the run folder's own archive."""

from __future__ import annotations

import sys
from pathlib import Path

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.errors import UserError

EXAMPLES = """\
  dylora restore runs/NAME                          list what was removed
  dylora restore runs/NAME removed/001-evict        put it back into the final checkpoint

The skills that the experts held are theirs again, and the router is fitted again to all remembered features. An expert that
they were merged into stays: other skills may use it. The checkpoint before is kept as final.before-NNN.
"""


def command(argv: list[str]) -> int:
    parser = Parser("dylora restore", __doc__, EXAMPLES)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("archive", nargs="?", help="folder below it, as the listing names it")
    options = parser.parse_args(argv)
    if not (options.run / "config.yaml").is_file():
        raise UserError(f"{options.run}: no run here (no config.yaml)")
    from dylora_mlx.run.restore import print_archives, restore_archive  # only now: --help needs no MLX

    if options.archive is None:
        print_archives(options.run)
    else:
        restore_archive(options.run, options.archive)
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
