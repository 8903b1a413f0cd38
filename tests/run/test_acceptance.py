"""A new expert that does harm is undone exactly, tried once more at smaller rates, and the run says so."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx import explain, report, train
from dylora_mlx.system import signals
from dylora_mlx.training.skill import learn
from dylora_mlx.training.step import evaluate as evaluation
from tests.conftest import start

STREAM = """
skills: [{name: requests, source: DATA/requests}, {name: sql, source: DATA/sql, rank: 4}]
growth: {base_skill: {name: python, source: DATA/python}, threshold: 1.0, policy: threshold, split: false, bootstrap: 50,
  min_samples: 8, dense_steps: 1, anneal_steps: 1, top_k: 2}
model: {projections: [q_proj, v_proj]}
data: {max_seq_length: 128}
training: {max_steps: 4, steps_per_eval: 2, save_every: 1, memory_tokens: 128, router_fit_steps: 10, keep_checkpoints: 40,
  learning_rate: RATE}
"""


def run(folder: Path, short_skills: Path, rate: float) -> Path:
    folder.mkdir(exist_ok=True)
    text = STREAM.replace("DATA", str(short_skills)).replace("RATE", str(rate))
    assert train.main(start(folder, text)) == 0
    return folder / "small"


def decisions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "decisions.jsonl").read_text().splitlines()]


def tensors(checkpoint: Path) -> dict[str, np.ndarray]:
    return {
        f"{path.relative_to(checkpoint)}:{name}": np.array(value)
        for path in sorted(checkpoint.rglob("*.safetensors"))
        for name, value in mx.load(str(path)).items()
    }


@pytest.fixture(scope="module")
def harmful(short_skills, tmp_path_factory) -> Path:
    """A run whose second skill is trained with updates that are reversed and enlarged."""
    with pytest.MonkeyPatch.context() as patch:
        reverse_updates(patch)
        return run(tmp_path_factory.mktemp("harmful"), short_skills, 0.01)


def reverse_updates(patch: pytest.MonkeyPatch) -> None:
    advance = learn.train_step

    def reversed_step(run, step, work, now):
        held = run.model.experts[-1].layers[-1]["q_proj"]
        before = mx.array(held.lora_b)
        outcome = advance(run, step, work, now)
        if run.state.skill_index == 1:
            held = run.model.experts[-1].layers[-1]["q_proj"]
            held.lora_b = before - 40 * (held.lora_b - before)
        return outcome

    patch.setattr(learn, "train_step", reversed_step)


@pytest.fixture(scope="module")
def useful(short_skills, tmp_path_factory) -> tuple[Path, list[list[str]]]:
    """A run whose experts are kept, and the names of the domains of each evaluation."""
    calls, original = [], evaluation._evaluate_domains

    def evaluate_domains(evaluator, domains, *rest):
        calls.append([domain.name for domain in domains])
        return original(evaluator, domains, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "_evaluate_domains", evaluate_domains)
        return run(tmp_path_factory.mktemp("useful"), short_skills, 0.01), calls


def test_a_useful_expert_is_kept_with_its_gain(useful):
    folder, _ = useful
    matrix = json.loads((folder / "results.json").read_text())["matrix"]
    for number, decision in enumerate(decisions(folder), 1):
        created = decision["outcome"]["created"]
        assert created["kept"]
        assert created["attempts"] == 1
        assert decision["expert"] == number
        name = decision["skill"]
        assert created["gain"] == pytest.approx(matrix[number - 1][name] - matrix[number][name])
        assert created["interval"][0] > 0


def test_judging_an_expert_repeats_one_pass_only(useful):
    """The losses before it are known, but for the skill that was watched; those with it are the row of the loss matrix."""
    _, calls = useful
    everything = ["python", "requests", "sql"]
    # The base; the start, two evaluations and the judgement without the expert; all with it.
    assert calls[0] == everything
    assert calls[1:5] == [["requests"]] * 4
    assert set(calls[5]) in ({"python", "sql"}, set(everything)), "all that the last step was not evaluated on"
    assert calls[6:10] == [["sql"]] * 4
    assert set(calls[10]) in ({"python", "requests"}, set(everything))


def test_a_harmful_expert_is_undone_exactly(harmful):
    first, last = decisions(harmful)
    assert first["outcome"]["created"]["kept"]
    assert last["kept"] is False
    created = last["outcome"]["created"]
    assert not created["kept"]
    assert created["attempts"] == 2
    results = json.loads((harmful / "results.json").read_text())
    assert len(results["experts"]) == 1
    assert results["matrix"][2] == results["matrix"][1], "every loss is what it was"
    checkpoints = harmful / "checkpoints"
    (before,) = [path for path in checkpoints.glob("step-*") if path.name.endswith("000004")]
    old, new = tensors(before), tensors(checkpoints / "final")
    for name in old:
        if name.startswith(("router", "experts")):
            assert np.array_equal(old[name], new[name]), name
    assert not [name for name in new if "expert_2" in name]


def test_a_skill_without_its_own_expert_is_held_by_what_serves_it_best(harmful):
    pool = json.loads((harmful / "checkpoints/final/pool.json").read_text())
    held = {entry["skill"]: entry["expert"] for entry in pool["library"]["entries"]}
    assert held["requests"] == 1
    assert held["sql"] == decisions(harmful)[1]["expert"] in (0, 1)


def test_the_report_and_explain_say_what_was_undone(harmful, capsys):
    assert explain.main([str(harmful), "sql"]) == 0
    text = capsys.readouterr().out
    assert "The new expert was undone: " in text
    assert report.main([str(harmful), "--out", str(harmful / "page.html")]) == 0
    page = (harmful / "page.html").read_text()
    assert "which was undone" in page
    assert "The new expert was undone" in page


def test_a_rate_that_is_too_high_is_tried_again_at_a_tenth(short_skills, tmp_path, capsys):
    folder = run(tmp_path, short_skills, 0.5)
    out = capsys.readouterr().out
    assert "tried again at a tenth of the learning rates" in out
    results = json.loads((folder / "results.json").read_text())
    base, last = results["matrix"][0], results["matrix"][-1]
    assert all(last[name] < base[name] + 0.1 for name in last)
    assert decisions(folder)[0]["outcome"]["created"]["attempts"] == 2


def test_a_run_stopped_in_the_second_attempt_ends_the_same(short_skills, tmp_path, monkeypatch, harmful):
    """The stop comes at the second attempt's second step."""
    reverse_updates(monkeypatch)
    stopped, advance = [], learn.train_step

    def watched(run, step, work, now):
        outcome = advance(run, step, work, now)
        if run.state.attempt == 1 and run.state.skill_step == 1 and not stopped:
            stopped.append(run.state.step)
        return outcome

    with monkeypatch.context() as patch:
        patch.setattr(learn, "train_step", watched)
        patch.setattr(signals, "stop_requested", lambda: bool(stopped))
        text = STREAM.replace("DATA", str(short_skills)).replace("RATE", "0.01")
        assert train.main(start(tmp_path, text)) > 128
    assert stopped
    assert train.main(["--resume", str(tmp_path / "small"), "--quiet"]) == 0
    ours, theirs = (tensors(folder / "checkpoints/final") for folder in (tmp_path / "small", harmful))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert np.array_equal(ours[name], theirs[name]), name


def test_a_router_that_takes_other_skills_tokens_is_fitted_again_before_the_expert_is_judged(
    short_skills, tmp_path, monkeypatch, capsys
):
    """Every step of the second skill adds to its own row's bias, so that its expert gets the tokens of all others."""
    advance = learn.train_step

    def greedy_step(run, step, work, now):
        outcome = advance(run, step, work, now)
        if run.state.skill_index == 1:
            run.model.router.rows[-1].bias = run.model.router.rows[-1].bias + 20
        return outcome

    monkeypatch.setattr(learn, "train_step", greedy_step)
    folder = run(tmp_path, short_skills, 0.01)
    assert "router fitted again: " in capsys.readouterr().out
    created = decisions(folder)[1]["outcome"]["created"]
    assert created["kept"]
    assert created["attempts"] == 1
    matrix = json.loads((folder / "results.json").read_text())["matrix"]
    assert matrix[2]["sql"] < matrix[1]["sql"] - 0.05
    assert matrix[2]["requests"] < matrix[1]["requests"] + 0.02
    router = mx.load(str(folder / "checkpoints/final/router.safetensors"))
    assert float(router["rows.2.bias"].item()) < 20, "the rows are the fitted ones"
