"""Write a run folder to one archive, or unpack such an archive."""

from __future__ import annotations

import sys
from pathlib import Path

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.errors import UserError

EXAMPLES = """\
  dylora pack runs/NAME                             write NAME.tar
  dylora pack --unpack NAME.tar --out runs/copy     unpack it; tar -xf NAME.tar does the same, into NAME
"""
NOTES = """
The archive is an uncompressed tar: weights hardly compress. Files that checkpoints share are in it once, as hard links.
"""


def command(argv: list[str]) -> int:
    parser = Parser("dylora pack", f"{__doc__}{NOTES}", EXAMPLES)
    parser.add_argument("run", type=Path, nargs="?", help="run folder to pack")
    parser.add_argument("--unpack", type=Path, metavar="FILE", help="archive to unpack, in place of a run folder")
    parser.add_argument(
        "--out", type=Path, metavar="PATH",
        help="archive to write (default: NAME.tar here), or with --unpack the run folder to create (default: NAME here)",
    )  # fmt: skip
    options = parser.parse_args(argv)
    if (options.run is None) == (options.unpack is None):
        parser.error("give a run folder to pack, or an archive with --unpack")
    # Imported after parsing: --help needs no MLX.
    from dylora_mlx.run.pack import pack, unpack

    if options.unpack is not None:
        folder = unpack(options.unpack, options.out)
        print(f"{folder} (from {options.unpack})")
        return 0
    if not options.run.is_dir():
        raise UserError(f"{options.run}: no run here (no such folder)")
    out = Path(f"{options.run.resolve().name}.tar") if options.out is None else options.out
    size = pack(options.run, out)
    print(f"{out} ({size / 1e6:.2f} MB)")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
