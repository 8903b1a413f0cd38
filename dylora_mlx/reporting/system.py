"""Report sections about data and system: text by expert, counts of the data, packing, speed, memory, gradient norms, settings, versions."""

from __future__ import annotations

from collections import Counter
from typing import Any

from dylora_mlx.data.tokenized import SPLITS
from dylora_mlx.reporting import html, svg
from dylora_mlx.reporting.experts import MAX_DRAWN, by_expert
from dylora_mlx.reporting.history import History, LossMatrix
from dylora_mlx.reporting.html import MissingData, cell, head
from dylora_mlx.reporting.records import RunRecords, finite_number
from dylora_mlx.reporting.style import color_class
from dylora_mlx.reporting.svg import Line, Point, escape


def text(records: RunRecords, history: History, matrix: LossMatrix) -> str:
    """Draw one document of every domain, each token in the colour of its top-1 expert."""
    domains = records.samples.get("domains")
    if not isinstance(domains, dict) or not domains:
        raise MissingData("text by expert (samples.json): written after each skill")
    expert_ids = _expert_ids_of_samples(records, history)
    blocks, shown_experts = [], set()
    for name, sample in domains.items():
        tokens = list(zip(sample["tokens"], sample["expert_ids"], sample["gates"], strict=True))
        experts = [expert_ids[c] if 0 <= c < len(expert_ids) else c for _, c, _ in tokens]
        spans = "".join(
            _token(str(t), e, finite_number(g) or 0.0, history) for (t, _, g), e in zip(tokens, experts, strict=True)
        )
        shown_experts |= set(experts)
        shares = ", ".join(f"{history.label(e)} {n / len(experts):.0%}" for e, n in Counter(experts).most_common(4))
        ellipsis = " …" if sample.get("truncated") else ""
        blocks.append(f'<h3>{escape(name)} <small>{escape(shares)}</small></h3><p class="text">{spans}{ellipsis}</p>')
    note = (
        "<p>One validation document of each domain. A token has the colour of the expert with the largest gate when "
        "it was predicted; the larger the gate, the stronger the colour. Point at a token for the expert and its gate.</p>"
    )
    return note + html.expert_legend(history, shown_experts) + "".join(blocks)


def _expert_ids_of_samples(records: RunRecords, history: History) -> tuple[int, ...]:
    """Return the expert number of each gate column at the time the samples were taken."""
    for moment in reversed(history.moments):
        if moment.record.get("after_skill") and moment.step == records.samples.get("step"):
            return moment.expert_ids
    return tuple(history.expert_ids)


def _token(token: str, expert: int, gate: float, history: History) -> str:
    title = escape(f"{history.label(expert)} {gate:.2f}")
    strength = min(1.0, max(0.0, gate)) * 0.55
    return f'<span class="{color_class(expert)}" style="--g:{strength:.2f}" title="{title}">{escape(token)}</span>'


def data(records: RunRecords, history: History, matrix: LossMatrix) -> str:
    """Draw the counts of the data, with remarks on them, and how full the packed rows were."""
    counts, packed = _counts(records), _packing(records, history)
    if not counts and not packed:
        raise MissingData("data and packing (run.json, metrics.jsonl): recorded when a run begins")
    return counts + packed


def _counts(records: RunRecords) -> str:
    """Draw a table of each skill's documents and tokens, as `dylora data` shows them. Empty for runs that kept none."""
    skills = records.info.get("data")
    rows, remarks = [], []
    for name, counts in skills.items() if isinstance(skills, dict) else ():
        splits = counts.get("splits") if isinstance(counts, dict) else None
        if not isinstance(splits, dict):
            continue
        documents, train = (_split_number(splits, split, "documents") for split in SPLITS), ("tokens", "learned", "cut")
        numbers = (*documents, *(_split_number(splits, "train", number) for number in train))
        rows.append([head(name), cell(counts.get("form", "")), *map(cell, numbers)])
        lines = counts.get("remarks")
        remarks += [f"<li>{escape(name)}: {escape(line)}</li>" for line in (lines if isinstance(lines, list) else ())]
    if not rows:
        return ""
    names = ("skill or domain", "form", *SPLITS, "tokens", "learned", "cut")
    table = html.table(
        names, rows, "Documents of each split; tokens, learned tokens and documents longer than a row in train", "words"
    )
    return table + (f"<ul>{''.join(remarks)}</ul>" if remarks else "")


