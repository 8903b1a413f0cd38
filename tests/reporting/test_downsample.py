"""Downsampling of metrics: a long run keeps some step records and all others."""

from __future__ import annotations

import itertools
import json

from dylora_mlx.reporting import page, records
from dylora_mlx.reporting.downsample import MAX_VALUES, DownsampledRecords
from tests.reporting.synthetic import build, sound


def step(number: int, skill: str = "sql", phase: str = "dense") -> dict:
    return {"step": number, "train_loss": 1.0, "skill": skill, "phase": phase, "num_experts": 1}


def downsample(metrics: list[dict], values: int) -> list[dict]:
    downsampled = DownsampledRecords(values)
    for record in metrics:
        downsampled.add(record)
    return downsampled.records()


def test_few_records_are_all_kept():
    metrics = [{"step": 0, "eval_sql_loss": 2.0}, *map(step, range(1, 40)), {"step": 39, "after_skill": True}]
    assert downsample(metrics, 5 * 40) == metrics


def test_many_steps_are_thinned_evenly_and_the_last_one_stays():
    steps = [record["step"] for record in downsample(list(map(step, range(1, 1002))), 5 * 100)]
    assert 50 <= len(steps) <= 102
    assert (steps[0], steps[-1]) == (1, 1001)
    assert len({b - a for a, b in itertools.pairwise(steps[1:-1])}) == 1


def test_other_records_and_phase_starts_stay_in_order():
    metrics = []
    for skill in ("sql", "flask", "stripe"):
        metrics.append({"step": len(metrics), "skill": skill, "novelty_threshold": 0.5})
        for phase in ("dense", "annealing"):
            for _ in range(500):
                metrics.append(step(len(metrics), skill, phase))
                if len(metrics) % 50 == 0:
                    metrics.append({"step": len(metrics), f"eval_{skill}_loss": 1.0})
    thinned = downsample(metrics, 5 * 20)
    others = [record for record in metrics if "train_loss" not in record]
    assert [record for record in thinned if "train_loss" not in record] == others
    assert [record["step"] for record in thinned] == sorted(record["step"] for record in thinned)
    stages = list(dict.fromkeys((r["skill"], r["phase"]) for r in metrics if "train_loss" in r))
    assert list(dict.fromkeys((r["skill"], r["phase"]) for r in thinned if "train_loss" in r)) == stages
    assert len(thinned) <= len(others) + len(stages) + 21
    assert thinned[-1] == metrics[-1]


def test_the_page_of_a_long_run_is_complete(tmp_path):
    folder = build(tmp_path / "run", ["sql", "flask"], steps=8000)
    original = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    read = records.read_records(folder)
    steps = [record for record in read.metrics if "train_loss" in record]
    assert len(steps) < 0.7 * sum("train_loss" in record for record in original)
    assert sum(map(len, steps)) < 1.01 * MAX_VALUES
    html = page.run_page(folder)
    assert all(title in html for _, title, _ in page.SECTIONS)
    assert f"step 0</span><span>{original[-1]['step']}" in html
    assert sound(html).text


def test_a_damaged_line_is_counted_and_a_torn_last_line_is_not(tmp_path):
    folder = build(tmp_path / "run", ["sql"])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"step": 3')
    assert records.read_records(folder).skipped == 1
