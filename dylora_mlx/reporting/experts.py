"""Report sections about experts: decisions, timeline, gates by skill, routing and usage."""

from __future__ import annotations

from typing import Any

from dylora_mlx.growth.decide.decision_log import NON_ARRIVAL_ACTIONS, limits_text
from dylora_mlx.reporting import html, svg
from dylora_mlx.reporting.history import ExpertHistory, History, LossMatrix
from dylora_mlx.reporting.html import MissingData
from dylora_mlx.reporting.records import RunRecords, finite_number
from dylora_mlx.reporting.sentences import sentence
from dylora_mlx.reporting.style import color_class
from dylora_mlx.reporting.svg import BarPart, Line, Point, escape

SOLID = {"dense": 0.4, "annealing": 0.6, "mature": 0.85, "refined": 1.0, "undone": 0.5, "frozen": 0.18}
"""Opacity of each phase in the timeline, 0 to 1."""
PHASES = {
    "dense": "dense: all gates are soft", "annealing": "annealing: few experts per token, falling temperature",
    "mature": "mature: the final routing", "refined": "refined: trained again on a skill it knows",
    "undone": "refined, but rolled back", "frozen": "frozen",
}  # fmt: skip
"""Phases and their descriptions in the timeline's legend."""


MAX_DRAWN = 60
"""Largest number of decisions and experts that are drawn, the newest."""
MAX_EVALUATIONS = 24
"""Largest number of evaluations whose gates are drawn, the newest."""
MAX_LINES = 24
"""Largest number of experts that have a line in a chart."""


def decisions(records: RunRecords, history: History, matrix: LossMatrix) -> str:
    """Draw every decision: similarity, its interval, the threshold, the action, the reason and the outcome."""
    if not records.decisions:
        raise MissingData("decisions (decisions.jsonl): none has been made yet")
    scores = [
        finite_number((d.get("interval") or [None])[0]) or finite_number(d.get("score")) or 0.0
        for d in records.decisions
    ]
    low = min(0.0, *scores)
    drawn = records.decisions[-MAX_DRAWN:]
    rows = _earlier_decisions(records.decisions[: -len(drawn)]) + "".join(_decision(each, low) for each in drawn)
    legend = (
        '<p class="keys">Dot: similarity to the nearest known skill (1: the same kind of text). Band: its bootstrap '
        "interval. Vertical marks: a skill left of the first is new, one at or right of the last is known; between two "
        "marks similarity cannot tell.</p>"
    )
    return legend + rows


def _earlier_decisions(earlier: list[dict[str, Any]]) -> str:
    """Return a folded table of the decisions before those that are drawn. Empty without any."""
    if not earlier:
        return ""
    names = ("skill", "action", "expert", "similarity", "base", "loss")
    rows = []
    for each in earlier:
        recorded = each.get("outcome")
        outcome: dict[str, Any] = recorded if isinstance(recorded, dict) else {}
        numbers = [finite_number(value) for value in (each.get("score"), outcome.get("loss_base"), outcome.get("loss"))]
        cells = [html.cell(each["action"]), html.cell(each.get("expert", "-"))]
        rows.append([html.head(each["skill"]), *cells, *(html.cell("-" if n is None else f"{n:.3f}") for n in numbers)])
    table = html.table(names, rows, f"The {len(earlier)} decisions before")
    return f"<details><summary>{len(earlier)} earlier decisions</summary>{table}</details>"


def _decision(decision: dict[str, Any], low: float) -> str:
    score, threshold = finite_number(decision.get("score")), finite_number(decision.get("threshold"))
    ends = [finite_number(end) for end in decision.get("interval") or []]
    bounds = (ends[0], ends[1]) if len(ends) == 2 and ends[0] is not None and ends[1] is not None else None
    chart = ""
    if score is not None and decision["action"] not in NON_ARRIVAL_ACTIONS:
        limits = [limit for end in decision.get("limits") or [] if (limit := finite_number(end)) is not None]
        marks = limits if len(limits) == 2 else [] if threshold is None else [threshold]
        judged_by = f", {limits_text(marks[0], marks if len(marks) == 2 else None)}" if marks else ""
        interval_text = "" if bounds is None else f" (interval {bounds[0]:.3f} to {bounds[1]:.3f})"
        text = f"similarity {score:.3f}{interval_text}{judged_by}"
        chart = svg.interval(score, bounds, marks, low, text) + f"<small>{escape(text)}</small>"
    summary = f"<p><strong>{escape(decision['action'])}</strong>: {escape(decision['skill'])} {escape(_describe_action(decision))}.</p>"
    reason = f"<p>{escape(decision.get('reason', ''))}</p>" if decision.get("reason") else ""
    return html.row(
        f"<h3>{escape(decision['skill'])}</h3>", chart, summary + reason + _outcome(decision.get("outcome"))
    )


