"""Pieces of HTML that sections are made of, and what a section says when it has nothing to show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dylora_mlx.reporting.history import History
from dylora_mlx.reporting.style import color_class
from dylora_mlx.reporting.svg import Line, Point, escape, line_chart

DASHES = ("", "7 4", "2 3", "9 3 2 3", "1 5")


class MissingData(Exception):
    """A section cannot be drawn; the message says, in one line, what is not there."""


def figure(chart: str, caption: str, below: str = "") -> str:
    """A chart with what it shows; caption is plain text, below HTML."""
    return f'<figure><figcaption>{escape(caption)}</figcaption><div class="chart">{chart}</div>{below}</figure>'


def legend(items: Iterable[tuple[str, str, str]]) -> str:
    """What lines or areas stand for: (CSS class, name, dashes)."""
    parts = []
    for css, name, dash in items:
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        sample = f'<svg class="key" viewBox="0 0 26 10" aria-hidden="true"><path class="{css} line" d="M1 5H25"{dashes}/></svg>'
        parts.append(f"<li>{sample}{escape(name)}</li>")
    return f'<ul class="legend">{"".join(parts)}</ul>'


def chart(lines: Sequence[Line], caption: str, history: History, floor: float | None = None, named: bool = True) -> str:
    """A line chart over steps as a figure, with the arrivals of skills and a legend; empty if no line has a point."""
    lines = [line for line in lines if any(y is not None for _, y in line.points)]
    drawn = line_chart(lines, caption, history.starts, floor)
    return figure(drawn, caption, legend((x.css, x.name, x.dash) for x in lines) if named else "") if drawn else ""


def skill_legend(history: History) -> str:
    """What the numbers over a chart stand for."""
    found = "".join(f"<li>{escape(name)} <small>step {step:g}</small></li>" for step, name in history.starts)
    return f'<p>Dashed verticals: a skill begins.</p><ol class="starts">{found}</ol>' if found else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, classes: str = "") -> str:
    """A table that scrolls by itself. head: text; rows: HTML of cells with their tags, the first of them <th>."""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    # tabindex: what scrolls must be reachable by keyboard.
    return (
        f'<p class="caption">{escape(caption)}</p><div class="wide" tabindex="0" role="region" '
        f'aria-label="{escape(caption)}"><table class="{classes}">'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def head(text: object) -> str:
    return f'<th scope="row" title="{escape(text)}">{escape(text)}</th>'


def cell(text: object, classes: str = "") -> str:
    return f'<td class="{classes}">{escape(text)}</td>' if classes else f"<td>{escape(text)}</td>"


def row(label: str, drawn: str, below: str = "") -> str:
    """A name, and what is drawn for it; label and below are HTML."""
    return f'<div class="row"><div class="label">{label}</div><div class="drawn">{drawn}{below}</div></div>'


def swatch(expert: int) -> str:
    """A small square in an expert's colour."""
    return f'<i class="swatch {color_class(expert)}"></i>'


def expert_legend(history: History, experts: Iterable[int]) -> str:
    """Squares and names of experts, the base's first."""
    found = "".join(f"<li>{swatch(e)}{escape(history.label(e))}</li>" for e in sorted(set(experts)))
    return f'<ul class="legend">{found}</ul>'


def domain_lines(found: dict[str, list[Point]], history: History) -> list[Line]:
    """Lines of domains, each in the colour of the expert that serves it; dashes tell domains of one expert apart."""
    seen: dict[str, int] = {}
    lines = []
    for name, points in found.items():
        css = color_class(history.serving[name]) if name in history.serving else "en"
        lines.append(Line(name, css, points, DASHES[seen.get(css, 0) % len(DASHES)]))
        seen[css] = seen.get(css, 0) + 1
    return lines
