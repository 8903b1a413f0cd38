"""Write a run's report as one HTML file, or compare several runs: dylora report RUN [RUN ...]. No model is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.errors import UserError
from dylora_mlx.reporting import compare, page
from dylora_mlx.system.files import write_error

EXAMPLES = """  dylora report runs/quickstart                             rewrites runs/quickstart/report.html
  dylora report runs/quickstart --out quickstart.html       somewhere else
  dylora report runs/first runs/second                      both side by side, in report-compare.html
"""
COMPARED = "report-compare.html"
"""Default file name of a comparison, in the current folder."""


class ReportOptions(NamedTuple):
    """The parsed command line: run folders, and the file to write."""

    runs: list[Path]
    out: Path


def parse(argv: list[str]) -> ReportOptions:
    """Parse the command line of report."""
    description = (
        "Write one HTML file that needs no network: losses, decisions, experts, gates, text. Several runs are compared."
    )
    parser = Parser("dylora report", description, EXAMPLES)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run folder; several are compared")
    parser.add_argument(
        "--out", type=Path, metavar="FILE",
        help=f"HTML file to write (default: RUN/{page.NAME}, or {COMPARED} here for several runs)",
    )  # fmt: skip
    options = parser.parse_args(argv)
    default_out = options.runs[0] / page.NAME if len(options.runs) == 1 else Path(COMPARED)
    return ReportOptions(options.runs, default_out if options.out is None else options.out)


def command(argv: list[str]) -> int:
    options = parse(argv)
    if options.out.is_dir():
        raise UserError(f"{options.out}: a folder; --out takes a file")
    if options.out.is_file() and not page.is_report(options.out):
        raise UserError(f"{options.out}: exists and is no report; choose another file with --out")
    html = page.run_page(options.runs[0]) if len(options.runs) == 1 else compare.comparison_page(options.runs)
    try:
        page.write_file(html, options.out)
    except OSError as error:
        raise write_error(options.out, error, "choose another file with --out") from error
    print(f"{options.out} ({options.out.stat().st_size / 1e6:.2f} MB)")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
