"""Print an estimate as tables: before a run, and compared with the run's actual time, memory and disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from dylora_mlx.run.cost.estimate import Estimate, total_seconds
from dylora_mlx.system import console

ASSUMED = """\
Steps and evaluations are counted to the end: early stopping may end a skill sooner. Where similarity cannot tell, a trial
expert comes on top; decisions, the report and loading are not counted. dylora plan says what would be decided."""


def print_estimate(estimate: Estimate) -> None:
    """Print the phases with their time, the parts of memory and disk, and the assumptions."""
    table = Table(title="what the run would take if every skill got an expert", title_justify="left")
    for name in ("phase", "how much", "GFLOP", "MB written", "s"):
        table.add_column(name, justify="left" if name in ("phase", "how much") else "right")
    for phase in estimate["phases"]:
        table.add_row(
            phase["phase"], f"{phase['amount']} {phase['what']}", _or_empty(phase["flops"] / 1e9, 0),
            _or_empty(phase["bytes"] / 1e6, 1), f"{phase['seconds']:.1f}",
        )  # fmt: skip
    table.add_row(
        "all", "", _or_empty(sum(f["flops"] for f in estimate["phases"]) / 1e9, 0), "", f"{estimate['seconds']:.1f}"
    )
    console.render(table)
    rows, length = estimate["sizes"]["step"]
    console.info(
        f"time: {_format_seconds(estimate['seconds'])}, or {_format_seconds(estimate['seconds_if_known'])} "
        f"if the first expert knew every later skill (timed here and now, on rows of {rows} x {length})"
    )
    parts = estimate["memory"] | estimate["process"]
    console.info(
        f"memory: the process takes {_format_bytes(sum(parts.values()))} at the peak ({_format_parts(parts)}); "
        f"MLX's own peak is {_format_bytes(sum(estimate['memory'].values()))}"
    )
    console.info(
        f"disk: {_format_bytes(sum(estimate['disk'].values()))} at the end ({_format_parts(estimate['disk'])}), "
        f"and meanwhile {_format_parts(estimate['meanwhile'])}"
    )
    console.info(ASSUMED)


def print_comparison(estimate: Estimate, decided: Sequence[Mapping[str, Any]], resources: Mapping[str, Any]) -> None:
    """Compare an estimate with the run.

    Args:
        estimate: the estimate from before the run.
        decided: its phases, estimated again from the actual decisions.
        resources: what the run took, as `metadata.write_metadata` returns it.
    """
    table = Table(title="the estimate beside the truth", title_justify="left")
    for name in ("", "estimate", "as decided", "truth", "estimate / truth"):
        table.add_column(name, justify="left" if name == "" else "right")
    before, after, truth = seconds_by_phase(estimate["phases"]), seconds_by_phase(decided), resources["seconds"]
    for name in [*before, *(other for other in truth if other not in before)]:
        cells = [f"{seconds[name]:.1f} s" if name in seconds else "" for seconds in (before, after, truth)]
        table.add_row(name, *cells, _ratio(before.get(name), truth.get(name)))
    total = sum(truth.values())
    table.add_row(
        "all",
        f"{estimate['seconds']:.1f} s",
        f"{total_seconds(decided):.1f} s",
        f"{total:.1f} s",
        _ratio(estimate["seconds"], total),
    )
    steps = [
        next(phase["amount"] for phase in phases if phase["phase"] == "steps")
        for phases in (estimate["phases"], decided)
    ]
    table.add_row("steps", *map(str, steps), str(resources["steps"]), _ratio(steps[0], resources["steps"]))
    arrays, outside = (sum(estimate[name].values()) for name in ("memory", "process"))
    sizes = {"MLX's peak": (arrays, "memory"), "process": (arrays + outside, "resident")}
    for name, (estimated, key) in (sizes | {"disk": (sum(estimate["disk"].values()), "disk")}).items():
        # A run folder of an earlier version lacks the process's memory, in the estimate or in what it took.
        if resources[key] and (outside or key != "resident"):
            table.add_row(
                name, _format_bytes(estimated), "", _format_bytes(resources[key]), _ratio(estimated, resources[key])
            )
    console.render(table)


def seconds_by_phase(phases: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the seconds of each phase by name. A phase may have several kinds of work."""
    seconds: dict[str, float] = {}
    for phase in phases:
        seconds[phase["phase"]] = seconds.get(phase["phase"], 0.0) + phase["seconds"]
    return seconds


def _ratio(estimated: float | None, truth: float | None) -> str:
    return f"{estimated / truth:.2f}" if estimated is not None and truth else ""


def _or_empty(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if value else ""


def _format_seconds(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} minutes"
        if seconds < 7200
        else f"{seconds / 3600:.1f} hours"
    )


def _format_bytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def _format_parts(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {_format_bytes(count)}" for name, count in sizes.items())
