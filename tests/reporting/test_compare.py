"""The page that compares several runs."""

from __future__ import annotations

import json
import re

import pytest

from dylora_mlx.reporting import compare
from tests.reporting.synthetic import HOSTILE, build, lines, sound


def test_facts_losses_decisions_and_settings_side_by_side(tmp_path):
    first, second = build(tmp_path / "first", ["sql", "flask"]), build(tmp_path / "second", ["sql", "flask"])
    (second / "config.yaml").write_text("data: {max_seq_length: 512}\ngrowth: {base_skill: {name: python}}\n")
    metrics = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    for record in metrics:
        if record.get("after_skill"):
            record["eval_sql_loss"] = 2.5
    lines(second / "metrics.jsonl", metrics)
    (second / "results.json").unlink()
    html = compare.comparison_page([first, second])
    reader = sound(html)
    assert "2 runs compared" in reader.text
    assert "max_seq_length 640 512" in reader.text
    assert "tokens per second (median) 2003" in reader.text
    assert "create → expert 1 (0.100)" in reader.text
    row = re.search(r'<tr><th scope="row" title="sql">sql</th>(.*?)</tr>', html)
    assert row is not None
    assert row[1] == '<td>3.000</td><td class="best">2.500</td>'
    assert html.count("<polyline") == 2
    assert "Left out" not in html


def test_equal_losses_have_no_best(tmp_path):
    runs = [build(tmp_path / name, ["sql"], steps=3) for name in ("a", "b")]
    html = compare.comparison_page(runs)
    assert 'class="best"' not in html
    assert "Nothing: their configs are the same." in html


def test_hostile_names(tmp_path):
    runs = [build(tmp_path / name, HOSTILE, steps=2) for name in ("<i>a", "\"b'")]
    text = sound(compare.comparison_page(runs)).text
    assert HOSTILE[0] in text
    assert "<i>a" in text


def test_runs_of_one_name_are_distinguished(tmp_path):
    runs = [build(tmp_path / name / "run", ["sql"], steps=2) for name in ("a", "b")]
    text = sound(compare.comparison_page(runs)).text
    assert "a/run" in text
    assert "b/run" in text
    assert "run (2)" in sound(compare.comparison_page([runs[0], runs[0]])).text


def test_runs_that_have_just_begun(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("skills: []\n")
    text = sound(compare.comparison_page([tmp_path / "a", tmp_path / "b"])).text
    for words in ("no skill has been learned yet in any run", "no run is finished", "no run has made one"):
        assert words in text


@pytest.mark.parametrize("value", [None, [], "x", {"sql": 3}, {"sql": {"mixture": "x"}}])
def test_odd_results(tmp_path, value):
    runs = [build(tmp_path / name, ["sql"], steps=2) for name in ("a", "b")]
    (runs[0] / "results.json").write_text(json.dumps({"test": value, "matrix": value}))
    sound(compare.comparison_page(runs))
