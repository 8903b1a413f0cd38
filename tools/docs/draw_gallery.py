"""Draw the reports of finished runs for the documentation: an HTML file and a picture of each.

    python tools/docs/draw_gallery.py quickstart=runs/quickstart
    python tools/docs/draw_gallery.py ranks=runs/quickstart,runs/rank-2      two runs side by side, as `dylora report` draws them

The files go to docs/gallery/. The picture needs Chromium or Chrome; the variable CHROME may name another program.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from dylora_mlx import report
from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.errors import UserError

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "gallery"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZE = (1100, 1040)
"""Width and height of a picture in pixels."""
SHOWN = ("losses", "matrix")
"""Sections of a run's report that its picture shows. A comparison has others: its picture shows the beginning."""


class Exhibit(NamedTuple):
    """One report of the gallery."""

    name: str
    runs: list[Path]


def parse_exhibit(text: str) -> Exhibit:
    """Parse NAME=RUN or NAME=RUN,RUN. Raises UserError."""
    name, _, runs = text.partition("=")
    if not re.fullmatch(r"[a-z0-9-]+", name) or not runs:
        raise UserError(
            f"{text}: give NAME=RUN, or NAME=RUN,RUN for a comparison; a name has small letters, digits and -"
        )
    return Exhibit(name, [Path(run) for run in runs.split(",")])


def find_browser() -> str:
    """Return the browser's path. Raises UserError if there is none."""
    browser = os.environ.get("CHROME") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise UserError("no Chromium or Chrome found: install one, or name it in the variable CHROME")
    return browser


def draw(exhibit: Exhibit, out: Path, browser: str) -> None:
    """Write NAME.html and NAME.png. Raises UserError for a run without a report, and if the browser fails."""
    page, picture = out / f"{exhibit.name}.html", out / f"{exhibit.name}.png"
    report.command([*map(str, exhibit.runs), "--out", str(page)])
    html = page.read_text(encoding="utf-8")
    if all(f'<section id="{name}"' in html for name in SHOWN):
        shown = ", ".join(f"#{name}" for name in SHOWN)
        style = f"<style>.facts, nav, section {{display: none}} {shown} {{display: block}}</style></head>"
        html = html.replace("</head>", style, 1)
    with tempfile.TemporaryDirectory() as profile:
        drawn = Path(profile) / "drawn.html"
        drawn.write_text(html, encoding="utf-8")
        argv = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}",
            f"--window-size={SIZE[0]},{SIZE[1]}", f"--screenshot={picture}", drawn.as_uri(),
        ]  # fmt: skip
        completed = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    if completed.returncode or not picture.is_file():
        raise UserError(f"{browser} drew no picture of {page}: {(completed.stderr.splitlines() or ['no message'])[-1]}")


def command(argv: list[str]) -> int:
    parser = Parser("python tools/docs/draw_gallery.py", __doc__)
    parser.add_argument(
        "exhibits", nargs="+", metavar="NAME=RUN", help="name of a report, and the run or runs it is of"
    )
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="folder to write")
    options = parser.parse_args(argv)
    exhibits = [parse_exhibit(text) for text in options.exhibits]
    browser = find_browser()
    options.out.mkdir(parents=True, exist_ok=True)
    for exhibit in exhibits:
        draw(exhibit, options.out, browser)
        size = sum((options.out / f"{exhibit.name}{ending}").stat().st_size for ending in (".html", ".png"))
        print(f"{exhibit.name}: {size / 1e3:.0f} kB")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
