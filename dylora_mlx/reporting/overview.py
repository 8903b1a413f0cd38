"""What a run came to: facts, test losses, losses over steps, and the matrix."""

from __future__ import annotations

from datetime import datetime

from dylora_mlx.reporting import html
from dylora_mlx.reporting.continual import ContinualMetrics, continual_metrics
from dylora_mlx.reporting.history import History, LossMatrix
from dylora_mlx.reporting.html import MissingData, cell, head
from dylora_mlx.reporting.records import RunRecords, finite_number, validation_losses
from dylora_mlx.reporting.svg import Point, escape


def facts(found: RunRecords, history: History, matrix: LossMatrix) -> dict[str, str]:
    """The headline's facts by name; those that are not known are left out."""
    info, base = found.info, found.info.get("base")
    if base is None and isinstance(model := found.options.get("model"), dict):
        base = model.get("base")
    alive = sum(expert.ended is None for expert in history.experts)
    gone = len(history.experts) - alive
    learned, planned = len(matrix.rows) - 1, found.options.get("skills")
    skills = f"{learned} learned" if matrix.rows else ""
    if isinstance(planned, list) and info.get("status") == "running":
        skills += f" of {max(len(planned), learned)}" if skills else f"{len(planned)} planned"
    rows = {
        "status": info.get("status"), "base": base, "weights": info.get("dtype"),
        "device": str(info.get("device", "")).removeprefix("Device(").removesuffix(")").replace(", 0", ""),
        "skills": skills,
        "experts": f"{alive}{f' ({gone} merged or evicted)' if gone else ''}",
        "steps": f"{history.last:g}" if found.metrics else found.results.get("steps"),
        "begun": when(found.begun), "last record": when(found.written),
    }  # fmt: skip
    return {name: str(value) for name, value in rows.items() if value not in (None, "")}


def when(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M %Z")


def headline(found: RunRecords, history: History, matrix: LossMatrix) -> str:
    rows = facts(found, history, matrix).items()
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in rows)
    skipped = f"<p>{found.skipped} damaged lines of its records were skipped.</p>" if found.skipped else ""
    return f'<dl class="facts">{listed}</dl>{skipped}'


def tests(found: RunRecords, history: History, matrix: LossMatrix) -> str:
    """Test losses: base, mixture, own expert, regret."""
    measured = found.results.get("test")
    if not isinstance(measured, dict) or not measured:
        raise MissingData("test losses (results.json): they are measured when a run ends")
    rows = []
    for name, of in measured.items():
        values = [finite_number(of.get(kind)) for kind in ("base", "mixture", "own_expert")]
        _, mixture, own = values
        regret = "-" if mixture is None or own is None else f"{mixture - own:+.3f}"
        expert = history.serving.get(name)
        shown = "-" if expert is None else f"{html.swatch(expert)}{escape(history.label(expert))}"
        rows.append([head(name), f"<td>{shown}</td>", *(cell(nats(v)) for v in values), cell(regret)])
    told = "<p>Regret: what finding the expert token by token costs above sending the whole text to its own expert.</p>"
    names = ("domain", "expert", "base", "mixture", "own expert", "regret")
    return html.table(names, rows, "Test loss, nats per token") + told


def nats(value: float | None, sign: bool = False) -> str:
    return "-" if value is None else f"{value:+.3f}" if sign else f"{value:.3f}"


def over_steps(found: RunRecords, history: History, matrix: LossMatrix) -> str:
    """Validation losses of all domains over steps."""
    by_domain: dict[str, dict[float, float]] = {}
    for moment in history.moments:
        for name, loss in validation_losses(moment.record).items():
            by_domain.setdefault(name, {})[moment.step] = loss
    points: dict[str, list[Point]] = {name: list(of.items()) for name, of in by_domain.items()}
    drawn = html.chart(
        html.domain_lines(points, history), "Validation loss over steps, nats per token, by domain", history
    )
    if not drawn:
        raise MissingData("losses over steps (metrics.jsonl): nothing has been evaluated yet")
    return f"{drawn}{html.skill_legend(history)}<p>A line has the colour of the expert that serves the domain.</p>"


def summary(matrix: LossMatrix) -> ContinualMetrics | None:
    """Continual-learning metrics, if every cell they need is there."""
    try:
        return continual_metrics(matrix.rows, matrix.labels[1:]) if len(matrix.rows) > 1 else None
    except KeyError:
        return None


def forgetting(found: RunRecords, history: History, matrix: LossMatrix) -> str:
    """The matrix of losses, coloured by change against the base."""
    if len(matrix.rows) < 2:
        raise MissingData("the matrix of losses: no skill has been learned yet")
    base = matrix.rows[0]
    changes = [row[d] - base[d] for row in matrix.rows for d in row if d in base]
    scale = max((abs(change) for change in changes), default=0.0) or 1.0
    rows = []
    for label, values in zip(matrix.labels, matrix.rows, strict=True):
        cells = []
        for domain in matrix.domains:
            value, before = values.get(domain), base.get(domain)
            own = " own" if domain == label else ""
            if value is None or before is None:
                cells.append(cell(nats(value), own.strip()))
                continue
            change = value - before
            tone = "better" if change <= 0 else "worse"
            mark = "<b>◆</b>" if own else ""
            cells.append(
                f'<td class="{tone}{own}" style="--g:{min(1, abs(change) / scale) * 0.75:.2f}" '
                f'title="{change:+.3f} against the base">{nats(value)}{mark}</td>'
            )
        rows.append([head(label), *cells])
    last = matrix.rows[-1]
    whole = [nats(last[d] - base[d], True) if d in last and d in base else "-" for d in matrix.domains]
    rows.append([head("change"), *(cell(text, "sum") for text in whole)])
    caption = "Validation loss, nats per token: rows after each skill, columns by domain"
    told = (
        '<p class="keys"><span class="better">lower than the base</span> '
        '<span class="worse">higher than the base</span> ◆ the skill just learned</p>'
    )
    drawn = html.table(("after", *matrix.domains), rows, caption, "matrix") + told
    return drawn + continual_list(summary(matrix))


MEANINGS = {
    "final_mean": ("mean of skills", "mean loss of the skills at the end"),
    "bwt": ("backward transfer (BWT)", "mean change since each skill was learned; below 0: later skills helped"),
    "forgetting": ("forgetting", "mean rise over each skill's best earlier loss"),
    "fwt": ("forward transfer (FWT)", "mean change of a skill's loss before it was learned"),
}


def continual_list(found: ContinualMetrics | None) -> str:
    if found is None:
        return ""
    items = []
    for key, value in found._asdict().items():
        name, meaning = MEANINGS[key]
        shown = "-" if value is None else f"{value:.4f}" if key == "final_mean" else f"{value:+.4f}"
        items.append(f"<div><dt>{name}</dt><dd>{shown}</dd><dd><small>{meaning}</small></dd></div>")
    return f'<dl class="facts">{"".join(items)}</dl>'
