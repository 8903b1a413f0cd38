"""Report sections about the run: facts, test losses, losses over steps; and the continual-learning metrics."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from dylora_mlx.reporting import html
from dylora_mlx.reporting.continual import ContinualMetrics, continual_metrics
from dylora_mlx.reporting.history import History, LossMatrix
from dylora_mlx.reporting.html import MissingData, cell, head
from dylora_mlx.reporting.records import RunRecords, evaluated, finite_number, validation_losses
from dylora_mlx.reporting.svg import Point, escape


def facts(records: RunRecords, history: History, matrix: LossMatrix) -> dict[str, str]:
    """Return the headline's facts by name, without the unknown ones."""
    info, base = records.info, records.info.get("base")
    if base is None and isinstance(model := records.options.get("model"), dict):
        base = model.get("base")
    base = html.without_home(base) if isinstance(base, str) else base
    alive = sum(expert.ended is None for expert in history.experts)
    gone = len(history.experts) - alive
    learned, planned = len(matrix.rows) - 1, records.options.get("skills")
    skills = f"{learned} learned" if matrix.rows else ""
    if isinstance(planned, list) and info.get("status") == "running":
        skills += f" of {max(len(planned), learned)}" if skills else f"{len(planned)} planned"
    rows = {
        "status": info.get("status"), "base": base, "weights": info.get("dtype"),
        "device": str(info.get("device", "")).removeprefix("Device(").removesuffix(")").replace(", 0", ""),
        "skills": skills,
        "experts": f"{alive}{f' ({gone} merged or evicted)' if gone else ''}",
        "steps": f"{history.last:g}" if records.metrics else records.results.get("steps"),
        "begun": when(records.begun), "last record": when(records.written),
    }  # fmt: skip
    return {name: str(value) for name, value in rows.items() if value not in (None, "")}


def when(seconds: float | None) -> str:
    """Format a time, in seconds since the epoch, in the local time zone. Empty for None."""
    return "" if seconds is None else datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M %Z")


def headline(records: RunRecords, history: History, matrix: LossMatrix) -> str:
    """Draw the page's headline: the facts, and how many damaged lines were skipped."""
    rows = facts(records, history, matrix).items()
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in rows)
    skipped = f"<p>{records.skipped} damaged lines of its records were skipped.</p>" if records.skipped else ""
    return f'<dl class="facts">{listed}</dl>{skipped}'


def tests(records: RunRecords, history: History, matrix: LossMatrix) -> str:
    """Draw the table of test losses: base, mixture, own expert, regret (mixture minus own expert), their intervals, and how
    many documents they are of."""
    measured = records.results.get("test")
    if not isinstance(measured, dict) or not measured:
        raise MissingData("test losses (results.json): they are measured when a run ends")
    rows = []
    for name, losses in measured.items():
        values = [finite_number(losses.get(kind)) for kind in ("base", "mixture", "own_expert")]
        _, mixture, own_expert = values
        regret = "-" if mixture is None or own_expert is None else f"{mixture - own_expert:+.3f}"
        expert = history.serving.get(name)
        expert_cell = "-" if expert is None else f"{html.swatch(expert)}{escape(history.label(expert))}"
        ends = (interval(losses, "mixture"), interval(losses, "change", sign=True), evaluated(losses))
        rows.append([
            head(name), f"<td>{expert_cell}</td>", *(cell(nats(v)) for v in values), cell(regret), *map(cell, ends),
        ])  # fmt: skip
    note = (
        "<p>Regret: mixture minus own expert, the cost of routing token by token; below 0 other experts help, or the own expert is "
        "the wrong one. 95%: bootstrap intervals over documents, of "
        "the mixture's loss and of its change against the base on the same documents.</p>"
    )
    names = ("domain", "expert", "base", "mixture", "own expert", "regret", "mixture, 95%", "change, 95%", "documents")
    return html.table(names, rows, "Test loss, nats per token") + note


def interval(losses: Any, kind: str, sign: bool = False) -> str:
    """Format an interval of an entry of results.json, or "-" if it has none, as in runs of earlier versions."""
    intervals = losses.get("intervals")
    ends = intervals.get(kind) if isinstance(intervals, dict) else None
    if not isinstance(ends, list) or len(ends) != 2 or any(finite_number(end) is None for end in ends):
        return "-"
    return " to ".join(nats(end, sign) for end in ends)


def nats(value: float | None, sign: bool = False) -> str:
    """Format a loss in nats, or "-" for None. sign: always show the sign, for differences."""
    return "-" if value is None else f"{value:+.3f}" if sign else f"{value:.3f}"


MAX_LINES = 40
"""Largest number of domains whose losses are drawn as lines over steps."""


def over_steps(records: RunRecords, history: History, matrix: LossMatrix) -> str:
    """Draw the validation losses over steps, of the domains that were evaluated last where there are many."""
    by_domain: dict[str, dict[float, float]] = {}
    for moment in history.moments:
        for name, loss in validation_losses(moment.record).items():
            by_domain.setdefault(name, {})[moment.step] = loss
    shown = sorted(by_domain, key=lambda name: -max(by_domain[name]))[:MAX_LINES]
    points: dict[str, list[Point]] = {n: list(losses.items()) for n, losses in by_domain.items() if n in shown}
    chart = html.chart(
        html.domain_lines(points, history), "Validation loss over steps, nats per token, by domain", history
    )
    if not chart:
        raise MissingData("losses over steps (metrics.jsonl): nothing has been evaluated yet")
    of_all = (
        f" Of {len(by_domain)} domains, the {MAX_LINES} that were evaluated last." if len(by_domain) > MAX_LINES else ""
    )
    return (
        f"{chart}{html.skill_legend(history)}<p>A line has the colour of the expert that serves the domain.{of_all}</p>"
    )


def summary(matrix: LossMatrix) -> ContinualMetrics | None:
    """Compute the continual-learning metrics, or return None if the matrix lacks a cell that they need."""
    try:
        return continual_metrics(matrix.rows, matrix.labels[1:]) if len(matrix.rows) > 1 else None
    except KeyError:
        return None


MEANINGS = {
    "final_mean": ("mean of skills", "mean loss of the skills at the end"),
    "bwt": ("backward transfer (BWT)", "mean change since each skill was learned; below 0: later skills helped"),
    "forgetting": ("forgetting", "mean rise over each skill's best earlier loss"),
    "fwt": ("forward transfer (FWT)", "mean change of a skill's loss before it was learned"),
}
"""Title and description of each field of ContinualMetrics."""


def continual_list(metrics: ContinualMetrics | None) -> str:
    """Return the continual-learning metrics as an HTML list. Empty for None."""
    if metrics is None:
        return ""
    items = []
    for key, value in metrics._asdict().items():
        name, meaning = MEANINGS[key]
        text = "-" if value is None else f"{value:.4f}" if key == "final_mean" else f"{value:+.4f}"
        items.append(f"<div><dt>{name}</dt><dd>{text}</dd><dd><small>{meaning}</small></dd></div>")
    return f'<dl class="facts">{"".join(items)}</dl>'
