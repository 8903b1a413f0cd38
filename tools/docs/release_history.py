"""The benchmark history of releases: record one, and draw all of them on docs/history.md.

    python tools/benchmarks/benchmark.py --size embedded --only step memory --contenders ours mlx-lm --runs 9 --json bench.json
    python -m dylora_mlx.train --name history
    python tools/docs/release_history.py --record bench.json --run runs/history --wheel dist/dylora_mlx-0.1.0-py3-none-any.whl
    python tools/docs/release_history.py              writes docs/history.md and docs/drawings/history.svg anew
    python tools/docs/release_history.py --check      exits 1, with a one-line message, if they are stale

A release is one JSON file in docs/results/releases, named after its version.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import dylora_mlx
from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.errors import UserError
from dylora_mlx.reporting.svg import ticks
from dylora_mlx.system.files import read_json, write_json, write_text

ROOT = Path(__file__).parents[2]
RELEASES, PAGE, DRAWING = "docs/results/releases", "docs/history.md", "docs/drawings/history.svg"
MACHINE = ("device", "blas", "python", "mlx", "mlx_lm")
"""What is kept of the machine that benchmark.py describes."""
VERSION = re.compile(r"\d+\.\d+\.\d+")


class Figure(NamedTuple):
    """One figure of a release."""

    name: str
    """Key in the JSON file."""
    label: str
    """What it is, for people."""
    better: str
    """Which way is better: higher or lower."""
    read: Callable[[dict[str, Any], dict[str, Any], Path], float]
    """Reads it from the benchmark's JSON, the quickstart's results.json and the wheel."""


def _speed(bench: dict[str, Any], results: dict[str, Any], wheel: Path) -> float:
    return bench["step"]["mlx-lm"]["ours_against_it"]["ratio"]


def _memory(bench: dict[str, Any], results: dict[str, Any], wheel: Path) -> float:
    return bench["memory"]["ours"]["peak"] / bench["memory"]["mlx-lm"]["peak"]


FIGURES = [
    Figure("step_speed", "training speed against mlx-lm's trainer (tokens/s, ratio)", "higher", _speed),
    Figure("step_memory", "peak memory of a step against mlx-lm's (ratio)", "lower", _memory),
    Figure(
        "mean_loss",
        "quickstart: mean validation loss of the skills (nats)",
        "lower",
        lambda b, r, w: r["continual"]["final_mean"],
    ),
    Figure("forgetting", "quickstart: forgetting (nats)", "lower", lambda b, r, w: r["continual"]["forgetting"]),
    Figure("experts", "quickstart: experts", "as decided", lambda b, r, w: float(len(r["experts"]))),
    Figure("wheel_mb", "size of the wheel (MB)", "lower", lambda b, r, w: w.stat().st_size / 1e6),
]


class Release(NamedTuple):
    """One recorded release."""

    version: str
    machine: dict[str, Any]
    figures: dict[str, float]
    intervals: dict[str, list[float]]
    """95% interval of a figure, where it was measured with one."""


def record(bench: Path, run: Path, wheel: Path, root: Path, version: str) -> Path:
    """Write a release's JSON file and return its path. Raises UserError for an input that lacks a figure."""
    if not wheel.is_file():
        raise UserError(f"{wheel}: no such file; python tools/dev/check_package.py --out dist builds the wheel")
    measured, results = read_json(bench), read_json(run / "results.json")
    figures = {}
    for figure in FIGURES:
        try:
            figures[figure.name] = round(figure.read(measured, results, wheel), 4)
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{bench}, {run}: {figure.name} is missing ({error}); see --help for the commands"
            ) from error
    path = root / RELEASES / f"{version}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = {name: measured.get("machine", {})[name] for name in MACHINE if name in measured.get("machine", {})}
    speed = measured["step"]["mlx-lm"]["ours_against_it"]
    intervals = {"step_speed": [round(speed["low"], 4), round(speed["high"], 4)]}
    write_json(path, {"version": version, "machine": machine, "figures": figures, "intervals": intervals})
    return path


def load(root: Path) -> list[Release]:
    """Return all releases, the oldest first. Raises UserError for a file that is not one."""
    releases = []
    for path in (root / RELEASES).glob("*.json"):
        content = read_json(path)
        if not VERSION.fullmatch(path.stem) or content.get("version") != path.stem or not content.get("figures"):
            raise UserError(f"{path}: not a release; its name must be its version, such as 0.1.0.json")
        releases.append(
            Release(content["version"], content.get("machine", {}), content["figures"], content.get("intervals", {}))
        )
    return sorted(releases, key=lambda release: tuple(map(int, release.version.split("."))))


