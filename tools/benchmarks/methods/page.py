"""The comparison as one HTML page with plots."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from methods import tables
from methods.results import Cell

COLUMNS = 3
"""Number of heat maps side by side."""


def write(cells: Sequence[Cell], path: Path) -> bool:
    """Write the page, which works offline. Return False if plotly is not installed."""
    try:
        import plotly.graph_objects as go  # pyright: ignore[reportMissingImports] (an extra)
        from plotly.subplots import make_subplots  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    figures = [_bars(go, cells), _curves(go, cells), _matrices(go, make_subplots, cells)]
    parts = [f.to_html(full_html=False, include_plotlyjs=number == 0) for number, f in enumerate(figures)]
    table = html.escape(tables.markdown(cells))
    head = '<!doctype html><meta charset="utf-8"><title>Methods compared</title>'
    style = "<style>body{font-family:sans-serif;margin:2em}pre{overflow-x:auto}</style>"
    path.write_text(f"{head}{style}{''.join(parts)}<pre>{table}</pre>\n", encoding="utf-8")
    return True


def _bars(go: Any, cells: Sequence[Cell]) -> Any:
    """Plot the final mean of every method with its interval."""
    finals = [(name, means["final mean"]) for name, _, means in tables.rows(cells)]
    names, means = [name for name, _ in finals], [mean for _, mean in finals]
    ends = {"array": [m.high - m.value for m in means], "arrayminus": [m.value - m.low for m in means]}
    figure = go.Figure(go.Scatter(x=[m.value for m in means], y=names, error_x=ends, mode="markers"))
    figure.update_layout(
        title="Mean loss of all skills at the end, nats per token, 95% intervals", height=120 + 26 * len(names)
    )
    return figure.update_yaxes(autorange="reversed")


def _curves(go: Any, cells: Sequence[Cell]) -> Any:
    """Plot, after each skill, the mean change against the base of the losses of the skills so far."""
    figure = go.Figure()
    for name, group, _ in tables.rows(cells):
        curves = [[np.mean([row[s] for s in c.skills[: k + 1]])
                   - np.mean([c.result.matrix[0][s] for s in c.skills[: k + 1]])
                   for k, row in enumerate(c.result.matrix[1:])] for c in group]  # fmt: skip
        figure.add_scatter(x=list(range(1, len(curves[0]) + 1)), y=np.mean(curves, axis=0), name=name)
    figure.update_layout(title="Change against the base, mean of the skills so far", xaxis_title="skills learned")
    return figure


def _matrices(go: Any, make_subplots: Any, cells: Sequence[Cell]) -> Any:
    """Plot a heat map per method: the change of each domain's loss against the base after each skill."""
    methods = tables.rows(cells)
    num_rows = -(-len(methods) // COLUMNS)
    figure = make_subplots(
        rows=num_rows, cols=COLUMNS, subplot_titles=[name for name, _, _ in methods], vertical_spacing=0.3 / num_rows
    )
    for number, (_, group, _) in enumerate(methods):
        _, domains, matrix = tables.mean_matrix(group)
        change = matrix[1:] - matrix[0]
        place = {"row": number // COLUMNS + 1, "col": number % COLUMNS + 1}
        heat = go.Heatmap(z=change, x=domains, y=domains[:-1], coloraxis="coloraxis", texttemplate="%{z:.2f}")
        figure.add_trace(heat, **place)
        figure.update_yaxes(autorange="reversed", **place)
    figure.update_layout(
        title="Change against the base (row: after this skill; column: domain)",
        height=330 * num_rows,
        coloraxis={"colorscale": "RdBu_r", "cmid": 0},
    )
    return figure
