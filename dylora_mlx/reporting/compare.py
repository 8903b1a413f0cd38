"""Several runs side by side in one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

from dylora_mlx.growth.decide.decision_log import NON_ARRIVAL_ACTIONS
from dylora_mlx.reporting import history, html, overview, records, svg
from dylora_mlx.reporting.history import History, LossMatrix
from dylora_mlx.reporting.html import DASHES, MissingData, cell, head
from dylora_mlx.reporting.overview import MEANINGS, nats
from dylora_mlx.reporting.page import DAMAGED, PageSection, assemble_page
from dylora_mlx.reporting.records import RunRecords, finite_number, validation_losses
from dylora_mlx.reporting.style import color_class
from dylora_mlx.reporting.svg import Line, Point


class ComparedRun(NamedTuple):
    """A run among several. name: unlike the others'."""

    name: str
    found: RunRecords
    told: History
    matrix: LossMatrix


def comparison_page(folders: Sequence[Path]) -> str:
    """The page of several runs. Raises UserError when one of them is none."""
    found = [records.read_records(folder) for folder in folders]
    names = _names(found)
    runs = [ComparedRun(name, one, *_told(one)) for name, one in zip(names, found, strict=True)]
    made, missing = [], []
    for anchor, title, draw in (
        ("facts", "Facts", _facts), ("losses", "Final losses", _losses), ("tests", "Test losses", _tests),
        ("steps", "Losses over steps", _steps), ("decisions", "Decisions", _decisions),
        ("settings", "What was set differently", _settings),
    ):  # fmt: skip
        try:
            made.append(PageSection(anchor, title, draw(runs)))
        except MissingData as why:
            missing.append(str(why))
        except DAMAGED:
            missing.append(f"{title}: the records are damaged")
    keys = html.legend((color_class(i), run.name, _dash(i)) for i, run in enumerate(runs, 1))
    return assemble_page(f"{len(runs)} runs compared", keys, made, missing)


def _told(found: RunRecords) -> tuple[History, LossMatrix]:
    try:
        return history.build_history(found), history.loss_matrix(found)
    except DAMAGED:
        return History(), LossMatrix([], [], [])


def _names(found: Sequence[RunRecords]) -> list[str]:
    """Folder names, with as many folders around them as it takes to tell them apart; the same run twice: numbered."""
    paths = [one.folder.parts for one in found]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-depth:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]  # pyright: ignore


def _table(
    first: str, runs: Sequence[ComparedRun], rows: Sequence[Sequence[str]], caption: str, classes: str = ""
) -> str:
    return html.table((first, *(run.name for run in runs)), rows, caption, classes)


def _facts(runs: Sequence[ComparedRun]) -> str:
    facts = [overview.facts(run.found, run.told, run.matrix) for run in runs]
    for run, known in zip(runs, facts, strict=True):
        for key, name, take, unit in (
            ("tokens_per_second", "tokens per second (median)", median, ""),
            ("peak_memory_gb", "peak memory", max, " GB"),
        ):
            values = [v for m in run.told.moments if (v := finite_number(m.record.get(key))) is not None]
            if values:
                known[name] = f"{svg.short_number(take(values))}{unit}"
    names = dict.fromkeys(name for known in facts for name in known)
    rows = [[head(name), *(cell(known.get(name, "-")) for known in facts)] for name in names]
    return _table("", runs, rows, "Each run in short", "words")


def _cells(values: Sequence[float | None], sign: bool = False) -> list[str]:
    """Numbers of one row, the lowest in bold where they differ."""
    known = [value for value in values if value is not None]
    best = min(known) if len(set(known)) > 1 else None
    return [cell(nats(v, sign), "best" if best is not None and v == best else "") for v in values]