def page(releases: Sequence[Release]) -> str:
    """Return docs/history.md."""
    rows = [
        f"| {figure.label} | {figure.better} | {' | '.join(_cell(r, figure) for r in releases)} |" for figure in FIGURES
    ]
    versions = " | ".join(release.version for release in releases)
    machines = "\n".join(f"- {release.version}: {_machine(release)}" for release in releases)
    return f"""# Benchmark history

Written by `python tools/docs/release_history.py` from one JSON file for each release; do not edit. CONTRIBUTING says when one is added.

![The figures of each release](drawings/history.svg)

| figure | better | {versions} |
| --- | --- | {" | ".join("---:" for _ in releases)} |
{chr(10).join(rows)}

Speed and memory are ratios of two programs that took turns on one machine, on the embedded base, so machines may differ between
releases; in brackets is a 95% interval, which is wide where the machine was busy. [performance.md](performance.md) has larger models,
and how it is measured. Machines:

{machines}
"""


def _cell(release: Release, figure: Figure) -> str:
    value = release.figures.get(figure.name)
    if value is None:
        return ""
    interval = release.intervals.get(figure.name)
    return f"{value:.3g} ({interval[0]:.3g} to {interval[1]:.3g})" if interval else f"{value:.4g}"


def _machine(release: Release) -> str:
    return ", ".join(f"{name} {value}" for name, value in release.machine.items()) or "not recorded"


STYLE = (
    "text{font:12px sans-serif;fill:#555}.h{font-weight:bold;fill:#222}line{stroke:#ccc}circle{fill:#0060c8}"
    "path{fill:none;stroke:#0060c8;stroke-width:2}"
)
CELL, TOP, LEFT, PLOT = (300, 150), 44, 52, (226, 70)
"""Size of a small chart, its margins above and to the left, and the size of its plot, in SVG units."""


def drawing(releases: Sequence[Release]) -> str:
    """Return docs/drawings/history.svg: a small chart of each figure over the releases."""
    charts = [_chart(figure, releases, number) for number, figure in enumerate(FIGURES)]
    width, height = 3 * CELL[0], -(-len(FIGURES) // 3) * CELL[1]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"><title>Figures of each release</title>'
        f'<style>{STYLE}</style><rect width="{width}" height="{height}" fill="#fff"/>{"".join(charts)}</svg>\n'
    )


def _chart(figure: Figure, releases: Sequence[Release], number: int) -> str:
    """Draw one figure: its label, two or more marks of the axis, and a point for each release."""
    values = [
        (place, release.figures[figure.name])
        for place, release in enumerate(releases)
        if figure.name in release.figures
    ]
    low, high = min((v for _, v in values), default=0.0), max((v for _, v in values), default=1.0)
    margin = (high - low) * 0.2 or abs(high) * 0.2 or 1.0
    low, high = low - margin, high + margin

    def y(value: float) -> float:
        return TOP + PLOT[1] * (high - value) / (high - low)

    def x(place: int) -> float:
        return LEFT + PLOT[0] * (place + 0.5) / len(releases)

    label, _, unit = figure.label.partition(" (")
    parts = [
        f'<text class="h" x="8" y="16">{escape(label)}</text>',
        f'<text x="8" y="32">{escape(unit.rstrip(")"))}</text>',
    ]
    for tick in ticks(low, high, 3):
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + PLOT[0]}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    points = [f"{x(place):.1f} {y(value):.1f}" for place, value in values]
    parts.append(f'<path d="M{"L".join(points)}"/>' if len(points) > 1 else "")
    for (place, value), point in zip(values, points, strict=True):
        cx, cy = point.split()
        title = escape(f"{releases[place].version}: {value:.4g}")
        parts.append(f'<circle cx="{cx}" cy="{cy}" r="3.5"><title>{title}</title></circle>')
        parts.append(
            f'<text x="{cx}" y="{TOP + PLOT[1] + 18}" text-anchor="middle">{escape(releases[place].version)}</text>'
        )
    return f'<g transform="translate({number % 3 * CELL[0]} {number // 3 * CELL[1]})">{"".join(parts)}</g>'


def command(argv: list[str]) -> int:
    parser = Parser("python tools/docs/release_history.py", __doc__)
    parser.add_argument(
        "--record", type=Path, metavar="JSON", help="measurements of benchmark.py: add this version's figures"
    )
    parser.add_argument("--run", type=Path, help="with --record: run folder of the quickstart")
    parser.add_argument("--wheel", type=Path, help="with --record: the built wheel")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with code 1 if the page is stale")
    options = parser.parse_args(argv)
    if options.record is not None:
        if options.run is None or options.wheel is None:
            raise UserError("--record: needs --run and --wheel too")
        print(record(options.record, options.run, options.wheel, ROOT, dylora_mlx.__version__))
    releases = load(ROOT)
    if not releases:
        raise UserError(f"{RELEASES}: no release is recorded")
    for name, text in ((PAGE, page(releases)), (DRAWING, drawing(releases))):
        path = ROOT / name
        if options.check and (not path.is_file() or path.read_text(encoding="utf-8") != text):
            print(f"{name} is stale: run python tools/docs/release_history.py", file=sys.stderr)
            return 1
        if not options.check:
            write_text(path, text)
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
