"""SVG charts: thinned series, ticks, escaped names, and no chart without data."""

from __future__ import annotations

import math

import pytest

from dylora_mlx.reporting import svg
from dylora_mlx.reporting.svg import BarPart, Line
from tests.reporting.synthetic import HOSTILE, Reader


@pytest.mark.parametrize("count", [0, 1, 2, 399, 400, 401, 5000])
def test_thinning_keeps_ends_and_extremes(count):
    points = [(float(x), math.sin(x) + (9 if x == 137 else 0)) for x in range(count)]
    thinned = svg.thin_points(points)
    assert len(thinned) <= 400
    assert thinned == sorted(set(thinned))
    assert set(thinned) <= set(points)
    if count:
        assert (thinned[0], thinned[-1]) == (points[0], points[-1])
        for choose in (min, max):
            assert choose(thinned, key=lambda p: p[1]) == choose(points, key=lambda p: p[1])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (2.6, 4.5, [3, 3.5, 4, 4.5]),
        (0, 116, [0, 50, 100]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert svg.ticks(low, high) == pytest.approx(expected)


def test_ticks_of_an_empty_range():
    assert svg.ticks(3.0, 3.0) == [3.0]


def polylines(chart: str) -> list[list[tuple[float, float]]]:
    parts = chart.split('points="')[1:]
    return [[tuple(map(float, p.split(","))) for p in part.split('"')[0].split()] for part in parts]  # pyright: ignore


def test_a_line_stays_within_the_chart_and_breaks_at_gaps():
    points = [(0.0, 1.0), (1.0, 3.0), (2.0, None), (3.0, math.nan), (4.0, 2.0), (5.0, 2.5)]
    chart = svg.line_chart([Line("a", "e1", points)], "t", [(3.0, "sql")])
    segments = polylines(chart)
    assert [len(line) for line in segments] == [2, 2]
    assert all(
        svg.LEFT <= x <= svg.WIDTH and svg.TOP <= y <= svg.HEIGHT - svg.BOTTOM for line in segments for x, y in line
    )
    assert segments[0][0][1] > segments[0][1][1], "larger is higher up"


@pytest.mark.parametrize("points", [[(0.0, 2.0)], [(5.0, 0.0)], [(0.0, 1e12), (1.0, 1e12)], [(0.0, -1e-9), (1e9, 0.0)]])
def test_odd_ranges(points):
    chart = svg.line_chart([Line("a", "e1", points)], "t", floor=0.0)
    assert "nan" not in chart
    assert "inf" not in chart
    assert ("<circle" in chart) == (len(points) == 1)


def test_no_chart_without_data():
    assert svg.line_chart([], "t") == ""
    assert svg.line_chart([Line("a", "e1", [(1.0, None)])], "t") == ""
    assert svg.histogram([], [], "t") == ""
    assert svg.histogram([0, 0], ["", ""], "t") == ""


def test_a_line_with_many_gaps_has_a_limited_number_of_points():
    points = [(float(x), None if x % 100 == 0 else float(x % 7)) for x in range(5000)]
    assert sum(len(line) for line in polylines(svg.line_chart([Line("a", "e1", points)], "t"))) <= 420


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_text_everywhere(name):
    charts = (
        svg.line_chart([Line(name, "e1", [(0.0, 1.0), (1.0, 2.0)])], name, [(0.0, name)])
        + svg.bar([BarPart(0, 1, "e1", name)], name)
        + svg.histogram([1], [name], name)
        + svg.interval(0.5, (0.4, 0.6), [0.3, 0.7], 0.0, name)
    )
    reader = Reader(charts)
    assert reader.wrong == []
    assert reader.tags <= {"svg", "path", "text", "title", "polyline", "rect", "circle"}
    assert name.replace("\x00", "") in "".join(reader.words)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.1234567, "0.1235"), (2345.6, "2346"), (12345, "12.3 k"), (2.5e6, "2.5 M"), (-0.5, "-0.5")],
)
def test_numbers_are_short(value, shown):
    assert svg.short_number(value) == shown
