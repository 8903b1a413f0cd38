"""Charts as SVG strings: pure functions, no plotting library. Visible text is numbers only; names are in the HTML."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape as html_escape
from typing import NamedTuple

MAX_POINTS = 400
"""Largest number of points of one line."""
WIDTH, HEIGHT = 480, 250
"""Size of a line chart in SVG units."""
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 24, 30
"""Margins of a line chart in SVG units, wide enough for the larger letters on a phone."""
Point = tuple[float, float | None]
"""(x, y) of a line; a y of None interrupts the line."""
_CONTROL = {code: None for code in range(32) if code not in (9, 10)} | {127: None}


class Line(NamedTuple):
    """One line of a chart."""

    name: str
    """Title that appears on hovering."""
    css: str
    """CSS class of its colour."""
    points: list[Point]
    """Points in the order of x."""
    dash: str = ""
    """Dash pattern (SVG stroke-dasharray)."""


def escape(value: object) -> str:
    """Escape untrusted text for an HTML element or attribute. Removes control characters other than tab and newline."""
    return html_escape(str(value).translate(_CONTROL), quote=True)


def short_number(value: float) -> str:
    """Format a number with three or four significant digits, with k or M from 10,000."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g} M"
    if size >= 10_000:
        return f"{value / 1e3:.3g} k"
    return f"{value:.0f}" if size >= 1000 else f"{value:.4g}"


def thin_points(points: Sequence[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """Thin points to at most `limit`: the first, the last, and the lowest and highest of every bucket between."""
    if len(points) <= limit:
        return list(points)
    inner, buckets = points[1:-1], max(1, (limit - 2) // 2)
    thinned = [points[0]]
    for number in range(buckets):
        bucket = inner[number * len(inner) // buckets : (number + 1) * len(inner) // buckets]
        if bucket:
            thinned += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
    return [*thinned, points[-1]]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return about `count` round numbers from low to high, for axis ticks."""
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
    """Draw lines over steps. Empty without points.

    Args:
        series: the lines.
        title: accessible name of the chart.
        marks: (step, name) of vertical marks.
        floor: the y axis begins here or below, so that a chart of amounts begins at 0.
    """
    runs = [(line, run) for line in series for run in _split_at_gaps(line.points)]
    values = [point for _, run in runs for point in run]
    if not values:
        return ""
    x0, x1 = min(0.0, *(x for x, _ in values)), max(x for x, _ in values)
    y0, y1 = min(y for _, y in values), max(y for _, y in values)
    y0 = min(y0, floor) if floor is not None else y0
    x1 = x1 if x1 > x0 else x0 + 1
    pad = 0.05 * (y1 - y0) or abs(y1) * 0.1 or 1.0
    y0, y1 = (y0 if floor is not None and y0 == floor else y0 - pad), y1 + pad

    def scale_x(x: float) -> float:
        return round(LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT), 1)

    def scale_y(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM), 1)

    parts = [_axes(x0, x1, y0, y1, scale_x, scale_y), _marks(marks, x1, scale_x)]
    points_of_line: dict[int, int] = {}
    for line, run in runs:
        points_of_line[id(line)] = points_of_line.get(id(line), 0) + len(run)
    for line, run in runs:
        max_points = max(2, MAX_POINTS * len(run) // points_of_line[id(line)])
        parts.append(_polyline(line, [(scale_x(x), scale_y(y)) for x, y in thin_points(run, max_points)]))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _split_at_gaps(points: Iterable[Point]) -> list[list[tuple[float, float]]]:
    """Split a line at its gaps, which are points whose y is None or not finite."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None or not math.isfinite(y):
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [run for run in runs if run]


def _axes(x0: float, x1: float, y0: float, y1: float, scale_x: Callable, scale_y: Callable) -> str:
    parts = []
    for y in ticks(y0, y1):
        at = scale_y(y)
        parts.append(f'<path class="grid" d="M{LEFT} {at}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4}" text-anchor="end">{escape(short_number(y))}</text>')
    for x in (t for t in ticks(x0, x1) if t == round(t)):
        at = min(scale_x(x), WIDTH - RIGHT - 8)
        parts.append(f'<text x="{at}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{escape(short_number(x))}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    return "".join(parts)


def _marks(marks: Sequence[tuple[float, str]], last: float, scale_x: Callable) -> str:
    """Draw dashed vertical marks. A mark gets its number only where it does not overlap the previous one."""
    parts, next_free_x = [], -1e9
    for number, (step, name) in enumerate(marks, 1):
        if step > last:
            continue
        at = scale_x(step)
        title = f"<title>{escape(f'step {short_number(step)}: {name}')}</title>"
        parts.append(f'<path class="mark" d="M{at} {TOP}V{HEIGHT - BOTTOM}">{title}</path>')
        if at >= next_free_x:
            parts.append(f'<text x="{at + 2}" y="{TOP - 8}">{number}</text>')
            next_free_x = at + 12 + 10 * len(str(number))
    return "".join(parts)


def _polyline(line: Line, points: list[tuple[float, float]]) -> str:
    title = f"<title>{escape(line.name)}</title>"
    if len(points) == 1:
        return f'<circle class="{line.css} fill" cx="{points[0][0]}" cy="{points[0][1]}" r="3.5">{title}</circle>'
    dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline class="{line.css} line"{dash} points="{path}">{title}</polyline>'


class BarPart(NamedTuple):
    """A segment of a bar."""

    start: float
    """Start as a share of the bar, 0 to 1."""
    end: float
    """End as a share of the bar, 0 to 1."""
    css: str
    """CSS class of its colour."""
    title: str
    """Title that appears on hovering."""
    solid: float = 1.0
    """Opacity, 0 to 1."""


def bar(parts: Sequence[BarPart], title: str, height: int = 14) -> str:
    """Draw one horizontal bar that stretches to the available width. Segments too narrow to see are left out."""
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
    """Draw a histogram with one vertical bar per count. titles: of the bars. Empty if no count is above 0."""
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


def interval(score: float, bounds: tuple[float, float] | None, marks: Sequence[float], low: float, title: str) -> str:
    """Draw a score as a dot, its interval as a band and limits as vertical marks, on an axis from `low` to 1."""

    def scale_x(value: float) -> float:
        return round(12 + (min(max(value, low), 1.0) - low) / (1.0 - low) * 376, 1)

    parts = [f'<path class="grid" d="M12 20H388"/><text x="12" y="38">{escape(short_number(low))}</text>']
    parts.append('<text x="388" y="38" text-anchor="end">1</text>')
    if bounds:
        parts.append(f'<path class="e1 span" d="M{scale_x(bounds[0])} 20H{scale_x(bounds[1])}"/>')
    parts += [f'<path class="e2 threshold" d="M{scale_x(mark)} 6V32"/>' for mark in marks]
    parts.append(f'<circle class="e1 fill" cx="{scale_x(score)}" cy="20" r="6"/>')
    return (
        f'<svg class="interval" viewBox="0 0 400 42" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )
