"""A run's page: its sections under one another, in one file that asks for nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from dylora_mlx.reporting import experts, history, overview, records, system
from dylora_mlx.reporting.history import History, LossMatrix
from dylora_mlx.reporting.html import MissingData
from dylora_mlx.reporting.records import RunRecords
from dylora_mlx.reporting.style import STYLE
from dylora_mlx.reporting.svg import escape
from dylora_mlx.system.files import atomic_write

NAME = "report.html"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
OPENING = "<!DOCTYPE html>"
DAMAGED = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, ZeroDivisionError)
"""What records that are JSON, but not ours, may lead to."""


class PageSection(NamedTuple):
    """Its anchor, title and HTML."""

    anchor: str
    title: str
    body: str


Draw = Callable[[RunRecords, History, LossMatrix], str]
SECTIONS: tuple[tuple[str, str, Draw], ...] = (
    ("tests", "Test losses", overview.tests),
    ("losses", "Losses over steps", overview.over_steps),
    ("matrix", "Matrix of losses", overview.forgetting),
    ("decisions", "Decisions", experts.decisions),
    ("timeline", "Timeline of experts", experts.timeline),
    ("gates", "Gates by skill", experts.gates),
    ("routing", "Routing and usage", experts.routing),
    ("text", "Text by expert", system.text),
    ("packing", "Packing", system.packing),
    ("speed", "Speed, memory, gradients", system.speed),
    ("settings", "Settings and versions", system.settings),
)


def run_page(folder: Path, sections: Collection[str] | None = None) -> str:
    """The page of one run, or of some of its sections. Raises UserError when there is no run."""
    found = records.read_records(folder)
    told, matrix = _told(found)
    made, missing = [], []
    for anchor, title, draw in SECTIONS:
        if sections is not None and anchor not in sections:
            continue
        try:
            made.append(PageSection(anchor, title, draw(found, told, matrix)))
        except MissingData as why:
            missing.append(str(why))
        except DAMAGED:
            missing.append(f"{title}: the records are damaged")
    return assemble_page(f"Run {found.name}", overview.headline(found, told, matrix), made, missing)


def _told(found: RunRecords) -> tuple[History, LossMatrix]:
    """What the records tell; what contradicts itself tells nothing."""
    try:
        told = history.build_history(found)
    except DAMAGED:
        told = History()
    try:
        return told, history.loss_matrix(found)
    except DAMAGED:
        return told, LossMatrix([], [], [])


def assemble_page(title: str, opening: str, sections: Sequence[PageSection], missing: Sequence[str]) -> str:
    """The whole document. opening: HTML under the title; missing: a line for everything that is left out."""
    links = "".join(f'<a href="#{s.anchor}">{escape(s.title)}</a>' for s in sections)
    body = "".join(
        f'<section id="{s.anchor}" aria-labelledby="{s.anchor}-title"><h2 id="{s.anchor}-title">{escape(s.title)}</h2>'
        f"{s.body}</section>"
        for s in sections
    )
    lines = "".join(f"<li>{escape(line)}</li>" for line in missing)
    left = f'<section id="missing"><h2>Left out</h2><ul>{lines}</ul></section>' if missing else ""
    return (
        f'{OPENING}\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<header><h1>{escape(title)}</h1>{opening}</header><nav aria-label="sections">{links}</nav>'
        f"<main>{body}{left}</main></body></html>\n"
    )


def write_page(folder: Path, out: Path | None = None) -> Path:
    """Write a run's page (report.html in its folder unless told otherwise). Raises UserError, OSError."""
    return write_file(run_page(folder), folder / NAME if out is None else out)


def is_report(path: Path) -> bool:
    """Whether a file begins as a page does, so that a new one may take its place."""
    with path.open("rb") as file:
        return file.read(len(OPENING)) == OPENING.encode()


def write_file(page: str, path: Path) -> Path:
    """Write a page. Raises OSError."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))
    return path
