"""HTML building blocks of the report's sections."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from dylora_mlx.reporting.history import History
from dylora_mlx.reporting.style import color_class
from dylora_mlx.reporting.svg import Line, Point, escape, line_chart

DASHES = ("", "7 4", "2 3", "9 3 2 3", "1 5")
"""Dash patterns (SVG stroke-dasharray) that tell lines of one colour apart."""


class MissingData(Exception):
    """A section has no records to draw. The message names what is missing, in one line."""


def without_home(text: str) -> str:
    """Return a text with ~ for the user's home folder in its paths."""
    try:
        home = os.fspath(Path.home())
    except RuntimeError:  # a user without one
        return text
    return text if home == "/" else re.sub(rf"(?<![\w./~-]){re.escape(home)}(?=/|\s|$)", "~", text)


def figure(chart: str, caption: str, below: str = "") -> str:
    """Return a chart with its caption. chart and below are HTML, caption is plain text."""
    return f'<figure><figcaption>{escape(caption)}</figcaption><div class="chart">{chart}</div>{below}</figure>'


def legend(items: Iterable[tuple[str, str, str]]) -> str:
    """Return a legend of lines. items: (CSS class, name, dash pattern)."""
    parts = []
    for css, name, dash in items:
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        sample = f'<svg class="key" viewBox="0 0 26 10" aria-hidden="true"><path class="{css} line" d="M1 5H25"{dashes}/></svg>'
        parts.append(f"<li>{sample}{escape(name)}</li>")
    return f'<ul class="legend">{"".join(parts)}</ul>'


def chart(lines: Sequence[Line], caption: str, history: History, floor: float | None = None, named: bool = True) -> str:
    """Return a line chart over steps as a figure, with the skills' arrivals marked. Empty if no line has a point.

    Args:
        lines: the lines.
        caption: plain text.
        history: the run's history, for the arrivals.
        floor: see `svg.line_chart`.
        named: whether to add a legend.
    """
    lines = [line for line in lines if any(y is not None for _, y in line.points)]
    svg = line_chart(lines, caption, history.starts, floor)
    return figure(svg, caption, legend((x.css, x.name, x.dash) for x in lines) if named else "") if svg else ""


def skill_legend(history: History) -> str:
    """Return the legend of the numbered arrival marks in a chart: skill and step. Empty without arrivals."""
    items = "".join(f"<li>{escape(name)} <small>step {step:g}</small></li>" for step, name in history.starts)
    return f'<p>Dashed verticals: a skill begins.</p><ol class="starts">{items}</ol>' if items else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, classes: str = "") -> str:
    """Return a table in a scrollable region of its own.

    Args:
        head: column names, plain text.
        rows: HTML of the cells with their tags; the first of a row is a <th>.
        caption: plain text.
        classes: CSS classes of the table.
    """
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    # tabindex makes the scrollable region reachable by keyboard.
    return (
        f'<p class="caption">{escape(caption)}</p><div class="wide" tabindex="0" role="region" '
        f'aria-label="{escape(caption)}"><table class="{classes}">'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def head(text: object) -> str:
    """Return a row's header cell."""
    return f'<th scope="row" title="{escape(text)}">{escape(text)}</th>'


def cell(text: object, classes: str = "") -> str:
    """Return a table cell. classes: CSS classes."""
    return f'<td class="{classes}">{escape(text)}</td>' if classes else f"<td>{escape(text)}</td>"


def row(label: str, chart: str, below: str = "") -> str:
    """Return a label with its chart, and content below the chart. All arguments are HTML."""
    return f'<div class="row"><div class="label">{label}</div><div class="drawn">{chart}{below}</div></div>'


def swatch(expert: int) -> str:
    """Return a small square in an expert's colour. expert: its number."""
    return f'<i class="swatch {color_class(expert)}"></i>'


def expert_legend(history: History, experts: Iterable[int]) -> str:
    """Return a legend with the experts' colours and names, ordered by number; the base comes first."""
    items = "".join(f"<li>{swatch(e)}{escape(history.label(e))}</li>" for e in sorted(set(experts)))
    return f'<ul class="legend">{items}</ul>'


def domain_lines(points_by_domain: dict[str, list[Point]], history: History) -> list[Line]:
    """Return a line per domain in the colour of its expert. Dashes tell domains of one expert apart."""
    lines_per_color: dict[str, int] = {}
    lines = []
    for name, points in points_by_domain.items():
        css = color_class(history.serving[name]) if name in history.serving else "en"
        lines.append(Line(name, css, points, DASHES[lines_per_color.get(css, 0) % len(DASHES)]))
        lines_per_color[css] = lines_per_color.get(css, 0) + 1
    return lines
