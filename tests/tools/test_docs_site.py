"""The documentation site: its pages, links and drawings, without building it (CI does, with mkdocs)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

import dylora_mlx
from tests.browsers import CHROME
from tests.exporting.mixtures import tool

ROOT = Path(__file__).parents[2]
site_pages, history, gallery = tool("site_pages"), tool("release_history"), tool("draw_gallery")


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags only mkdocs knows."""


_Loader.add_constructor("!ENV", lambda loader, node: loader.construct_sequence(node))


def pages_of(entries: list) -> list[str]:
    """Return the pages of a navigation, in order."""
    pages = []
    for entry in entries:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        pages += pages_of(value) if isinstance(value, list) else [value]
    return pages


def test_the_navigation_has_every_page_once():
    pages = pages_of(yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), _Loader)["nav"])
    docs = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert sorted(pages) == sorted({*docs, *site_pages.PAGES.values(), "api.md"})
    assert pages[0] == "index.md"


@pytest.mark.parametrize(
    ("source", "text", "rewritten"),
    [
        ("README.md", "[a](docs/trust.md#x)", "[a](trust.md#x)"),
        ("README.md", "![p](docs/gallery/q.png)", "![p](gallery/q.png)"),
        ("README.md", "[c](CONTRIBUTING.md) and [l](LICENSE)", "[c](contributing.md) and l"),
        ("README.md", "[i](docs/README.md) [d](docs/)", "[i](index.md) [d](index.md)"),
        ("README.md", "[m](https://example.org/docs/a.md) [h](#here)", "[m](https://example.org/docs/a.md) [h](#here)"),
        ("docs/trust.md", "[s](../SECURITY.md) [g](growth.md#b)", "[s](security.md) [g](growth.md#b)"),
        ("docs/trust.md", "[m](../dylora_mlx/assets/base/README.md).", "m."),
        ("docs/gallery.md", "[![p](gallery/q.png)](gallery/q.html)", "[![p](gallery/q.png)](gallery/q.html)"),
        ("docs/trust.md", "```\n[x](../nothing.md)\n```\n", "```\n[x](../nothing.md)\n```\n"),
        ("examples/walkthrough.ipynb", "[README](../README.md)", "[README](index.md)"),
    ],
)
def test_links_lead_to_the_sites_pages(source, text, rewritten):
    assert site_pages.rewrite(text, source) == rewritten


def test_the_api_page_has_every_public_name():
    entries = re.findall(r"^::: (\S+)$", site_pages.api_page(), re.M)
    assert {name.rpartition(".")[2] for name in entries} == set(dylora_mlx.__all__) - {"__version__"}
    for name in entries:
        module, _, attribute = name.rpartition(".")
        assert hasattr(__import__(module, fromlist=[attribute]), attribute)


def test_the_gallery_has_three_reports_and_their_pictures():
    page = (ROOT / "docs/gallery.md").read_text(encoding="utf-8")
    reports = sorted((ROOT / "docs/gallery").glob("*.html"))
    assert len(reports) == 3
    for report in reports:
        picture = report.with_suffix(".png")
        assert f"(gallery/{picture.name})](gallery/{report.name})" in page
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert report.stat().st_size + picture.stat().st_size < 400_000
        assert "<script" not in report.read_text(encoding="utf-8")