def _describe_action(decision: dict[str, Any]) -> str:
    try:
        return sentence(decision)
    except (KeyError, TypeError, ValueError, AttributeError):
        return f"expert {decision.get('expert', '?')}"


def _outcome(outcome: Any) -> str:
    if not isinstance(outcome, dict):
        return ""
    sentences = []
    base, before, after = (finite_number(outcome.get(name)) for name in ("loss_base", "loss_before", "loss"))
    if before is not None and after is not None:
        base_text = "" if base is None else f" (base alone {base:.3f})"
        sentences.append(f"Its validation loss went from {before:.3f}{base_text} to {after:.3f}.")
    for what, verdict in (("refinement", outcome.get("refined")), ("new expert", outcome.get("created"))):
        if isinstance(verdict, dict):
            verb = "kept" if verdict.get("kept") else "undone"
            sentences.append(f"The {what} was {verb}: {verdict.get('reason', '')}.")
    return f"<p>{escape(' '.join(sentences))}</p>" if sentences else ""


def timeline(records: RunRecords, history: History, matrix: LossMatrix) -> str:
    """Draw a bar for each expert over steps, coloured by expert and shaded by phase."""
    if not history.experts:
        raise MissingData("the timeline of experts: there is none yet")
    if not history.last:
        raise MissingData("the timeline of experts (metrics.jsonl): no step has been recorded")
    shown = history.experts[-MAX_DRAWN:]
    rows = "".join(_timeline_row(expert, history.last) for expert in shown)
    left_out = len(history.experts) - len(shown)
    note = f"<p>The newest {len(shown)} experts; {left_out} earlier ones are left out.</p>" if left_out else ""
    keys = "".join(
        f'<li><i class="swatch e0" style="opacity:{SOLID[kind]}"></i>{escape(meaning)}</li>'
        for kind, meaning in PHASES.items()
    )
    axis = html.row("", f'<div class="ends"><span>step 0</span><span>{history.last:g}</span></div>')
    return f'{note}<div class="bars">{rows}{axis}</div><ul class="legend">{keys}</ul>'


def _timeline_row(expert: ExpertHistory, last: float) -> str:
    """Draw one expert's bar. Steps between its phases, and after the last, count as frozen."""
    end, css, at, phase_spans = (
        expert.ended[1] if expert.ended else last,
        color_class(expert.number),
        expert.born,
        [],
    )
    for phase in expert.phases:
        if phase.start > at:
            phase_spans.append((at, phase.start, "frozen", ""))
        phase_spans.append((phase.start, phase.end, phase.kind, f" ({phase.skill})"))
        at = max(at, phase.end)
    if end > at:
        phase_spans.append((at, end, "frozen", ""))
    bar_parts = [
        BarPart(a / last, b / last, css, f"{kind}{skill_text}: steps {a:g} to {b:g}", SOLID.get(kind, 1.0))
        for a, b, kind, skill_text in phase_spans
    ]
    note = f" <small>{expert.ended[0]} at step {expert.ended[1]:g}</small>" if expert.ended else ""
    note += " <small>imported</small>" if expert.imported else ""
    label = f"{html.swatch(expert.number)}{expert.number} {escape(expert.name)}{note}"
    return html.row(label, svg.bar(bar_parts, f"expert {expert.number} {expert.name}"))


