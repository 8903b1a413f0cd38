"""Restore experts that a run merged or evicted from its archive into its pool."""

from __future__ import annotations

import sys
from pathlib import Path

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.system.run_format import check_run_folder

EXAMPLES = """\
  dylora restore runs/NAME                          list what was removed
  dylora restore runs/NAME removed/001-evict        restore it into the final checkpoint
"""
NOTES = """
The restored experts serve their skills again, and the router is fitted again to all remembered features. An expert that
they were merged into stays: other skills may use it. The previous checkpoint is kept as final.before-NNN.
"""


def command(argv: list[str]) -> int:
    parser = Parser("dylora restore", f"{__doc__}{NOTES}", EXAMPLES)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "archive", nargs="?", help="archive folder to restore, as the listing names it; without it, list the archives"
    )
    options = parser.parse_args(argv)
    check_run_folder(options.run)
    # Imported after parsing: --help needs no MLX.
    from dylora_mlx.run.restore import print_archives, restore_archive

    if options.archive is None:
        print_archives(options.run)
    else:
        restore_archive(options.run, options.archive)
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
