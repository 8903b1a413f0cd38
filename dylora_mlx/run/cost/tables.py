"""An estimate as a person reads it: before a run, and beside what the run took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from dylora_mlx.run.cost.estimate import Estimate, total_seconds
from dylora_mlx.system import console

ASSUMED = """\
Steps and evaluations are counted to the end: early stopping may end a skill sooner. Where similarity cannot tell, a trial
expert comes on top; decisions, the report and loading are not counted. dylora plan says what would be decided."""


def print_estimate(made: Estimate) -> None:
    """The phases with their time, memory and disk by parts, and what is assumed."""
    table = Table(title="what the run would take if every skill got an expert", title_justify="left")
    for name in ("phase", "how much", "GFLOP", "MB written", "s"):
        table.add_column(name, justify="left" if name in ("phase", "how much") else "right")
    for found in made["phases"]:
        table.add_row(
            found["phase"], f"{found['amount']} {found['what']}", _or_empty(found["flops"] / 1e9, 0),
            _or_empty(found["bytes"] / 1e6, 1), f"{found['seconds']:.1f}",
        )  # fmt: skip
    table.add_row("all", "", _or_empty(sum(f["flops"] for f in made["phases"]) / 1e9, 0), "", f"{made['seconds']:.1f}")
    console.render(table)
    rows, length = made["sizes"]["step"]
    console.info(
        f"time: {_lasting(made['seconds'])}, or {_lasting(made['seconds_if_known'])} if the first expert knew every later skill "
        f"(timed here and now, on rows of {rows} x {length})"
    )
    cache = "" if made["cache"] is None else f"; MLX keeps up to {_size(made['cache'])} more for reuse"
    console.info(f"memory: {_size(sum(made['memory'].values()))} at the peak ({_parts(made['memory'])}){cache}")
    console.info(
        f"disk: {_size(sum(made['disk'].values()))} at the end ({_parts(made['disk'])}), and meanwhile {_parts(made['meanwhile'])}"
    )
    console.info(ASSUMED)


def print_comparison(made: Estimate, decided: Sequence[Mapping[str, Any]], spent: Mapping[str, Any]) -> None:
    """The estimate, the same count for what was decided, and the truth. spent: see `identity.describe`."""
    table = Table(title="the estimate beside the truth", title_justify="left")
    for name in ("", "estimate", "as decided", "truth", "estimate / truth"):
        table.add_column(name, justify="left" if name == "" else "right")
    before, after, truth = seconds_by_phase(made["phases"]), seconds_by_phase(decided), spent["seconds"]
    for name in [*before, *(other for other in truth if other not in before)]:
        cells = [f"{where[name]:.1f} s" if name in where else "" for where in (before, after, truth)]
        table.add_row(name, *cells, _ratio(before.get(name), truth.get(name)))
    whole = sum(truth.values())
    table.add_row(
        "all",
        f"{made['seconds']:.1f} s",
        f"{total_seconds(decided):.1f} s",
        f"{whole:.1f} s",
        _ratio(made["seconds"], whole),
    )
    steps = [next(f["amount"] for f in found if f["phase"] == "steps") for found in (made["phases"], decided)]
    table.add_row("steps", *map(str, steps), str(spent["steps"]), _ratio(steps[0], spent["steps"]))
    for name, guess in (("memory", sum(made["memory"].values())), ("disk", sum(made["disk"].values()))):
        table.add_row(name, _size(guess), "", _size(spent[name]), _ratio(guess, spent[name]))
    console.render(table)


def seconds_by_phase(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of each phase."""
    seconds: dict[str, float] = {}
    for phase in found:
        seconds[phase["phase"]] = seconds.get(phase["phase"], 0.0) + phase["seconds"]
    return seconds


def _ratio(estimated: float | None, truth: float | None) -> str:
    return f"{estimated / truth:.2f}" if estimated is not None and truth else ""


def _or_empty(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if value else ""


def _lasting(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} minutes"
        if seconds < 7200
        else f"{seconds / 3600:.1f} hours"
    )


def _size(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def _parts(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {_size(count)}" for name, count in sizes.items())
