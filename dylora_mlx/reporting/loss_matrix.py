"""The report's section of the loss matrix: a table, or a picture with the worst domains by name where it is large."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from dylora_mlx.reporting import html, png
from dylora_mlx.reporting.history import History, LossMatrix
from dylora_mlx.reporting.html import MissingData, cell, head
from dylora_mlx.reporting.overview import continual_list, interval, nats, summary
from dylora_mlx.reporting.records import RunRecords, evaluated
from dylora_mlx.reporting.svg import escape

MAX_TABLE = 40
"""Largest number of domains, and of rows, that are drawn as a table."""
WORST = 50
"""Number of domains that are listed by name beside a picture."""
BETTER, WORSE = (0, 102, 204), (204, 85, 0)
"""Colours of the picture's cells: those of the table's (style.py) in its light theme."""


class Cell(NamedTuple):
    """The loss of a domain after a skill."""

    loss: float
    change: float | None
    """Against the base; None without a loss of the base."""
    age: int
    """Skills learned since it was evaluated."""


def forgetting(records: RunRecords, history: History, matrix: LossMatrix) -> str:
    """Draw the loss matrix, coloured by change against the base, and the continual-learning metrics."""
    if len(matrix.rows) < 2:
        raise MissingData("the matrix of losses: no skill has been learned yet")
    rows = carried(matrix)
    changes = [abs(each.change) for row in rows for each in row.values() if each.change is not None]
    scale = max(changes, default=0.0) or 1.0
    is_large = max(len(matrix.domains), len(matrix.rows)) > MAX_TABLE
    drawn = _picture(matrix, rows, scale) + _worst(matrix, rows) if is_large else _table(records, matrix, rows, scale)
    return drawn + continual_list(summary(matrix))


def carried(matrix: LossMatrix) -> list[dict[str, Cell]]:
    """Return the latest loss of every domain after each skill, with its age where it was not evaluated then.

    A domain has no cell before its first loss, nor, where not everything was evaluated, before it was learned.
    """
    base, rows, latest = matrix.rows[0], list[dict[str, Cell]](), dict[str, tuple[float, int]]()
    for number, (label, row) in enumerate(zip(matrix.labels, matrix.rows, strict=True)):
        latest |= {name: (loss, number) for name, loss in row.items()}
        if not number:
            rows.append({name: Cell(loss, 0.0, 0) for name, loss in row.items()})
            continue
        learned = {*matrix.labels[: number + 1], label}
        shown = {n: each for n, each in latest.items() if n in row or n in learned or n not in matrix.labels}
        rows.append(
            {n: Cell(loss, loss - base[n] if n in base else None, number - at) for n, (loss, at) in shown.items()}
        )
    return rows


def _table(records: RunRecords, matrix: LossMatrix, cells: list[dict[str, Cell]], scale: float) -> str:
    rows = []
    for label, values in zip(matrix.labels, cells, strict=True):
        rows.append(
            [head(label), *(_table_cell(values.get(domain), domain == label, scale) for domain in matrix.domains)]
        )
    last = cells[-1]
    final_changes = [nats(None if d not in last else last[d].change, True) for d in matrix.domains]
    rows.append([head("change"), *(cell(text, "sum") for text in final_changes)])
    final = records.results.get("validation")
    if isinstance(final, dict) and all(isinstance(losses, dict) for losses in final.values()):
        of_domains = [final.get(domain, {}) for domain in matrix.domains]
        rows.append([head("95%"), *(cell(interval(losses, "mixture"), "sum") for losses in of_domains)])
        rows.append([head("documents"), *(cell(evaluated(losses), "sum") for losses in of_domains)])
    caption = "Validation loss, nats per token: rows after each skill, columns by domain"
    old = (
        " <i>slanted: not evaluated then, the last value</i>"
        if any(c.age for row in cells for c in row.values())
        else ""
    )
    legend = (
        '<p class="keys"><span class="better">lower than the base</span> '
        f'<span class="worse">higher than the base</span> ◆ the skill just learned{old}</p>'
    )
    return html.table(("after", *matrix.domains), rows, caption, "matrix") + legend


def _table_cell(value: Cell | None, is_own: bool, scale: float) -> str:
    own_class = " own" if is_own else ""
    if value is None or value.change is None:
        return cell(nats(None if value is None else value.loss), own_class.strip())
    css = "better" if value.change <= 0 else "worse"
    mark, text = ("<b>◆</b>" if is_own else ""), nats(value.loss)
    since = f", evaluated {value.age} skill{'s' * (value.age != 1)} before" if value.age else ""
    return (
        f'<td class="{css}{own_class}" style="--g:{min(1, abs(value.change) / scale) * 0.75:.2f}" '
        f'title="{value.change:+.3f} against the base{since}">{f"<i>{text}</i>" if value.age else text}{mark}</td>'
    )


def _picture(matrix: LossMatrix, cells: list[dict[str, Cell]], scale: float) -> str:
    """Draw a pixel for each cell: one row after each skill, one column for each domain."""
    pixels = [[_color(row.get(domain), scale) for domain in matrix.domains] for row in cells]
    caption = (
        f"Validation loss against the base: {len(cells)} rows, the base's and one after each skill, by {len(matrix.domains)} "
        f"columns, the domains. Blue: lower, orange: higher, up to {scale:.3f} nats. Pale: not evaluated then, the last value"
    )
    picture = (
        f'<img class="pixels" alt="{escape(caption)}" width="{len(matrix.domains)}" height="{len(cells)}" '
        f'src="{png.data_uri(pixels)}">'
    )
    return html.figure(picture, caption)


def _color(value: Cell | None, scale: float) -> tuple[int, int, int]:
    if value is None or value.change is None:
        return (255, 255, 255)
    share = min(1.0, abs(value.change) / scale) ** 0.5 * (0.35 if value.age else 1.0)
    target = BETTER if value.change <= 0 else WORSE
    red, green, blue = (round(255 + share * (part - 255)) for part in target)
    return red, green, blue


def _worst(matrix: LossMatrix, cells: list[dict[str, Cell]]) -> str:
    """Return a table of the domains that have lost most since they were learned, or else against the base."""
    learned = {label: row[label].loss for label, row in zip(matrix.labels, cells, strict=True) if label in row}
    last, base = cells[-1], matrix.rows[0]
    rise = {name: each.loss - learned.get(name, base.get(name, each.loss)) for name, each in last.items()}
    worst = sorted(rise, key=lambda name: -rise[name])[:WORST]
    rows = [_worst_row(name, last[name], base.get(name), learned, rise[name]) for name in worst]
    names = ("domain", "base", "learned", "now", "since learned", "evaluated")
    return html.table(names, rows, f"The {len(rows)} of {len(rise)} domains whose loss has risen most, nats per token")


def _worst_row(name: str, now: Cell, base: float | None, learned: Mapping[str, float], rise: float) -> list[str]:
    when = f"{now.age} skill{'s' * (now.age != 1)} ago" if now.age else "now"
    return [head(name), *map(cell, (nats(base), nats(learned.get(name)), nats(now.loss), nats(rise, True), when))]
