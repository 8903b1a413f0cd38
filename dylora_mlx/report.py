"""A run's report as one HTML file, or several runs side by side: dylora report RUN [RUN ...]. No model is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.errors import UserError
from dylora_mlx.reporting import compare, page
from dylora_mlx.system.files import write_error

EXAMPLES = """  dylora report runs/quickstart                             writes runs/quickstart/report.html anew
  dylora report runs/quickstart --out quickstart.html       somewhere else
  dylora report runs/first runs/second                      both side by side, in report-compare.html
"""
COMPARED = "report-compare.html"


class ReportOptions(NamedTuple):
    """What the command line asks for: runs, and where to write."""

    runs: list[Path]
    out: Path


def parse(argv: list[str]) -> ReportOptions:
    about = (
        "Draw a run in one HTML file that needs no network: losses, decisions, experts, gates, text. Several runs are "
        "compared."
    )
    made = Parser("dylora report", about, EXAMPLES)
    made.add_argument(
        "runs", metavar="RUN", type=Path, nargs="+", help="a run folder; with more than one, they are compared"
    )
    made.add_argument(
        "--out", type=Path, metavar="FILE",
        help=f"the file to write (default: RUN/{page.NAME}, or {COMPARED} here for several runs)",
    )  # fmt: skip
    found = made.parse_args(argv)
    usual = found.runs[0] / page.NAME if len(found.runs) == 1 else Path(COMPARED)
    return ReportOptions(found.runs, usual if found.out is None else found.out)


def command(argv: list[str]) -> int:
    asked = parse(argv)
    if asked.out.is_dir():
        raise UserError(f"{asked.out}: a folder; --out takes a file")
    if asked.out.is_file() and not page.is_report(asked.out):
        raise UserError(f"{asked.out}: exists and is no report; choose another file with --out")
    made = page.run_page(asked.runs[0]) if len(asked.runs) == 1 else compare.comparison_page(asked.runs)
    try:
        page.write_file(made, asked.out)
    except OSError as error:
        raise write_error(asked.out, error, "choose another file with --out") from error
    print(f"{asked.out} ({asked.out.stat().st_size / 1e6:.2f} MB)")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
