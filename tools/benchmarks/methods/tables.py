"""The comparison as a table for the terminal, as Markdown, and as values for a JSON file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from rich.table import Table

from methods import results
from methods.results import Cell, Mean

Measure = Callable[[Cell], float]


def measures(cells: Sequence[Cell]) -> dict[str, tuple[Measure, str]]:
    """Return the measure and the number format of each column, by title."""
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
        "accuracy": (results.answered, "{:.1%}"),
        "BWT, accuracy": (results.answers_backward, "{:+.1%}"),
        "FWT, accuracy": (results.answers_forward, "{:+.1%}"),
        "learning rate": (lambda cell: math.nan if cell.learning_rate is None else cell.learning_rate, "{:g}"),
        "parameters": (lambda cell: cell.result.parameters, "{:,.0f}"),
        "tokens": (lambda cell: cell.result.tokens, "{:,.0f}"),
        "seconds": (lambda cell: cell.result.seconds, "{:.0f}"),
    }


PLAIN = ("learning rate", "parameters", "tokens", "seconds")
"""Titles of columns without an interval."""


def rows(cells: Sequence[Cell]) -> list[tuple[str, list[Cell], dict[str, Mean]]]:
    """Return (name, cells, means by column title) of each method."""
    columns = measures(cells)
    names = list(dict.fromkeys(cell.method for cell in cells))
    groups = {name: [cell for cell in cells if cell.method == name] for name in names}
    return [
        (
            name,
            group,
            {title: results.mean([measure(cell) for cell in group]) for title, (measure, _) in columns.items()},
        )
        for name, group in groups.items()
    ]


def mean_text(mean: Mean, number_format: str, interval: bool = True) -> str:
    """Format a mean, with its interval if it has more than one cell."""
    if math.isnan(mean.value):
        return "-"
    text = number_format.format(mean.value)
    return (
        f"{text} [{number_format.format(mean.low)}, {number_format.format(mean.high)}]"
        if interval and mean.num_cells > 1
        else text
    )


def markdown(cells: Sequence[Cell]) -> str:
    """Return the table as Markdown, then the mean matrix of each method in its lowest order."""
    columns = measures(cells)
    lines = [
        "Losses in nats per token, lower is better; means over seeds and orders with 95% bootstrap intervals.",
        "",
        "| method | cells | " + " | ".join(columns) + " |",
        "| --- | ---: |" + " ---: |" * len(columns),
    ]
    for name, group, means in rows(cells):
        texts = [
            mean_text(means[title], number_format, title not in PLAIN) for title, (_, number_format) in columns.items()
        ]
        lines.append(f"| {name} | {len(group)} | " + " | ".join(texts) + " |")
    for name, group, _ in rows(cells):
        lines += ["", *_matrix(name, group)]
    return "\n".join(lines) + "\n"


def mean_matrix(group: Sequence[Cell]) -> tuple[list[Cell], list[str], np.ndarray]:
    """Return the cells of the lowest order, the n domains (base skill last), and the mean matrix [skills + 1, n]."""
    order = min(cell.order for cell in group)
    chosen = [cell for cell in group if cell.order == order]
    domains = [*chosen[0].skills, chosen[0].known]
    return chosen, domains, np.mean([[[row[d] for d in domains] for row in c.result.matrix] for c in chosen], axis=0)


def _matrix(name: str, group: Sequence[Cell]) -> list[str]:
    chosen, domains, matrix = mean_matrix(group)
    lines = [
        f"{name}: losses after each skill, mean of {len(chosen)} seeds, order {chosen[0].order}",
        "",
        "| after | " + " | ".join(domains) + " |",
        "| --- |" + " ---: |" * len(domains),
    ]
    for after, row in zip(["the base", *domains[:-1]], matrix, strict=True):
        cell_texts = [
            f"**{value:.3f}**" if after == domain else f"{value:.3f}"
            for domain, value in zip(domains, row, strict=True)
        ]
        lines.append(f"| {after} | " + " | ".join(cell_texts) + " |")
    return lines


def rich_table(cells: Sequence[Cell]) -> Table:
    """Return a terminal table of the main columns, with half the width of each interval instead of its ends."""
    titles = ("final mean", "minus joint", "minus oracle", "forgetting", "base retention", "router regret")
    titles += ("accuracy", "BWT, accuracy") if any(cell.result.answers for cell in cells) else ()
    columns = measures(cells)
    table = Table(title="means over seeds and orders, nats per token", title_justify="left")
    for title in ("method", "cells", *titles):
        table.add_column(title, justify="left" if title == "method" else "right")
    for name, group, means in rows(cells):
        table.add_row(name, str(len(group)), *(_short(means[title], columns[title][1]) for title in titles))
    return table


def _short(mean: Mean, number_format: str) -> str:
    if math.isnan(mean.value):
        return "-"
    half_width = f" ±{(mean.high - mean.low) / 2:.3f}" if mean.num_cells > 1 else ""
    return number_format.format(mean.value) + half_width


def values(cells: Sequence[Cell]) -> dict:
    """Return the means and every cell as JSON values, with null for NaN."""

    def plain(mean: Mean) -> dict:
        return {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in mean._asdict().items()}

    means = {name: {title: plain(mean) for title, mean in measures.items()} for name, _, measures in rows(cells)}
    return {"means": means, "cells": [{**cell._asdict(), "result": cell.result._asdict()} for cell in cells]}
