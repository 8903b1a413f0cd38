"""The page of a run: complete, with missing or damaged files, with hostile names, and of a large run."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from dylora_mlx.errors import UserError
from dylora_mlx.reporting import page
from dylora_mlx.reporting.html import without_home
from dylora_mlx.reporting.style import color_class
from dylora_mlx.system.palette import RGB
from tests.reporting.synthetic import HOSTILE, build, lines, sound

TITLES = [title for _, title, _ in page.SECTIONS]


def titles(html: str) -> list[str]:
    return re.findall(r"<h2[^>]*>([^<]*)</h2>", html)


def test_a_complete_run_has_every_section_in_order(tmp_path):
    html = page.run_page(build(tmp_path / "run", ["sql", "flask"]))
    assert titles(html) == TITLES
    text = sound(html).text
    assert "create : sql got an expert of its own, expert 1." in text
    assert "similarity 0.100 (interval 0.050 to 0.200), threshold 0.750" in text
    assert "max_seq_length: 640" in text
    assert "backward transfer" in text


def test_hostile_names_and_text_stay_text(tmp_path):
    folder = build(tmp_path / "<b>run&", HOSTILE)
    reader = sound(page.run_page(folder))
    for name in HOSTILE:
        assert " ".join(name.replace("\x00", "").split()) in reader.text
    assert reader.text.startswith("Run <b>run&")


def test_a_run_that_has_just_begun_lists_missing_sections(tmp_path):
    (tmp_path / "config.yaml").write_text("skills: []\n")
    html = page.run_page(tmp_path)
    assert titles(html) == ["Settings and versions", "Left out"]
    text = sound(html).text
    for word in (
        "test losses",
        "matrix of losses",
        "decisions",
        "timeline",
        "gates",
        "samples.json",
        "packing",
        "speed",
    ):
        assert word in text
    assert "<svg" not in html


@pytest.mark.parametrize("name", ["metrics.jsonl", "decisions.jsonl", "results.json", "samples.json", "run.json"])
def test_a_missing_file(tmp_path, name):
    folder = build(tmp_path / "run", ["sql", "flask"])
    (folder / name).unlink()
    html = page.run_page(folder)
    sound(html)
    assert ("Left out" in titles(html)) == (name != "run.json")
    assert "are damaged" not in html
    if name == "metrics.jsonl":
        assert "Matrix of losses" in titles(html), "results.json has it"
    if name == "results.json":
        assert "Matrix of losses" in titles(html), "metrics.jsonl has it"


@pytest.mark.parametrize("name", ["metrics.jsonl", "decisions.jsonl"])
def test_damaged_lines_are_skipped_and_counted(tmp_path, name):
    folder = build(tmp_path / "run", ["sql", "flask"])
    original = (folder / name).read_text()
    (folder / name).write_text('{"step": 1, \n[1, 2]\n\x00\xff\n' + original + '{"step": 9')
    text = sound(page.run_page(folder)).text
    assert "3 damaged lines of its records were skipped" in text
    assert "sql got an expert of its own" in text


ODD = [None, [], {}, "x", -1, 1e400, {"a": {"b": [None]}}, [[1]], True, "\ud800"]


@pytest.mark.parametrize("value", ODD)
def test_values_of_any_kind_in_any_field_never_raise(tmp_path, value):
    folder = build(tmp_path / "run", ["sql", "flask"], steps=3)
    for name in ("metrics.jsonl", "decisions.jsonl"):
        original = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        keys = sorted(set().union(*original))
        for key in keys:
            lines(folder / name, [record | {key: value} if key in record else record for record in original])
            sound(page.run_page(folder))
        lines(folder / name, original)
    for name in ("results.json", "samples.json", "run.json"):
        original = json.loads((folder / name).read_text())
        for key in original:
            (folder / name).write_text(json.dumps(original | {key: value}))
            sound(page.run_page(folder))
        (folder / name).write_text(json.dumps(value))
        page.write_file(page.run_page(folder), tmp_path / "page.html")


def test_counts_of_the_data(tmp_path):
    folder = build(tmp_path / "run", ["sql"], steps=3)
    text = sound(page.run_page(folder)).text
    assert "sql plain text 1,200 1,200 1,200 34,567 8,901 2" in text
    assert "sql: sql is odd" in text
    assert "Rows by their filled length" in text
    info = json.loads((folder / "run.json").read_text())
    sql = info["data"].pop("sql")
    (folder / "run.json").write_text(json.dumps(info | {"data": {}}))
    assert "is odd" not in page.run_page(folder), "as in the folder of a run that kept none"
    assert "Data and packing" in titles(page.run_page(folder))
    for value in ODD:
        for data in (
            value,
            {"sql": value},
            *({"sql": sql | {name: value}} for name in sql),
            {"sql": sql | {"splits": {"train": value}}},
        ):
            (folder / "run.json").write_text(json.dumps(info | {"data": data}))
            assert "Data and packing" in titles(page.run_page(folder))


def test_bins_of_the_packing_are_those_that_were_recorded(tmp_path):
    """A record of an earlier version has none: its bins are equal."""
    text = page.run_page(build(tmp_path / "run", ["sql", "flask"], steps=3))
    assert "240 to 320 tokens: 2 rows" in text
    assert "32 to 64 tokens: 2 rows" in text
    assert "560 to 640 tokens: 9 rows" in text
    assert "192 to 256 tokens: 9 rows" in text


def test_what_was_evaluated_stands_beside_the_losses(tmp_path):
    folder = build(tmp_path / "run", ["sql", "flask", "stripe"])
    results = json.loads((folder / "results.json").read_text())
    names = list(results["test"])
    known = {"intervals": {"mixture": [3.0, 3.25], "change": [-1.0, 0.5]}, "documents": 12, "of_documents": 90}
    for name in names[:-1]:
        results["test"][name] |= known
    results["test"][names[0]] |= {"documents": 90}
    results["validation"] = {
        name: {"intervals": {"mixture": [2.0, 2.125]}, "documents": 7, "of_documents": 8} for name in names
    }
    results["validation"][names[1]] |= {"intervals": "none", "documents": "many"}
    (folder / "results.json").write_text(json.dumps(results))
    text = page.run_page(folder)
    assert text.count(">3.000 to 3.250<") == text.count(">-1.000 to +0.500<") == len(names) - 1
    assert text.count(">12 of 90<") == len(names) - 2
    assert text.count(">90<") == 1
    assert text.count(">2.000 to 2.125<") == text.count(">7 of 8<") == len(names) - 1


def test_a_large_run_stays_small(tmp_path):
    names = [f"skill_{i}" for i in range(20)]
    folder = build(tmp_path / "run", names, steps=250, words=220)
    decisions = [json.loads(line) for line in (folder / "decisions.jsonl").read_text().splitlines()]
    for decision in decisions[16:]:  # sixteen experts; the last one serves the other skills
        decision |= {"action": "refine", "expert": 16}
    lines(folder / "decisions.jsonl", decisions)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) > 5000
    path = page.write_page(folder)
    assert path == folder / "report.html"
    assert path.stat().st_size < 6e6
    html = path.read_text()
    sound(html)
    assert titles(html) == TITLES
    assert max(line.count(",") for line in re.findall(r'points="([^"]*)"', html)) <= 401


def test_no_partial_page_is_left(tmp_path):
    folder = build(tmp_path / "run", ["sql"])
    page.write_page(folder)
    page.write_page(folder)
    assert not list(folder.glob("*.partial"))


def test_experts_keep_their_colour_after_an_eviction(tmp_path):
    folder = build(tmp_path / "run", ["a", "b", "c"], steps=3)
    decisions = [json.loads(line) for line in (folder / "decisions.jsonl").read_text().splitlines()]
    evict = {
        "step": 6, "skill": "a", "action": "evict", "expert": 1, "kept": True, "experts": [1],
        "expert_ids": {"0": 0, "2": 1}, "details": {"heirs": {"a": 1}}, "reason": "to keep the budget",
    }  # fmt: skip
    lines(folder / "decisions.jsonl", [*decisions[:2], evict, decisions[2] | {"expert": 2}])
    text = sound(html := page.run_page(folder)).text
    assert "1 a evicted at step 6" in text
    assert "2 (1 merged or evicted)" in text
    rows = dict(re.findall(r'<i class="swatch (e\d+)"></i>(\d \w)', html))
    assert rows == {"e1": "1 a", "e2": "2 b", "e3": "3 c"}
    last = html[html.index("after c</h3>") :]
    assert set(re.findall(r'class="(e\d+) fill"', last[: last.index("</ul>")])) == {"e0", "e2", "e3"}


def test_a_merged_expert_gets_a_new_number(tmp_path):
    folder = build(tmp_path / "run", ["a", "b", "c"], steps=3)
    decisions = [json.loads(line) for line in (folder / "decisions.jsonl").read_text().splitlines()]
    merge = {
        "step": 6, "skill": "a+b", "action": "merge", "expert": 1, "kept": True, "experts": [1, 2],
        "expert_ids": {"0": 0, "1": 1, "2": 1}, "details": {"into": 1}, "reason": "to keep the budget",
    }  # fmt: skip
    lines(folder / "decisions.jsonl", [*decisions[:2], merge, decisions[2] | {"expert": 2}])
    text = sound(page.run_page(folder)).text
    for words in ("1 a merged at step 6", "2 b merged at step 6", "3 a+b", "4 c"):
        assert words in text


def test_a_folder_without_a_run_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        page.run_page(tmp_path / "none")
    with pytest.raises(UserError, match="no run here"):
        page.run_page(tmp_path)


def test_colours_are_many_and_defined_in_both_themes(tmp_path):
    assert len(set(RGB)) == len(RGB) >= 16
    html = page.run_page(build(tmp_path / "run", ["sql"]))
    for number in range(len(RGB) + 1):
        assert len(re.findall(rf"--r{number}:\d+,\d+,\d+;", html)) == 2
    assert color_class(0) == "e0"
    assert color_class(len(RGB) + 1) == "e1"


def test_the_page_of_a_real_run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    html = page.run_page(tmp_path / "run")
    assert titles(html) == TITLES
    text = sound(html).text
    assert "The refinement was" in text
    assert "requests_more" in text


@pytest.mark.parametrize(("text", "shown"), [
    ("source: HOME/data/a.jsonl\nbase: HOME\n", "source: ~/data/a.jsonl\nbase: ~\n"),
    ("'HOME/a b.jsonl'", "'~/a b.jsonl'"), ("source: /mntHOME/a.jsonl", "source: /mntHOME/a.jsonl"),
    ("source: HOMEs/a.jsonl", "source: HOMEs/a.jsonl"), ("source: packaged/sql", "source: packaged/sql"),
])  # fmt: skip
def test_the_home_folder_is_not_shown(monkeypatch, text, shown):
    monkeypatch.setenv("HOME", "/home/me")
    assert without_home(text.replace("HOME", "/home/me")) == shown.replace("HOME", "/home/me")
    monkeypatch.setenv("HOME", "/")
    assert without_home("source: /a.jsonl") == "source: /a.jsonl"


def test_a_report_shows_paths_without_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(f"skills: [{{name: a, source: {tmp_path}/data/a.jsonl}}]\n")
    (tmp_path / "run/run.json").write_text(json.dumps({"base": f"{tmp_path}/base"}))
    content = page.run_page(tmp_path / "run")
    assert "~/data/a.jsonl" in content
    assert "~/base" in content
    assert str(tmp_path) not in content
