"""Skills that a cooldown, a full pool or a budget withholds: they wait, are decided again, and are held by what knows them."""

from __future__ import annotations

import contextlib
import io
import json
from functools import cache
from pathlib import Path

import pytest

from dylora_mlx import explain, report, train
from dylora_mlx.system import signals
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.skill import learn
from tests.conftest import start

STREAM = """
skills: [{name: requests, source: DATA/requests}, {name: sql, source: DATA/sql}, {name: stripe, source: DATA/stripe}]
growth: {base_skill: {name: python, source: DATA/python}, threshold: 1.0, policy: threshold, split: false, bootstrap: 50,
  min_samples: 8, dense_steps: 1, anneal_steps: 1, top_k: 2, MORE}
data: {max_seq_length: 128}
training: {max_steps: 4, steps_per_eval: 4, save_every: 2, memory_tokens: 128, router_fit_steps: 10, keep_checkpoints: 40}
"""


@pytest.fixture(scope="module")
def run(short_skills, tmp_path_factory):
    """A function that trains the stream with more growth options, once for all tests that only read the run."""

    @cache
    def train_stream(more: str) -> tuple[Path, str]:
        """Return the run folder and what was printed."""
        folder, printed = tmp_path_factory.mktemp("queue"), io.StringIO()
        text = STREAM.replace("DATA", str(short_skills)).replace("MORE", more)
        with contextlib.redirect_stdout(printed):
            assert train.main(start(folder, text)) == 0
        return folder / "small", printed.getvalue()

    return train_stream


def decisions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "decisions.jsonl").read_text().splitlines()]


def held(folder: Path) -> dict[str, int]:
    pool = json.loads((folder / "checkpoints/final/pool.json").read_text())
    return {entry["skill"]: entry["expert"] for entry in pool["library"]["entries"]}


def test_a_skill_of_the_cooldown_waits_and_gets_its_expert(run):
    """sql comes 4 steps after the first expert, 6 too early. stripe must wait as well, so both end the stream."""
    folder, printed = run("cooldown_steps: 10")
    lines = [(line["skill"], line["action"]) for line in decisions(folder)]
    assert lines == [
        ("requests", "create"), ("sql", "wait"), ("stripe", "wait"), ("sql", "create"), ("stripe", "create")
    ]  # fmt: skip
    assert held(folder) == {"python": 0, "requests": 1, "sql": 2, "stripe": 3}
    assert "6 steps of the cooldown are left" in decisions(folder)[1]["reason"]
    assert "sql waits" in printed
    results = json.loads((folder / "results.json").read_text())
    assert results["skills"] == ["requests", "sql", "stripe"]
    assert len(results["matrix"]) == 4


def test_a_waiting_skill_goes_first_when_the_cooldown_is_over(short_skills, tmp_path):
    """The refinement with requests' second batch ends the cooldown, so sql, which waits, is decided before stripe."""
    text = STREAM.replace("{name: stripe", "{name: requests_more, source: DATA/requests_more}, {name: stripe")
    text = text.replace("threshold: 1.0", "threshold: 0.88").replace("MORE", "cooldown_steps: 6")
    assert train.main(start(tmp_path, text.replace("DATA", str(short_skills)))) == 0
    lines = [(line["skill"], line["action"]) for line in decisions(tmp_path / "small")]
    assert lines == [
        ("requests", "create"), ("sql", "wait"), ("requests_more", "refine"), ("sql", "create"), ("stripe", "create")
    ]  # fmt: skip


def test_without_a_cooldown_nothing_waits(run):
    assert [line["action"] for line in decisions(run("cooldown_steps: 0")[0])] == ["create"] * 3


def test_a_full_pool_leaves_a_skill_to_what_serves_it_best(run):
    folder, _ = run("max_experts: 1")
    lines = decisions(folder)
    assert lines[0]["action"] == "create"
    assert all(line["action"] in ("skip", "reuse") for line in lines[1:])
    for line in lines[1:]:
        assert line["reason"].startswith("novel, but the pool is full (1 experts): ")
        assert held(folder)[line["skill"]] == line["expert"]
        assert (line["action"] == "skip") == (line["expert"] == 0)


def test_a_run_that_is_stopped_with_a_skill_in_the_queue_ends_the_same(run, short_skills, tmp_path, monkeypatch):
    expected, _ = run("cooldown_steps: 10")
    stopped, advance = [], learn.train_step

    def watched(run, step, work, now):
        outcome = advance(run, step, work, now)
        if run.state.skill_index == 1 and run.state.skill_step == 1:
            stopped.append(True)
        return outcome

    text = STREAM.replace("DATA", str(short_skills)).replace("MORE", "cooldown_steps: 10")
    with monkeypatch.context() as patch:
        patch.setattr(learn, "train_step", watched)
        patch.setattr(signals, "stop_requested", lambda: bool(stopped))
        assert train.main(start(tmp_path, text)) > 128
    folder = tmp_path / "small"
    assert train.main(["--resume", str(folder), "--quiet"]) == 0
    ours, theirs = (checkpoint.read(each / "checkpoints/final") for each in (folder, expected))
    rows = [f"matrix/row_{number}.json" for number in range(4)]
    assert [ours[row] for row in rows] == [theirs[row] for row in rows]
    assert ours["trainer.json"]["order"] == ["requests", "sql", "stripe"]
    assert [line["skill"] for line in decisions(folder)] == [line["skill"] for line in decisions(expected)]


def test_explain_and_the_report_tell_of_the_wait(run, tmp_path, capsys):
    folder, _ = run("cooldown_steps: 10")
    assert explain.main([str(folder)]) == 0
    assert "wait" in capsys.readouterr().out
    assert explain.main([str(folder), "sql"]) == 0
    assert "cooldown" in capsys.readouterr().out
    assert report.main([str(folder), "--out", str(tmp_path / "page.html")]) == 0


def test_skills_to_come_do_not_vote_on_a_merge(run, monkeypatch):
    """The cap holds two experts. stripe, which room is made for, loses far more than epsilon by the merge: it has no vote."""
    size = decisions(run("cooldown_steps: 0")[0])[0]["outcome"]["parameters"]
    evaluate = TrainingRun.evaluate

    def evaluated(run, *arguments, **options):
        losses = evaluate(run, *arguments, **options)
        if run.state.skill_index == 2 and len(run.pool) == 1 and "stripe" in losses:
            losses["stripe"] = losses["stripe"]._replace(loss=losses["stripe"].loss + 100)
        return losses

    monkeypatch.setattr(TrainingRun, "evaluate", evaluated)
    folder, _ = run(f"epsilon: 9.0, budget: {{adapters: {2 * size}, merge_distance: 1.5, merge_steps: 0}}")
    (removal, *_) = [line for line in decisions(folder) if line["action"] in ("merge", "evict")]
    assert removal["kept"]
    assert removal["worst_domain"] in ("python", "requests", "sql")
