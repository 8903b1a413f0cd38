"""Draw the page that compares several runs side by side."""

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
    """One of the compared runs."""

    name: str
    """Its name on the page, unique among the compared runs."""
    records: RunRecords
    history: History
    matrix: LossMatrix


def comparison_page(folders: Sequence[Path]) -> str:
    """Return the HTML page that compares several runs. Raises UserError if a folder is not a run."""
    all_records = [records.read_records(folder) for folder in folders]
    names = _names(all_records)
    runs = [
        ComparedRun(name, run_records, *_history_and_matrix(run_records))
        for name, run_records in zip(names, all_records, strict=True)
    ]
    page_sections, missing = [], []
    for anchor, title, draw in (
        ("facts", "Facts", _facts), ("losses", "Final losses", _losses), ("tests", "Test losses", _tests),
        ("steps", "Losses over steps", _steps), ("decisions", "Decisions", _decisions),
        ("settings", "What was set differently", _settings),
    ):  # fmt: skip
        try:
            page_sections.append(PageSection(anchor, title, draw(runs)))
        except MissingData as error:
            missing.append(str(error))
        except DAMAGED:
            missing.append(f"{title}: the records are damaged")
    keys = html.legend((color_class(i), run.name, _dash(i)) for i, run in enumerate(runs, 1))
    return assemble_page(f"{len(runs)} runs compared", keys, page_sections, missing)


def _history_and_matrix(run_records: RunRecords) -> tuple[History, LossMatrix]:
    try:
        return history.build_history(run_records), history.loss_matrix(run_records)
    except DAMAGED:
        return History(), LossMatrix([], [], [])


def _names(all_records: Sequence[RunRecords]) -> list[str]:
    """Return the folder names, with as many parent folders as make them unique. A run given twice gets a number."""
    paths = [run_records.folder.parts for run_records in all_records]
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
    facts = [overview.facts(run.records, run.history, run.matrix) for run in runs]
    for run, run_facts in zip(runs, facts, strict=True):
        for key, name, aggregate, unit in (
            ("tokens_per_second", "tokens per second (median)", median, ""),
            ("peak_memory_gb", "peak memory", max, " GB"),
        ):
            values = [v for m in run.history.moments if (v := finite_number(m.record.get(key))) is not None]
            if values:
                run_facts[name] = f"{svg.short_number(aggregate(values))}{unit}"
    names = dict.fromkeys(name for run_facts in facts for name in run_facts)
    rows = [[head(name), *(cell(run_facts.get(name, "-")) for run_facts in facts)] for name in names]
    return _table("", runs, rows, "Each run in short", "words")


def _cells(values: Sequence[float | None], sign: bool = False) -> list[str]:
    """Return the cells of one row of numbers. The lowest is bold if the numbers differ."""
    known = [value for value in values if value is not None]
    best = min(known) if len(set(known)) > 1 else None
    return [cell(nats(v, sign), "best" if best is not None and v == best else "") for v in values]


def _losses(runs: Sequence[ComparedRun]) -> str:
    if all(len(run.matrix.rows) < 2 for run in runs):
        raise MissingData("final losses: no skill has been learned yet in any run")
    final_losses = [run.matrix.rows[-1] if len(run.matrix.rows) > 1 else {} for run in runs]
    domains = dict.fromkeys(name for row in final_losses for name in row)
    rows = [[head(name), *_cells([row.get(name) for row in final_losses])] for name in domains]
    summaries = [overview.summary(run.matrix) for run in runs]
    for key, (name, _) in MEANINGS.items():
        values = [None if summary is None else getattr(summary, key) for summary in summaries]
        rows.append([head(name), *_cells(values, key != "final_mean")])
    note = "<p>The lowest value of a row is bold. Losses compare only between runs with the same base and the same data.</p>"
    return _table("domain", runs, rows, "Validation loss after the last skill, nats per token") + note


def _tests(runs: Sequence[ComparedRun]) -> str:
    measured = [test if isinstance(test := run.records.results.get("test"), dict) else {} for run in runs]
    domains = dict.fromkeys(name for test in measured for name in test)
    if not domains:
        raise MissingData("test losses (results.json): no run is finished")
    rows = []
    for name in domains:
        rows.append([head(name), *_cells([finite_number((test.get(name) or {}).get("mixture")) for test in measured])])
    return _table("domain", runs, rows, "Test loss of the mixture, nats per token")


def _steps(runs: Sequence[ComparedRun]) -> str:
    """Draw each run's validation loss over steps, as the mean over the domains that all runs have."""
    evaluations = [
        [(m.step, losses) for m in run.history.moments if (losses := validation_losses(m.record))] for run in runs
    ]
    domains_of_runs = [
        set().union(*(losses for _, losses in run_evaluations)) for run_evaluations in evaluations if run_evaluations
    ]
    common = set.intersection(*domains_of_runs) if domains_of_runs else set()
    lines = []
    for i, (run, run_evaluations) in enumerate(zip(runs, evaluations, strict=True), 1):
        points: list[Point] = [
            (step, mean(losses[d] for d in sorted(common)))
            for step, losses in run_evaluations
            if common and common <= losses.keys()
        ]
        lines.append(Line(run.name, color_class(i), points, _dash(i)))
    caption = f"Mean validation loss over steps, nats per token, of {len(common)} domains that all runs have"
    if not (chart := html.chart(lines, caption, History())):
        raise MissingData("losses over steps: the runs have no domain in common that was evaluated")
    return chart


def _dash(number: int) -> str:
    return DASHES[(number - 1) % len(DASHES)]


def _decisions(runs: Sequence[ComparedRun]) -> str:
    decisions_of_runs = [
        {d["skill"]: d for d in run.records.decisions if d["action"] not in NON_ARRIVAL_ACTIONS} for run in runs
    ]
    skills = dict.fromkeys(skill for by_skill in decisions_of_runs for skill in by_skill)
    if not skills:
        raise MissingData("decisions: no run has made one")
    rows = [[head(skill), *(cell(_decided(by_skill.get(skill))) for by_skill in decisions_of_runs)] for skill in skills]
    return _table("skill", runs, rows, "What was decided for each skill, and its similarity", "words")


def _decided(decision: dict[str, Any] | None) -> str:
    if decision is None:
        return "-"
    score = finite_number(decision.get("score"))
    to = "base" if decision.get("expert") == 0 else f"expert {decision.get('expert', '?')}"
    return f"{decision['action']} → {to}{'' if score is None else f' ({score:.3f})'}"


def _settings(runs: Sequence[ComparedRun]) -> str:
    flat_options = [_flat(run.records.options) for run in runs]
    names = [
        name
        for name in dict.fromkeys(n for options in flat_options for n in options)
        if len({e.get(name) for e in flat_options}) > 1
    ]
    if not names:
        return "<p>Nothing: their configs are the same.</p>"
    rows = [[head(name), *(cell(options.get(name, "-")) for options in flat_options)] for name in names]
    return _table("option", runs, rows, "Options that differ", "words")


def _flat(options: Any, prefix: str = "") -> dict[str, str]:
    """Flatten nested options to {dotted name: value as text}."""
    if isinstance(options, dict):
        pairs = list(options.items())
    elif isinstance(options, list) and any(isinstance(item, dict) for item in options):
        pairs = [(i, item) for i, item in enumerate(options, 1)]
    else:
        return {prefix: str(options)}
    flattened: dict[str, str] = {}
    for name, value in pairs:
        flattened |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
    return flattened
