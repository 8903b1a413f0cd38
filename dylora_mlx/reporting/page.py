"""Assemble the HTML page of a run from its sections: one self-contained file without external resources."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from dylora_mlx.reporting import experts, history, loss_matrix, overview, records, system
from dylora_mlx.reporting.history import History, LossMatrix
from dylora_mlx.reporting.html import MissingData
from dylora_mlx.reporting.records import RunRecords
from dylora_mlx.reporting.style import STYLE
from dylora_mlx.reporting.svg import escape
from dylora_mlx.system.files import atomic_write

NAME = "report.html"
"""File name of the report in a run folder."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Content-Security-Policy of the page: no scripts, no network."""
OPENING = "<!DOCTYPE html>"
"""First characters of every page; `is_report` recognises a report by them."""
DAMAGED = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, ZeroDivisionError)
"""Exceptions that drawing may raise for records that are valid JSON with unexpected content."""


class PageSection(NamedTuple):
    """One section of a page."""

    anchor: str
    """HTML id."""
    title: str
    """Heading, plain text."""
    body: str
    """HTML below the heading."""


Draw = Callable[[RunRecords, History, LossMatrix], str]
SECTIONS: tuple[tuple[str, str, Draw], ...] = (
    ("tests", "Test losses", overview.tests),
    ("losses", "Losses over steps", overview.over_steps),
    ("matrix", "Matrix of losses", loss_matrix.forgetting),
    ("decisions", "Decisions", experts.decisions),
    ("timeline", "Timeline of experts", experts.timeline),
    ("gates", "Gates by skill", experts.gates),
    ("routing", "Routing and usage", experts.routing),
    ("text", "Text by expert", system.text),
    ("data", "Data and packing", system.data),
    ("speed", "Speed, memory, gradients", system.speed),
    ("settings", "Settings and versions", system.settings),
)
"""Anchor, title and drawing function of each section, in the order of the page."""


def run_page(folder: Path, sections: Collection[str] | None = None) -> str:
    """Return the HTML page of a run. sections: anchors of the sections to draw; None draws all.

    Raises UserError if the folder is not a run.
    """
    run_records = records.read_records(folder)
    run_history, matrix = _history_and_matrix(run_records)
    page_sections, missing = [], []
    for anchor, title, draw in SECTIONS:
        if sections is not None and anchor not in sections:
            continue
        try:
            page_sections.append(PageSection(anchor, title, draw(run_records, run_history, matrix)))
        except MissingData as error:
            missing.append(str(error))
        except DAMAGED:
            missing.append(f"{title}: the records are damaged")
    return assemble_page(
        f"Run {run_records.name}", overview.headline(run_records, run_history, matrix), page_sections, missing
    )


def _history_and_matrix(run_records: RunRecords) -> tuple[History, LossMatrix]:
    """Return the run's history and loss matrix; either is empty if the records are damaged."""
    try:
        run_history = history.build_history(run_records)
    except DAMAGED:
        run_history = History()
    try:
        return run_history, history.loss_matrix(run_records)
    except DAMAGED:
        return run_history, LossMatrix([], [], [])


def assemble_page(title: str, opening: str, sections: Sequence[PageSection], missing: Sequence[str]) -> str:
    """Return the whole HTML document.

    Args:
        title: plain text.
        opening: HTML under the title.
        sections: sections in order.
        missing: a line of plain text for each section that is left out.
    """
    links = "".join(f'<a href="#{s.anchor}">{escape(s.title)}</a>' for s in sections)
    body = "".join(
        f'<section id="{s.anchor}" aria-labelledby="{s.anchor}-title"><h2 id="{s.anchor}-title">{escape(s.title)}</h2>'
        f"{s.body}</section>"
        for s in sections
    )
    lines = "".join(f"<li>{escape(line)}</li>" for line in missing)
    missing_section = f'<section id="missing"><h2>Left out</h2><ul>{lines}</ul></section>' if missing else ""
    return (
        f'{OPENING}\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<header><h1>{escape(title)}</h1>{opening}</header><nav aria-label="sections">{links}</nav>'
        f"<main>{body}{missing_section}</main></body></html>\n"
    )


def write_page(folder: Path, out: Path | None = None) -> Path:
    """Write a run's page to `out`, by default report.html in its folder, and return the path.

    Raises UserError if the folder is not a run, OSError if the file cannot be written.
    """
    return write_file(run_page(folder), folder / NAME if out is None else out)


def is_report(path: Path) -> bool:
    """Whether a file looks like a report, so that a new report may overwrite it. Raises OSError."""
    with path.open("rb") as file:
        return file.read(len(OPENING)) == OPENING.encode()


def write_file(page: str, path: Path) -> Path:
    """Write a page atomically and return its path. Raises OSError."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))  # a record may contain lone surrogates
    return path
