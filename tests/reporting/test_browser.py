"""Reports in a real browser, in both themes and at two widths: nothing overlaps, nothing is empty, no console error.

These tests need Chromium or Chrome (the variable CHROME may name another browser) and are skipped without one."""

from __future__ import annotations

import html
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dylora_mlx.reporting import page
from tests.browsers import CHROME, QUIET
from tests.reporting.synthetic import build, lines

pytestmark = pytest.mark.skipif(CHROME is None, reason="no Chromium or Chrome on this machine")
THEMES = {"dark": 0, "light": 1}
"""Chromium's values of the preferred color scheme."""
MEASURE = """
const seen = element => element.getClientRects().length > 0;
const box = element => element.getBoundingClientRect();
const over = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
document.querySelectorAll('details').forEach(details => { details.open = true; });
const hits = [];
for (const chart of document.querySelectorAll('svg')) {
    const words = [...chart.querySelectorAll('text')].filter(word => seen(word) && word.textContent.trim());
    words.forEach((one, i) => words.slice(i + 1).forEach(two => {
        if (over(box(one), box(two))) hits.push(one.textContent + ' | ' + two.textContent);
    }));
}
parent.postMessage(JSON.stringify({
    width: document.documentElement.scrollWidth, inner: window.innerWidth, hits: hits.slice(0, 9),
    flat: [...document.querySelectorAll('svg, section, table')].filter(e => seen(e) && (box(e).height < 8 || box(e).width < 8))
        .map(e => e.outerHTML.slice(0, 80)),
    charts: document.querySelectorAll('svg').length, back: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
}), '*');
"""
FRAME = """<script>addEventListener('message', event => { document.documentElement.dataset.found = event.data; });</script>
<iframe src="measured.html" style="border: 0; width: WIDTHpx; height: 900px"></iframe>"""
"""A frame of any width, because a headless window is at least 500 pixels wide."""


def chrome(folder: Path, path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    line = [str(CHROME), *QUIET, f"--user-data-dir={folder / 'profile'}", *options, path.as_uri()]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=True)


def measure(folder: Path, report: str, theme: str, width: int) -> dict[str, Any]:
    """Return the JSON of MEASURE for a page. It runs in a copy that permits scripts, which a report does not."""
    opened, count = re.subn(r"<meta http-equiv=\"?Content-Security-Policy[^>]*>", "", report)
    assert count == 1
    (folder / "measured.html").write_text(opened + f"<script>{MEASURE}</script>", encoding="utf-8")
    path = folder / "frame.html"
    path.write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    options = ["--virtual-time-budget=20000", f"--blink-settings=preferredColorScheme={THEMES[theme]}", "--dump-dom"]
    match = re.search(r'data-found="([^"]*)"', chrome(folder, path, *options).stdout)
    assert match is not None
    return json.loads(html.unescape(match[1]))


@pytest.fixture(scope="module", autouse=True)
def started(tmp_path_factory) -> None:
    """Skip these tests where the browser does not start, as in some sandboxes."""
    home = tmp_path_factory.mktemp("begun")
    (home / "plain.html").write_text("<p>here</p>")
    try:
        assert "here" in chrome(home, home / "plain.html", "--dump-dom").stdout
    except (OSError, subprocess.SubprocessError, AssertionError) as error:
        pytest.skip(f"{CHROME} does not start: {error!r:.200}")


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, str]:
    """Reports of a run with two skills, and of one with twenty skills and sixteen experts."""
    home = tmp_path_factory.mktemp("pages")
    small = build(home / "small", ["flask", "sql"])
    large = build(home / "large", [f"skill_number_{i}" for i in range(20)], steps=60, words=220)
    decisions = [json.loads(line) for line in (large / "decisions.jsonl").read_text().splitlines()]
    for decision in decisions[16:]:
        decision |= {"action": "refine", "expert": 16}
    lines(large / "decisions.jsonl", decisions)
    return {folder.name: page.run_page(folder) for folder in (small, large)}


@pytest.mark.parametrize("width", [1200, 360])
@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("name", ["small", "large"])
def test_nothing_overlaps_and_nothing_is_empty(reports, tmp_path, name, theme, width):
    measured = measure(tmp_path, reports[name], theme, width)
    assert measured["inner"] == width
    assert measured["width"] <= width, "the page can be scrolled sideways"
    assert measured["hits"] == []
    assert measured["flat"] == []
    assert measured["charts"] > 5
    dark = sum(map(int, re.findall(r"\d+", measured["back"])[:3])) < sum(
        map(int, re.findall(r"\d+", measured["ink"])[:3])
    )
    assert dark == (theme == "dark")


def test_defects_are_detected(reports, tmp_path):
    words = '<text x="9" y="20">one word</text><text x="20" y="22">another</text>'
    flat = '<section style="padding: 0; margin: 0; border: 0"></section>'
    wrong = f'<svg width="200" height="40">{words}</svg>{flat}<p style="width: 900px">wide</p>'
    measured = measure(tmp_path, reports["small"].replace("</main>", f"{wrong}</main>"), "light", 360)
    assert measured["hits"] == ["one word | another"]
    assert len(measured["flat"]) == 1
    assert measured["width"] > 360


def test_no_message_on_the_console(reports, tmp_path):
    (tmp_path / "report.html").write_text(reports["small"], encoding="utf-8")
    (tmp_path / "wrong.html").write_text("<script>nothing.here()</script>")
    options = ["--enable-logging=stderr", "--log-level=0", "--dump-dom"]
    console = {name: chrome(tmp_path, tmp_path / f"{name}.html", *options).stderr for name in ("report", "wrong")}
    assert "CONSOLE" in console["wrong"], "the errors of a page are logged"
    assert "CONSOLE" not in console["report"]
