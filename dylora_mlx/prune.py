"""Remove old checkpoints of a run, never its last complete one."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.config.load import load_config
from dylora_mlx.errors import Failure, UserError
from dylora_mlx.system.run_format import check_run_folder

SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kMGT]?)(i?)B?", re.IGNORECASE)
"""A number of bytes: 2GB are 2 * 10^9, 2GiB are 2 * 2^30."""
EXAMPLES = """\
  dylora prune runs/NAME --keep 1                   keep the last complete checkpoint alone
  dylora prune runs/NAME --max-bytes 2GB --dry-run  list what would be removed to get below 2 GB
"""
NOTES = """
All checkpoints count: those of steps, the final one, and those from before a skill was added. Checkpoints share the
files that have not changed, so removing one frees only what no other has.
"""


def command(argv: list[str]) -> int:
    parser = Parser("dylora prune", f"{__doc__}{NOTES}", EXAMPLES)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "--keep", type=int, metavar="N",
        help="number of checkpoints to keep (default: the run's training.keep_checkpoints)",
    )  # fmt: skip
    parser.add_argument(
        "--max-bytes", metavar="SIZE",
        help="bytes that they may take together, such as 500MB or 2GB (default: the run's training.checkpoints_mb)",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="remove nothing, only list what would be removed")
    options = parser.parse_args(argv)
    if options.keep is not None and options.keep < 1:
        parser.error(f"--keep {options.keep} is not at least 1: the last complete checkpoint is always kept")
    max_bytes = None if options.max_bytes is None else byte_count(options.max_bytes)
    check_run_folder(options.run)
    limits = load_config(options.run / "config.yaml").training
    if max_bytes is None and limits.checkpoints_mb is not None:
        max_bytes = limits.checkpoints_mb * 10**6
    # Imported after parsing: --help needs no MLX.
    from dylora_mlx.run.run_folder import lock_run

    with lock_run(options.run):
        prune(options.run, options.keep or limits.keep_checkpoints, max_bytes, options.dry_run)
    return 0


def byte_count(text: str) -> int:
    """Return the number of bytes that a size such as 500MB, 2GiB or 1000000 stands for. Raises UserError for no such size."""
    match = SIZE.fullmatch(text.strip())
    size = (
        0
        if match is None
        else round(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2].lower() or " "))
    )
    if not size:
        raise UserError(f"--max-bytes {text[:40]}: not a size; write it as 500MB, 2GB or a number of bytes")
    return size


def prune(run: Path, keep: int, max_bytes: int | None, dry_run: bool) -> None:
    """Remove a run's checkpoints beyond the limits, oldest first, and print what is removed and what is left.

    Raises UserError if no checkpoint is complete, Failure if one cannot be removed.
    """
    from dylora_mlx.training.checkpoint import retention

    removed, kept = retention.split_checkpoints(run, keep, max_bytes)
    freed = retention.bytes_of([*removed, *kept]) - (left := retention.bytes_of(kept))
    for folder in removed:
        print(f"{'would remove' if dry_run else 'removed'} {folder.name}")
        try:
            if not dry_run:
                retention.remove(folder)
        except OSError as error:
            raise Failure(f"{folder}: cannot be removed ({error.strerror}); give back the permission") from error
    names = ", ".join(folder.name for folder in reversed(kept))
    print(f"{'would keep' if dry_run else 'kept'} {names}: {_readable(left)}; {_readable(freed)} freed")
    if max_bytes is not None and left > max_bytes:
        print(f"the last complete checkpoint alone takes more than {_readable(max_bytes)}")


def _readable(size: int) -> str:
    """Return a number of bytes as people write it."""
    unit, factor = ("GB", 1e9) if size >= 1e9 else ("MB", 1e6) if size >= 1e6 else ("kB", 1e3)
    return f"{size / factor:.1f} {unit}"


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
