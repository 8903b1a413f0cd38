"""Of very many steps a report keeps some, and all that is no step."""

from __future__ import annotations

import itertools
import json

from dylora_mlx.reporting import page, records
from dylora_mlx.reporting.downsample import MAX_VALUES, DownsampledRecords
from tests.reporting.synthetic import build, sound


def step(number: int, skill: str = "sql", phase: str = "dense") -> dict:
    return {"step": number, "train_loss": 1.0, "skill": skill, "phase": phase, "num_experts": 1}


def thinned(found: list[dict], values: int) -> list[dict]:
    made = DownsampledRecords(values)
    for record in found:
        made.add(record)
    return made.records()


def test_few_records_are_all_kept():
    found = [{"step": 0, "eval_sql_loss": 2.0}, *map(step, range(1, 40)), {"step": 39, "after_skill": True}]
    assert thinned(found, 5 * 40) == found


def test_many_steps_are_thinned_evenly_and_the_last_one_stays():
    kept = [record["step"] for record in thinned(list(map(step, range(1, 1002))), 5 * 100)]
    assert 50 <= len(kept) <= 102
    assert (kept[0], kept[-1]) == (1, 1001)
    assert len({b - a for a, b in itertools.pairwise(kept[1:-1])}) == 1


def test_what_is_no_step_and_what_begins_stays_in_order():
    found = []
    for skill in ("sql", "flask", "stripe"):
        found.append({"step": len(found), "skill": skill, "novelty_threshold": 0.5})
        for phase in ("dense", "annealing"):
            for _ in range(500):
                found.append(step(len(found), skill, phase))
                if len(found) % 50 == 0:
                    found.append({"step": len(found), f"eval_{skill}_loss": 1.0})
    kept = thinned(found, 5 * 20)
    others = [record for record in found if "train_loss" not in record]
    assert [record for record in kept if "train_loss" not in record] == others
    assert [record["step"] for record in kept] == sorted(record["step"] for record in kept)
    stages = list(dict.fromkeys((r["skill"], r["phase"]) for r in found if "train_loss" in r))
    assert list(dict.fromkeys((r["skill"], r["phase"]) for r in kept if "train_loss" in r)) == stages
    assert len(kept) <= len(others) + len(stages) + 21
    assert kept[-1] == found[-1]


def test_the_page_of_a_long_run_is_that_of_a_short_one_but_for_its_points(tmp_path):
    folder = build(tmp_path / "run", ["sql", "flask"], steps=8000)
    whole = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = records.read_records(folder)
    steps = [record for record in found.metrics if "train_loss" in record]
    assert len(steps) < 0.7 * sum("train_loss" in record for record in whole)
    assert sum(map(len, steps)) < 1.01 * MAX_VALUES
    drawn = page.run_page(folder)
    assert all(title in drawn for _, title, _ in page.SECTIONS)
    assert f"step 0</span><span>{whole[-1]['step']}" in drawn
    assert sound(drawn).text


def test_a_torn_last_line_counts_for_nothing_and_a_damaged_one_for_one(tmp_path):
    folder = build(tmp_path / "run", ["sql"])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"step": 3')
    assert records.read_records(folder).skipped == 1