def _split_number(splits: dict[str, Any], split: str, name: str) -> str:
    counts = splits.get(split)
    value = finite_number(counts.get(name)) if isinstance(counts, dict) else None
    return "-" if value is None else f"{value:,.0f}"


def _packing(records: RunRecords, history: History) -> str:
    """Draw histograms of the packed rows' lengths, with the share of padding, for each of the newest skills. Empty before
    training."""
    options = records.options.get("data")
    length = finite_number(options.get("max_seq_length")) if isinstance(options, dict) else None
    rows = []
    packed = [m for m in history.moments if isinstance(m.record.get("packed_sequence_length_histogram"), list)]
    for moment in packed[-MAX_DRAWN:]:
        counts, padding = moment.record["packed_sequence_length_histogram"], moment.record.get("padding_fraction")
        edges = _bin_edges(moment.record.get("packed_sequence_length_edges"), len(counts), length)
        if histogram := _histogram(
            [finite_number(c) or 0.0 for c in counts], edges, "" if length is None else " tokens"
        ):
            share = "" if (value := finite_number(padding)) is None else f"<small>padding {value:.2%}</small>"
            rows.append(html.row(escape(moment.record.get("skill", "")), histogram, share))
    if not rows:
        return ""
    length_range = "" if length is None else f", from 0 to {length:g} tokens"
    return f'<p>Rows by their filled length{length_range}, and the share of padding.</p><div class="histograms">{"".join(rows)}</div>'


def _bin_edges(recorded: Any, bins: int, length: float | None) -> list[float]:
    """Return the recorded bin edges; for a record without them equal bins up to `length`, or numbers if that is unknown."""
    edges = [finite_number(edge) for edge in recorded] if isinstance(recorded, list) else []
    known = [edge for edge in edges if edge is not None]
    if len(known) == len(edges) == bins + 1:
        return known
    return [i * (length or bins) / max(1, bins) for i in range(bins + 1)]


def _histogram(counts: list[float], edges: list[float], unit: str) -> str:
    bins = zip(edges, edges[1:], counts, strict=False)
    titles = [f"{low:g} to {high:g}{unit}: {count:g} rows" for low, high, count in bins]
    return svg.histogram(counts, titles, "rows by filled length")


def speed(records: RunRecords, history: History, matrix: LossMatrix) -> str:
    """Draw tokens per second, peak memory and gradient norms over steps."""
    charts = ""
    for key, caption in (
        ("tokens_per_second", "Tokens per second over steps"),
        ("peak_memory_gb", "Peak memory over steps, GB"),
    ):
        points: list[Point] = [
            (m.step, v) for m in history.moments if (v := finite_number(m.record.get(key))) is not None
        ]
        charts += html.chart([Line(caption, "e1", points)], caption, history, 0.0, named=False)
    lines = by_expert(history, "grad_norm_expert_", first=1, idle=False)
    router: list[Point] = [
        (m.step, v) for m in history.moments if (v := finite_number(m.record.get("grad_norm_router"))) is not None
    ]
    lines += [Line("router", "e0", router, "2 3")] if router else []
    charts += html.chart(lines, "Gradient norms over steps, by expert (frozen: none)", history, 0.0)
    if not charts:
        raise MissingData("speed, memory and gradients (metrics.jsonl): no step has been recorded yet")
    return f'<div class="pair">{charts}</div>'


def settings(records: RunRecords, history: History, matrix: LossMatrix) -> str:
    """Draw versions and device from run.json, and the config. Paths below the home folder begin with ~, as reports are shared."""
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(html.without_home(_as_text(value)))}</dd></div>"
        for name, value in records.info.items()
        if name not in ("status", "data", "resources", "estimate")
    )
    versions = f'<dl class="facts">{rows}</dl>' if rows else "<p>run.json is missing: versions are not known.</p>"
    config = escape(html.without_home(records.config))
    return f'{versions}<details><summary>config.yaml</summary><pre tabindex="0">{config}</pre></details>'


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)
