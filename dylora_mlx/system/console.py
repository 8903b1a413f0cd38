"""Console output: lines, tables, warnings and progress bars for people, JSON events for scripts.

The output mode (`output_mode`) belongs to the process. Tables and bars are drawn by Rich.
"""

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
OutputMode = Literal["text", "verbose", "quiet", "json", "silent"]
FOR_PEOPLE = ("text", "verbose")
"""Modes that print lines, tables and progress bars."""

PIPE_WIDTH = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 240
"""Width of tables, in columns, when standard output is a file or a pipe; None lets Rich use the terminal's width."""
console = Console(highlight=False, soft_wrap=True, width=PIPE_WIDTH)
_mode: OutputMode = "text"
_bars: Progress | None = None
"""The live display that all nested progress bars share; None while nothing is shown."""


@contextmanager
def output_mode(mode: OutputMode) -> Iterator[None]:
    """Set the output mode within the block.

    Args:
        mode: "text" prints lines, and progress bars in a terminal; "verbose" prints details too. "quiet" prints warnings
            only. "json" prints one event a line on standard output, and warnings. "silent" prints nothing: another rank
            prints the same.
    """
    global _mode
    before = _mode
    _mode, console.quiet = mode, mode not in FOR_PEOPLE
    try:
        yield
    finally:
        _mode, console.quiet = before, before not in FOR_PEOPLE


def is_verbose() -> bool:
    """Whether details are printed."""
    return _mode == "verbose"


def info(text: str, style: str = "") -> None:
    """Print a line for people, with no Rich markup. Only in the modes for people."""
    console.print(text, style=style, markup=False)


def detail(text: str) -> None:
    """Print a line of details. Only in verbose mode."""
    if is_verbose():
        info(text)


def render(renderable: RenderableType) -> None:
    """Print a table or any other Rich renderable. Only in the modes for people."""
    console.print(renderable)


def warn(text: str) -> None:
    """Print a warning in every mode but silent. It goes to standard error, so that a script can parse standard output."""
    if _mode == "silent":
        return
    with paused_progress():
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"warning: {text}", style="yellow", markup=False)


def event(kind: str, **fields: Any) -> None:
    """Print one JSON object on standard output: `kind` under "event", and the fields. Only in JSON mode."""
    if _mode == "json":
        print(json.dumps({"event": kind, **fields}), flush=True)


class ProgressBar:
    """One progress bar of the live display. It does nothing outside a terminal."""

    def __init__(self, description: str, total: int | None, done: int):
        self._task = None if _bars is None else _bars.add_task(description, total=total, completed=done, note="")

    def advance(self, note: str = "") -> None:
        """Count one more item as done. `note` is shown beside the bar, such as the loss."""
        if _bars is not None and self._task is not None:
            _bars.update(self._task, advance=1, note=note)

    def close(self) -> None:
        if _bars is not None and self._task is not None:
            _bars.remove_task(self._task)


@contextmanager
def progress(description: str, total: int | None = None, done: int = 0) -> Iterator[ProgressBar]:
    """Show a progress bar with elapsed and remaining time within the block. Blocks may be nested.

    Args:
        description: text in front of the bar.
        total: number of items, None if unknown.
        done: items that are already done, such as the steps before a resumed one.
    """
    global _bars
    outermost = _bars is None and _mode in FOR_PEOPLE and console.is_terminal
    if outermost:
        _bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console, transient=True,
        )  # fmt: skip
        _bars.start()
    bar = ProgressBar(description, total, done)
    try:
        yield bar
    finally:
        bar.close()
        if outermost and _bars is not None:
            _bars.stop()
            _bars = None


def track(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """Yield the items, and advance a progress bar after each."""
    with progress(description, total) as bar:
        for item in items:
            yield item
            bar.advance()


@contextmanager
def paused_progress() -> Iterator[None]:
    """Take the progress bars off the screen within the block, for output that does not go through their console."""
    live = _bars is not None and _bars.live.is_started
    if live and _bars is not None:
        _bars.stop()
    try:
        yield
    finally:
        if live and _bars is not None:
            # Flushed before the bars are drawn again, so that buffered text does not end up between them.
            sys.stderr.flush()
            _bars.start()