def gates(records: RunRecords, history: History, matrix: LossMatrix) -> str:
    """Draw the mean gates of every domain after each skill. Only the last skill's are unfolded."""
    blocks, seen = [], set()
    evaluated = [m for m in history.moments if m.record.get("after_skill") and isinstance(m.record.get("usage"), dict)]
    for moment in evaluated[-MAX_EVALUATIONS:]:
        rows, named = [], set[int]()
        for domain, means in moment.record["usage"].items():
            # A dict lists the gates that matter of a large pool.
            listed = means.items() if isinstance(means, dict) else enumerate(means)
            by_column = {int(column): finite_number(mean) or 0.0 for column, mean in listed}
            named |= {
                moment.expert_ids[c] for c, mean in by_column.items() if mean >= 0.05 and c < len(moment.expert_ids)
            }
            bar = _gates_bar(by_column, moment.expert_ids, history, domain)
            rows.append(html.row(escape(domain), bar))
        seen |= set(moment.expert_ids) if len(moment.expert_ids) <= MAX_DRAWN else named
        blocks.append((f"after {moment.record.get('skill', '')}", f'<div class="bars">{"".join(rows)}</div>'))
    if not blocks:
        raise MissingData("gates by skill (usage in metrics.jsonl): recorded after each skill")
    last, earlier = blocks[-1], blocks[:-1]
    body = f"<h3>{escape(last[0])}</h3>{last[1]}{html.expert_legend(history, seen)}"
    body += "".join(f"<details><summary>{escape(name)}</summary>{bars}</details>" for name, bars in earlier)
    return f"<p>The mean gate of each expert over a domain's validation tokens, under the final routing.</p>{body}"


def _gates_bar(means: dict[int, float], expert_ids: tuple[int, ...], history: History, domain: str) -> str:
    total, at, parts = sum(means.values()) or 1.0, 0.0, []
    for expert_id, mean in means.items():
        expert = expert_ids[expert_id] if expert_id < len(expert_ids) else expert_id
        share = max(0.0, mean) / total
        parts.append(BarPart(at, at + share, color_class(expert), f"{history.label(expert)}: {mean:.3f}"))
        at += share
    return svg.bar([part for part in parts if part.end - part.start >= 0.002], f"gates of {domain}")


def routing(records: RunRecords, history: History, matrix: LossMatrix) -> str:
    """Draw the gates' entropy and the experts' usage during training."""
    entropy: list[Point] = [(m.step, finite_number(m.record.get("routing_entropy"))) for m in history.moments]
    entropy = [point for point in entropy if point[1] is not None]
    charts = html.chart(
        [Line("routing entropy", "e1", entropy)],
        "Routing entropy over steps, nats per token",
        history,
        0.0,
        named=False,
    )
    lines = by_expert(history, "expert_usage_", first=0)
    charts += html.chart(lines, "Expert usage over steps: mean gate of the tokens trained on", history, 0.0)
    if not charts:
        raise MissingData("routing entropy and expert usage (metrics.jsonl): no step has been recorded yet")
    return f'<div class="pair">{charts}</div>'


def by_expert(history: History, prefix: str, first: int, idle: bool = True) -> list[Line]:
    """Return a line for each expert from metrics with one key per gate column, for the MAX_LINES with the largest values.

    Columns are translated to expert numbers, because a column can belong to another expert later.

    Args:
        history: the run's history.
        prefix: the metric's key without the column, for instance "expert_usage_".
        first: first column: 0 includes the base.
        idle: draw zeros; otherwise they are gaps.
    """
    points_by_expert: dict[int, list[Point]] = {}
    for moment in history.moments:
        if not any(key.startswith(prefix) for key in moment.record):
            continue
        for expert_id in range(first, len(moment.expert_ids)):
            value = finite_number(moment.record.get(f"{prefix}{expert_id}"))
            points_by_expert.setdefault(moment.expert_ids[expert_id], []).append(
                (moment.step, value if value or idle else None)
            )
    shown = sorted(points_by_expert, key=lambda expert: -sum(value or 0.0 for _, value in points_by_expert[expert]))
    return [
        Line(history.label(expert), color_class(expert), points_by_expert[expert])
        for expert in sorted(shown[:MAX_LINES])
    ]