def _losses(runs: Sequence[ComparedRun]) -> str:
    if all(len(run.matrix.rows) < 2 for run in runs):
        raise MissingData("final losses: no skill has been learned yet in any run")
    last = [run.matrix.rows[-1] if len(run.matrix.rows) > 1 else {} for run in runs]
    domains = dict.fromkeys(name for row in last for name in row)
    rows = [[head(name), *_cells([row.get(name) for row in last])] for name in domains]
    found = [overview.summary(run.matrix) for run in runs]
    for key, (name, _) in MEANINGS.items():
        values = [None if one is None else getattr(one, key) for one in found]
        rows.append([head(name), *_cells(values, key != "final_mean")])
    told = "<p>The lowest of a row is bold; losses of other bases or other data do not compare.</p>"
    return _table("domain", runs, rows, "Validation loss after the last skill, nats per token") + told


def _tests(runs: Sequence[ComparedRun]) -> str:
    measured = [test if isinstance(test := run.found.results.get("test"), dict) else {} for run in runs]
    domains = dict.fromkeys(name for test in measured for name in test)
    if not domains:
        raise MissingData("test losses (results.json): no run is finished")
    rows = []
    for name in domains:
        rows.append([head(name), *_cells([finite_number((test.get(name) or {}).get("mixture")) for test in measured])])
    return _table("domain", runs, rows, "Test loss of the mixture, nats per token")


def _steps(runs: Sequence[ComparedRun]) -> str:
    """The mean over the domains that all runs have, over steps."""
    evaluated = [[(m.step, found) for m in run.told.moments if (found := validation_losses(m.record))] for run in runs]
    having = [set().union(*(found for _, found in each)) for each in evaluated if each]
    common = set.intersection(*having) if having else set()
    lines = []
    for i, (run, each) in enumerate(zip(runs, evaluated, strict=True), 1):
        points: list[Point] = [
            (step, mean(found[d] for d in sorted(common))) for step, found in each if common and common <= found.keys()
        ]
        lines.append(Line(run.name, color_class(i), points, _dash(i)))
    caption = f"Mean validation loss over steps, nats per token, of {len(common)} domains that all runs have"
    if not (drawn := html.chart(lines, caption, History())):
        raise MissingData("losses over steps: the runs have no domain in common that was evaluated")
    return drawn


def _dash(number: int) -> str:
    return DASHES[(number - 1) % len(DASHES)]


def _decisions(runs: Sequence[ComparedRun]) -> str:
    made = [{d["skill"]: d for d in run.found.decisions if d["action"] not in NON_ARRIVAL_ACTIONS} for run in runs]
    skills = dict.fromkeys(skill for each in made for skill in each)
    if not skills:
        raise MissingData("decisions: no run has made one")
    rows = [[head(skill), *(cell(_decided(each.get(skill))) for each in made)] for skill in skills]
    return _table("skill", runs, rows, "What was decided for each skill, and its similarity", "words")


def _decided(decision: dict[str, Any] | None) -> str:
    if decision is None:
        return "-"
    score = finite_number(decision.get("score"))
    to = "base" if decision.get("expert") == 0 else f"expert {decision.get('expert', '?')}"
    return f"{decision['action']} → {to}{'' if score is None else f' ({score:.3f})'}"


def _settings(runs: Sequence[ComparedRun]) -> str:
    flat = [_flat(run.found.options) for run in runs]
    names = [name for name in dict.fromkeys(n for each in flat for n in each) if len({e.get(name) for e in flat}) > 1]
    if not names:
        return "<p>Nothing: their configs are the same.</p>"
    rows = [[head(name), *(cell(each.get(name, "-")) for each in flat)] for name in names]
    return _table("option", runs, rows, "Options that differ", "words")


def _flat(options: Any, prefix: str = "") -> dict[str, str]:
    """Options by their dotted names, as text."""
    if isinstance(options, dict):
        pairs = list(options.items())
    elif isinstance(options, list) and any(isinstance(item, dict) for item in options):
        pairs = [(i, item) for i, item in enumerate(options, 1)]
    else:
        return {prefix: str(options)}
    found: dict[str, str] = {}
    for name, value in pairs:
        found |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
    return found