@pytest.mark.skipif(CHROME is None, reason="needs Chromium or Chrome")
def test_a_report_and_its_picture_are_drawn(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CHROME", str(CHROME))
    assert gallery.main([f"one={finished}", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "one.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    header = (tmp_path / "one.png").read_bytes()[:24]
    assert (int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")) == gallery.SIZE


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["quickstart"], "quickstart: give NAME=RUN"),
        (["Big Name=runs/a"], "Big Name=runs/a: give NAME=RUN"),
        (["a=nosuch"], "nosuch"),
    ],
)
def test_a_gallery_of_nothing_is_refused(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CHROME", "/bin/true")
    assert gallery.main([*argv, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def release(version: str, **figures: float) -> dict:
    return {"version": version, "machine": {"mlx": "0.32.4"}, "figures": figures, "intervals": {"wheel_mb": [8, 9]}}


@pytest.fixture
def releases(tmp_path) -> Path:
    """A repository with two releases, named so that their order as text is wrong."""
    folder = tmp_path / history.RELEASES
    folder.mkdir(parents=True)
    for version, speed in (("0.10.0", 3.0), ("0.9.0", 2.0)):
        (folder / f"{version}.json").write_text(json.dumps(release(version, step_speed=speed, wheel_mb=8.5)))
    return tmp_path


def test_releases_are_drawn_in_order(releases):
    loaded = history.load(releases)
    assert [each.version for each in loaded] == ["0.9.0", "0.10.0"]
    page = history.page(loaded)
    assert "| training speed against mlx-lm's trainer (tokens/s, ratio) | higher | 2 | 3 |" in page
    assert "| size of the wheel (MB) | lower | 8.5 (8 to 9) | 8.5 (8 to 9) |" in page
    assert "| quickstart: forgetting (nats) | lower |  |  |" in page, "a figure that was not measured"
    svg = ElementTree.fromstring(history.drawing(loaded))
    titles = [title.text for title in svg.iter("{http://www.w3.org/2000/svg}title")]
    assert titles == ["Figures of each release", "0.9.0: 2", "0.10.0: 3", "0.9.0: 8.5", "0.10.0: 8.5"]
    circles = list(svg.iter("{http://www.w3.org/2000/svg}circle"))
    assert float(circles[0].get("cy")) > float(circles[1].get("cy")), "a higher value is higher up"
    assert float(circles[2].get("cy")) == float(circles[3].get("cy"))


@pytest.mark.parametrize("content", ["{}", '{"version": "0.1.1", "figures": {"a": 1}}', "not JSON"])
def test_a_file_that_is_no_release_is_named(releases, content):
    (releases / history.RELEASES / "0.1.0.json").write_text(content)
    with pytest.raises(dylora_mlx.UserError, match=r"0\.1\.0\.json"):
        history.load(releases)


def test_a_release_is_recorded_from_what_was_measured(tmp_path):
    bench = {
        "machine": {"mlx": "0.32.4"},
        "step": {"mlx-lm": {"ours_against_it": {"ratio": 2.12346, "low": 1, "high": 3}}},
        "memory": {"ours": {"peak": 0.2}, "mlx-lm": {"peak": 0.8}},
    }
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    results = {"continual": {"final_mean": 2.99, "forgetting": 0.01}, "experts": [{}, {}]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "a.whl").write_bytes(bytes(3_000_000))
    path = history.record(tmp_path / "bench.json", tmp_path, tmp_path / "a.whl", tmp_path, "0.2.0")
    assert path == tmp_path / history.RELEASES / "0.2.0.json"
    assert json.loads(path.read_text()) == {
        "version": "0.2.0",
        "machine": {"mlx": "0.32.4"},
        "figures": {
            "step_speed": 2.1235, "step_memory": 0.25, "mean_loss": 2.99, "forgetting": 0.01, "experts": 2.0, "wheel_mb": 3.0,
        },
        "intervals": {"step_speed": [1, 3]},
    }  # fmt: skip
    with pytest.raises(dylora_mlx.UserError, match="check_package"):
        history.record(tmp_path / "bench.json", tmp_path, tmp_path / "nosuch.whl", tmp_path, "0.2.0")
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(dylora_mlx.UserError, match="step_speed is missing"):
        history.record(tmp_path / "bench.json", tmp_path, tmp_path / "a.whl", tmp_path, "0.2.0")


def test_the_history_page_is_up_to_date(capsys):
    assert history.main(["--check"]) == 0, capsys.readouterr().err
    releases = history.load(ROOT)
    assert all({figure.name for figure in history.FIGURES} == each.figures.keys() for each in releases)
