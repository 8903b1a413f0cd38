"""The page of a run: whole, without parts, with damage, with hostile names, and of a large run."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from dylora_mlx.errors import UserError
from dylora_mlx.reporting import page
from dylora_mlx.reporting.style import color_class
from dylora_mlx.system.palette import RGB
from tests.reporting.synthetic import HOSTILE, build, lines, sound

TITLES = [title for _, title, _ in page.SECTIONS]


def titles(drawn: str) -> list[str]:
    return re.findall(r"<h2[^>]*>([^<]*)</h2>", drawn)


def test_a_whole_run_has_every_section_in_order(tmp_path):
    drawn = page.run_page(build(tmp_path / "run", ["sql", "flask"]))
    assert titles(drawn) == TITLES
    text = sound(drawn).text
    assert "create : sql got an expert of its own, expert 1." in text
    assert "similarity 0.100 (interval 0.050 to 0.200), threshold 0.750" in text
    assert "max_seq_length: 640" in text
    assert "backward transfer" in text


def test_hostile_names_and_text_stay_text(tmp_path):
    folder = build(tmp_path / "<b>run&", HOSTILE)
    found = sound(page.run_page(folder))
    for name in HOSTILE:
        assert " ".join(name.replace("\x00", "").split()) in found.text
    assert found.text.startswith("Run <b>run&")


def test_a_run_that_has_just_begun_says_what_is_missing(tmp_path):
    (tmp_path / "config.yaml").write_text("skills: []\n")
    drawn = page.run_page(tmp_path)
    assert titles(drawn) == ["Settings and versions", "Left out"]
    text = sound(drawn).text
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
    assert "<svg" not in drawn


@pytest.mark.parametrize("name", ["metrics.jsonl", "decisions.jsonl", "results.json", "samples.json", "run.json"])
def test_one_file_less(tmp_path, name):
    folder = build(tmp_path / "run", ["sql", "flask"])
    (folder / name).unlink()
    drawn = page.run_page(folder)
    sound(drawn)
    assert ("Left out" in titles(drawn)) == (name != "run.json")
    assert "are damaged" not in drawn
    if name == "metrics.jsonl":
        assert "Matrix of losses" in titles(drawn), "results.json has it"
    if name == "results.json":
        assert "Matrix of losses" in titles(drawn), "metrics.jsonl has it"


@pytest.mark.parametrize("name", ["metrics.jsonl", "decisions.jsonl"])
def test_damaged_lines_are_skipped_and_counted(tmp_path, name):
    folder = build(tmp_path / "run", ["sql", "flask"])
    whole = (folder / name).read_text()
    (folder / name).write_text('{"step": 1, \n[1, 2]\n\x00\xff\n' + whole + '{"step": 9')
    text = sound(page.run_page(folder)).text
    assert "3 damaged lines of its records were skipped" in text
    assert "sql got an expert of its own" in text


ODD = [None, [], {}, "x", -1, 1e400, {"a": {"b": [None]}}, [[1]], True, "\ud800"]


@pytest.mark.parametrize("value", ODD)
def test_values_of_any_kind_in_any_field_never_raise(tmp_path, value):
    folder = build(tmp_path / "run", ["sql", "flask"], steps=3)
    for name in ("metrics.jsonl", "decisions.jsonl"):
        whole = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        keys = sorted(set().union(*whole))
        for key in keys:
            lines(folder / name, [record | {key: value} if key in record else record for record in whole])
            sound(page.run_page(folder))
        lines(folder / name, whole)
    for name in ("results.json", "samples.json", "run.json"):
        whole = json.loads((folder / name).read_text())
        for key in whole:
            (folder / name).write_text(json.dumps(whole | {key: value}))
            sound(page.run_page(folder))
        (folder / name).write_text(json.dumps(value))
        page.write_file(page.run_page(folder), tmp_path / "page.html")


def test_a_large_run_stays_small(tmp_path):
    names = [f"skill_{i}" for i in range(20)]
    folder = build(tmp_path / "run", names, steps=250, words=220)
    decisions = [json.loads(line) for line in (folder / "decisions.jsonl").read_text().splitlines()]
    for decision in decisions[16:]:  # sixteen experts; the other skills are served by the last
        decision |= {"action": "refine", "expert": 16}
    lines(folder / "decisions.jsonl", decisions)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) > 5000
    path = page.write_page(folder)
    assert path == folder / "report.html"
    assert path.stat().st_size < 6e6
    drawn = path.read_text()
    sound(drawn)
    assert titles(drawn) == TITLES
    assert max(line.count(",") for line in re.findall(r'points="([^"]*)"', drawn)) <= 401


def test_no_half_written_page(tmp_path):
    folder = build(tmp_path / "run", ["sql"])
    page.write_page(folder)
    page.write_page(folder)
    assert not list(folder.glob("*.partial"))


def test_experts_keep_their_colour_when_columns_move(tmp_path):
    folder = build(tmp_path / "run", ["a", "b", "c"], steps=3)
    decisions = [json.loads(line) for line in (folder / "decisions.jsonl").read_text().splitlines()]
    evict = {
        "step": 6, "skill": "a", "action": "evict", "expert": 1, "kept": True, "experts": [1],
        "expert_ids": {"0": 0, "2": 1}, "details": {"heirs": {"a": 1}}, "reason": "to keep the budget",
    }  # fmt: skip
    lines(folder / "decisions.jsonl", [*decisions[:2], evict, decisions[2] | {"expert": 2}])
    text = sound(drawn := page.run_page(folder)).text
    assert "1 a evicted at step 6" in text
    assert "2 (1 merged or evicted)" in text
    rows = dict(re.findall(r'<i class="swatch (e\d+)"></i>(\d \w)', drawn))
    assert rows == {"e1": "1 a", "e2": "2 b", "e3": "3 c"}
    last = drawn[drawn.index("after c</h3>") :]
    assert set(re.findall(r'class="(e\d+) fill"', last[: last.index("</ul>")])) == {"e0", "e2", "e3"}


def test_a_merged_expert_is_a_new_one(tmp_path):
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


def test_no_run_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        page.run_page(tmp_path / "none")
    with pytest.raises(UserError, match="no run here"):
        page.run_page(tmp_path)


def test_colours_are_many_and_defined_in_both_themes(tmp_path):
    assert len(set(RGB)) == len(RGB) >= 16
    drawn = page.run_page(build(tmp_path / "run", ["sql"]))
    for number in range(len(RGB) + 1):
        assert len(re.findall(rf"--r{number}:\d+,\d+,\d+;", drawn)) == 2
    assert color_class(0) == "e0"
    assert color_class(len(RGB) + 1) == "e1"


def test_of_a_real_run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    drawn = page.run_page(tmp_path / "run")
    assert titles(drawn) == TITLES
    text = sound(drawn).text
    assert "The refinement was" in text
    assert "requests_more" in text
