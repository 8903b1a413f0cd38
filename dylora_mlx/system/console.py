"""What a person or a script sees of a long piece of work: lines, warnings, progress; or JSON events; or nothing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")
OutputMode = Literal["text", "quiet", "json", "silent"]

PIPE_WIDTH = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 240
"""Columns of a table that goes into a file or a pipe: nobody's screen sets its limit."""
console = Console(highlight=False, soft_wrap=True, width=PIPE_WIDTH)
_mode: OutputMode = "text"
_bars: Progress | None = None


@contextmanager
def output_mode(mode: OutputMode) -> Iterator[None]:
    """text: lines for people, and bars in a terminal; quiet: warnings alone; json: an event a line on standard output; silent:
    nothing, where another rank says the same."""
    global _mode
    before = _mode
    _mode, console.quiet = mode, mode != "text"
    try:
        yield
    finally:
        _mode, console.quiet = before, before != "text"


def info(text: str, style: str = "") -> None:
    console.print(text, style=style, markup=False)


def render(renderable: RenderableType) -> None:
    """A table, or whatever else rich draws."""
    console.print(renderable)


def warn(text: str) -> None:
    """On standard error in every mode but silent: what a script reads from standard output stays clean."""
    if _mode == "silent":
        return
    with paused_progress():
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"warning: {text}", style="yellow", markup=False)


def event(kind: str, **fields: Any) -> None:
    """One JSON object on standard output, in that mode only."""
    if _mode == "json":
        print(json.dumps({"event": kind, **fields}), flush=True)


class ProgressBar:
    """One bar among those that are shown; without a terminal there is none."""

    def __init__(self, description: str, total: int | None, done: int):
        self._task = None if _bars is None else _bars.add_task(description, total=total, completed=done, note="")

    def advance(self, note: str = "") -> None:
        """One more is done. note: what there is to say now, such as a loss."""
        if _bars is not None and self._task is not None:
            _bars.update(self._task, advance=1, note=note)

    def close(self) -> None:
        if _bars is not None and self._task is not None:
            _bars.remove_task(self._task)


@contextmanager
def progress(description: str, total: int | None = None, done: int = 0) -> Iterator[ProgressBar]:
    """A bar with the time that is left, for as long as something takes; phases may lie within each other."""
    global _bars
    outermost = _bars is None and _mode == "text" and console.is_terminal
    if outermost:
        _bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console, transient=True,
        )  # fmt: skip
        _bars.start()
    shown = ProgressBar(description, total, done)
    try:
        yield shown
    finally:
        shown.close()
        if outermost and _bars is not None:
            _bars.stop()
            _bars = None


def track(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """The items, one by one, under a bar."""
    with progress(description, total) as shown:
        for item in items:
            yield item
            shown.advance()


@contextmanager
def paused_progress() -> Iterator[None]:
    """The bars taken off the screen for a moment, for what is printed past them."""
    live = _bars is not None and _bars.live.is_started
    if live and _bars is not None:
        _bars.stop()
    try:
        yield
    finally:
        if live and _bars is not None:
            sys.stderr.flush()
            _bars.start()
