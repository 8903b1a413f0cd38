"""What was compared, as a table for a terminal, for Markdown and for a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from rich.table import Table

from methods import results
from methods.results import Cell, Mean

Measure = Callable[[Cell], float]


def measures(cells: Sequence[Cell]) -> dict[str, tuple[Measure, str]]:
    """Columns: what is measured, and how it is written."""
    return {
        "final mean": (results.final, "{:.3f}"),
        "minus joint": (results.against(cells, "joint LoRA"), "{:+.3f}"),
        "minus oracle": (results.against(cells, "oracle, experts alone"), "{:+.3f}"),
        "when learned": (results.diagonal, "{:.3f}"),
        "forgetting": (results.forgetting, "{:+.3f}"),
        "BWT": (results.backward, "{:+.3f}"),
        "FWT": (results.forward, "{:+.3f}"),
        "base retention": (results.retention, "{:+.3f}"),
        "router regret": (results.regret, "{:+.3f}"),
        "routing accuracy": (results.routing, "{:.1%}"),
        "test mean": (results.test, "{:.3f}"),
        "parameters": (lambda cell: cell.result.parameters, "{:,.0f}"),
        "tokens": (lambda cell: cell.result.tokens, "{:,.0f}"),
        "seconds": (lambda cell: cell.result.seconds, "{:.0f}"),
    }


PLAIN = ("parameters", "tokens", "seconds")
"""Columns without an interval."""


def rows(cells: Sequence[Cell]) -> list[tuple[str, list[Cell], dict[str, Mean]]]:
    """Each method with its cells and the means of every column."""
    columns = measures(cells)
    names = list(dict.fromkeys(cell.method for cell in cells))
    groups = {name: [cell for cell in cells if cell.method == name] for name in names}
    return [
        (name, own, {title: results.mean([of(cell) for cell in own]) for title, (of, _) in columns.items()})
        for name, own in groups.items()
    ]


def shown(found: Mean, form: str, interval: bool = True) -> str:
    if math.isnan(found.value):
        return "-"
    text = form.format(found.value)
    return f"{text} [{form.format(found.low)}, {form.format(found.high)}]" if interval and found.num_cells > 1 else text


def markdown(cells: Sequence[Cell]) -> str:
    """The table, then the mean matrix of each method in the first order that it has."""
    columns = measures(cells)
    lines = [
        "Losses in nats a token, lower is better; means over seeds and orders with 95% bootstrap intervals.",
        "",
        "| method | cells | " + " | ".join(columns) + " |",
        "| --- | ---: |" + " ---: |" * len(columns),
    ]
    for name, own, means in rows(cells):
        texts = [shown(means[title], form, title not in PLAIN) for title, (_, form) in columns.items()]
        lines.append(f"| {name} | {len(own)} | " + " | ".join(texts) + " |")
    for name, own, _ in rows(cells):
        lines += ["", *_matrix(name, own)]
    return "\n".join(lines) + "\n"


def mean_matrix(own: Sequence[Cell]) -> tuple[list[Cell], list[str], np.ndarray]:
    """The cells of the smallest order, the domains [n], what the base knows last, and the mean matrix [steps + 1, n]."""
    order = min(cell.order for cell in own)
    chosen = [cell for cell in own if cell.order == order]
    domains = [*chosen[0].skills, chosen[0].known]
    return chosen, domains, np.mean([[[row[d] for d in domains] for row in c.result.matrix] for c in chosen], axis=0)


def _matrix(name: str, own: Sequence[Cell]) -> list[str]:
    chosen, domains, matrix = mean_matrix(own)
    lines = [
        f"{name}: losses after each skill, mean of {len(chosen)} seeds, order {chosen[0].order}",
        "",
        "| after | " + " | ".join(domains) + " |",
        "| --- |" + " ---: |" * len(domains),
    ]
    for after, row in zip(["the base", *domains[:-1]], matrix, strict=True):
        texts = [
            f"**{value:.3f}**" if after == domain else f"{value:.3f}"
            for domain, value in zip(domains, row, strict=True)
        ]
        lines.append(f"| {after} | " + " | ".join(texts) + " |")
    return lines


def rich_table(cells: Sequence[Cell]) -> Table:
    """The columns that matter most, without intervals' ends where space is short."""
    titles = ("final mean", "minus joint", "minus oracle", "forgetting", "base retention", "router regret")
    columns = measures(cells)
    table = Table(title="means over seeds and orders, nats a token", title_justify="left")
    for title in ("method", "cells", *titles):
        table.add_column(title, justify="left" if title == "method" else "right")
    for name, own, means in rows(cells):
        table.add_row(name, str(len(own)), *(_short(means[title], columns[title][1]) for title in titles))
    return table


def _short(found: Mean, form: str) -> str:
    if math.isnan(found.value):
        return "-"
    spread = f" ±{(found.high - found.low) / 2:.3f}" if found.num_cells > 1 else ""
    return form.format(found.value) + spread


def values(cells: Sequence[Cell]) -> dict:
    """Means and every cell, for a file; NaN is null."""

    def plain(found: Mean) -> dict:
        return {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in found._asdict().items()}

    means = {name: {title: plain(found) for title, found in of.items()} for name, _, of in rows(cells)}
    return {"means": means, "cells": [{**cell._asdict(), "result": cell.result._asdict()} for cell in cells]}
