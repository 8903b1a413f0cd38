"""Charts as strings of SVG: pure functions, no library. Text within is a caption of a few letters; names stand in HTML."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape as html_escape
from typing import NamedTuple

MAX_POINTS = 400
"""Points of a line at most."""
WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 24, 30
"""Margins of a line chart, in its own units: room for letters as large as a phone needs them."""
Point = tuple[float, float | None]
"""Of a line; None: the line is interrupted."""
_CONTROL = {code: None for code in range(32) if code not in (9, 10)} | {127: None}


class Line(NamedTuple):
    """One line of a chart: its name, CSS class, points by rising x, and dashes as SVG has them."""

    name: str
    css: str
    points: list[Point]
    dash: str = ""


def escape(value: object) -> str:
    """Text from anywhere, fit for an element or an attribute."""
    return html_escape(str(value).translate(_CONTROL), quote=True)


def short_number(value: float) -> str:
    """A number with three or four digits that tell."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g} M"
    if size >= 10_000:
        return f"{value / 1e3:.3g} k"
    return f"{value:.0f}" if size >= 1000 else f"{value:.4g}"


def thin_points(points: Sequence[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `limit` points that keep the first, the last, and the lowest and highest of every stretch between."""
    if len(points) <= limit:
        return list(points)
    inner, buckets = points[1:-1], max(1, (limit - 2) // 2)
    kept = [points[0]]
    for number in range(buckets):
        bucket = inner[number * len(inner) // buckets : (number + 1) * len(inner) // buckets]
        if bucket:
            kept += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
    return [*kept, points[-1]]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from low to high."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [0.0 if n == 0 else n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(
    series: Sequence[Line], title: str, marks: Sequence[tuple[float, str]] = (), floor: float | None = None
) -> str:
    """Lines over steps. marks: steps at which something begins, and what; floor: the least top of the lowest value, so
    that a chart of amounts begins there. Empty without points."""
    runs = [(line, run) for line in series for run in _runs(line.points)]
    values = [point for _, run in runs for point in run]
    if not values:
        return ""
    x0, x1 = min(0.0, *(x for x, _ in values)), max(x for x, _ in values)
    y0, y1 = min(y for _, y in values), max(y for _, y in values)
    y0 = min(y0, floor) if floor is not None else y0
    x1 = x1 if x1 > x0 else x0 + 1
    pad = 0.05 * (y1 - y0) or abs(y1) * 0.1 or 1.0
    y0, y1 = (y0 if floor is not None and y0 == floor else y0 - pad), y1 + pad

    def across(x: float) -> float:
        return round(LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT), 1)

    def up(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM), 1)

    parts = [_axes(x0, x1, y0, y1, across, up), _marks(marks, x1, across)]
    sizes: dict[int, int] = {}
    for line, run in runs:
        sizes[id(line)] = sizes.get(id(line), 0) + len(run)
    for line, run in runs:
        share = max(2, MAX_POINTS * len(run) // sizes[id(line)])
        parts.append(_polyline(line, [(across(x), up(y)) for x, y in thin_points(run, share)]))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _runs(points: Iterable[Point]) -> list[list[tuple[float, float]]]:
    """The stretches of a line without a gap."""
    found: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None or not math.isfinite(y):
            found.append([])
        else:
            found[-1].append((x, y))
    return [run for run in found if run]


def _axes(x0: float, x1: float, y0: float, y1: float, across: Callable, up: Callable) -> str:
    parts = []
    for y in ticks(y0, y1):
        at = up(y)
        parts.append(f'<path class="grid" d="M{LEFT} {at}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4}" text-anchor="end">{escape(short_number(y))}</text>')
    for x in (t for t in ticks(x0, x1) if t == round(t)):
        at = min(across(x), WIDTH - RIGHT - 8)
        parts.append(f'<text x="{at}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{escape(short_number(x))}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    return "".join(parts)


def _marks(marks: Sequence[tuple[float, str]], last: float, across: Callable) -> str:
    """Dashed verticals, numbered where the numbers have room."""
    parts, free = [], -1e9
    for number, (step, name) in enumerate(marks, 1):
        if step > last:
            continue
        at = across(step)
        title = f"<title>{escape(f'step {short_number(step)}: {name}')}</title>"
        parts.append(f'<path class="mark" d="M{at} {TOP}V{HEIGHT - BOTTOM}">{title}</path>')
        if at >= free:
            parts.append(f'<text x="{at + 2}" y="{TOP - 8}">{number}</text>')
            free = at + 12 + 10 * len(str(number))
    return "".join(parts)


def _polyline(line: Line, points: list[tuple[float, float]]) -> str:
    title = f"<title>{escape(line.name)}</title>"
    if len(points) == 1:
        return f'<circle class="{line.css} fill" cx="{points[0][0]}" cy="{points[0][1]}" r="3.5">{title}</circle>'
    dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline class="{line.css} line"{dash} points="{path}">{title}</polyline>'


class BarPart(NamedTuple):
    """A stretch of a bar: from, to (in shares of the bar), CSS class, what it is, and how solid (0 to 1)."""

    start: float
    end: float
    css: str
    title: str
    solid: float = 1.0


def bar(parts: Sequence[BarPart], title: str, height: int = 14) -> str:
    """One horizontal bar; it stretches to the width that there is."""
    rects = []
    for part in parts:
        width = (part.end - part.start) * 1000
        if width >= 0.5:
            solid = f' opacity="{part.solid:g}"' if part.solid < 1 else ""
            rects.append(
                f'<rect class="{part.css} fill" x="{part.start * 1000:.0f}" width="{width:.0f}" height="{height}"{solid}>'
                f"<title>{escape(part.title)}</title></rect>"
            )
    return (
        f'<svg class="bar" viewBox="0 0 1000 {height}" height="{height}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(title)}">{"".join(rects)}</svg>'
    )


def histogram(counts: Sequence[float], titles: Sequence[str], title: str) -> str:
    """Upright bars, as many as there are counts. Empty without any."""
    top = max(counts, default=0)
    if not top > 0:
        return ""
    rects = []
    for number, (count, name) in enumerate(zip(counts, titles, strict=True)):
        height = 0 if count <= 0 else max(1.5, 38 * count / top)
        rects.append(
            f'<rect class="e1 fill" x="{number * 30 + 2}" y="{40 - height:.1f}" width="26" height="{height:.1f}">'
            f"<title>{escape(name)}</title></rect>"
        )
    width = 30 * len(counts)
    return (
        f'<svg class="histogram" viewBox="0 0 {width} 42" role="img" aria-label="{escape(title)}">'
        f'{"".join(rects)}<path class="axis" d="M0 40.5H{width}"/></svg>'
    )


def interval(score: float, between: tuple[float, float] | None, threshold: float | None, low: float, title: str) -> str:
    """A dot with its interval, and a threshold as an upright mark, on an axis from `low` to 1."""

    def across(value: float) -> float:
        return round(12 + (min(max(value, low), 1.0) - low) / (1.0 - low) * 376, 1)

    parts = [f'<path class="grid" d="M12 20H388"/><text x="12" y="38">{escape(short_number(low))}</text>']
    parts.append('<text x="388" y="38" text-anchor="end">1</text>')
    if between:
        parts.append(f'<path class="e1 span" d="M{across(between[0])} 20H{across(between[1])}"/>')
    if threshold is not None:
        at = across(threshold)
        parts.append(f'<path class="e2 threshold" d="M{at} 6V32"/>')
    parts.append(f'<circle class="e1 fill" cx="{across(score)}" cy="20" r="6"/>')
    return (
        f'<svg class="interval" viewBox="0 0 400 42" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )
