"""A run that cannot afford to evaluate every domain after every skill: which are evaluated, what is kept, and that it resumes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dylora_mlx import evaluate, train
from dylora_mlx.config import EvalConfig, GrowthConfig
from dylora_mlx.growth.decide.decision_log import read_decisions
from dylora_mlx.reporting import overview
from dylora_mlx.reporting.history import loss_matrix
from dylora_mlx.reporting.page import run_page
from dylora_mlx.reporting.records import read_records
from dylora_mlx.run import loop, run_folder
from dylora_mlx.run.cost import count
from dylora_mlx.training.skill import outcome, probe
from dylora_mlx.training.skill.create import CreationVerdict
from dylora_mlx.training.skill.selection import Selection, select_domains
from tests.run.homes import GROWING, SKILLS, interrupt, project, same_bits, trained, write_skills

NAMES = [f"s{number}" for number in range(1, SKILLS + 1)]
SPARSE = (
    GROWING.replace("log:", "eval: {total_tokens: 1024}\nlog:") + "domains: [{name: other, source: data/signs.jsonl}]\n"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A project folder with eight skills, a domain, and room for four domains in an evaluation."""
    folder = project(tmp_path_factory.mktemp("sampled") / "home", SPARSE)
    write_skills(folder)
    return folder


@pytest.fixture(scope="module")
def run(home) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        return trained(home)


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def records(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record.get("after_skill")]


def test_rows_hold_what_was_evaluated_and_the_last_holds_all(run):
    matrix = results(run)["matrix"]
    assert set(matrix[0]) == {*NAMES, "other"}
    for number, row in enumerate(matrix[1:-1], 1):
        # The skill and the domain outside the stream always; the next skill when it arrived; and at most two earlier ones.
        assert {NAMES[number - 1], NAMES[number], "other"} <= set(row)
        assert len(row) <= 6
        assert not set(NAMES[number + 1 :]) & set(row)
    assert any(len(row) < number + 2 for number, row in enumerate(matrix[1:-1], 1))
    assert set(matrix[-1]) == {*NAMES, "other"}


def test_what_was_evaluated_is_as_in_a_run_that_evaluates_all(home, run, tmp_path, monkeypatch):
    """Growth accepts all experts here, so what is evaluated changes nothing that is learned."""
    monkeypatch.chdir(home)
    (home / "all.yaml").write_text(SPARSE.replace("total_tokens: 1024", "total_tokens: null"))
    assert train.main(["--config", "all.yaml", "--runs", str(tmp_path), "--name", "all", "--quiet"]) == 0
    sparse, full = results(run), results(tmp_path / "all")
    for row, whole in zip(sparse["matrix"], full["matrix"], strict=True):
        assert len(whole) == SKILLS + 1
        for name, loss in row.items():
            assert loss == pytest.approx(whole[name], abs=2e-6)
    assert sparse["test"].keys() == full["test"].keys()
    assert sparse["continual"]["final_mean"] == pytest.approx(full["continual"]["final_mean"], abs=2e-6)
    assert sparse["continual"]["bwt"] == pytest.approx(full["continual"]["bwt"], abs=2e-6)
    assert sparse["continual"]["fwt"] == pytest.approx(full["continual"]["fwt"], abs=2e-6)


def test_forgetting_is_estimated_after_each_skill(run):
    for number, record in enumerate(records(run), 1):
        evaluated = {key for key in record if key.startswith("eval_")}
        if "forgetting" in record:
            assert record["forgetting_low"] <= record["forgetting"] <= record["forgetting_high"]
            assert record["evaluated_domains"] == len(evaluated) == len(record["usage"])
        assert f"eval_s{number}_loss" in record
    assert "forgetting" in records(run)[-1]


@pytest.mark.parametrize("at", ["step-000009", "step-000014"])
def test_a_resumed_run_evaluates_the_same(home, run, tmp_path, monkeypatch, at):
    """Stopped within the fifth skill, and after the seventh."""
    monkeypatch.chdir(home)
    again = tmp_path / "run"
    interrupt(run, again, at)
    assert train.main(["--resume", str(again), "--quiet"]) == 0
    assert same_bits(run, again)
    assert records(again) == records(run)


def test_a_rise_is_measured_from_the_skill_before(run):
    """A domain that was last evaluated several skills ago says nothing of what the last of them did."""
    outcomes, evaluated = [decision["outcome"] for decision in read_decisions(run)], records(run)
    older = 0
    for number, (each, row) in enumerate(zip(outcomes, results(run)["matrix"], strict=False)):
        losses = {name: evaluated[number][f"eval_{name}_loss"] for name in evaluated[number]["usage"]}
        rises = [losses[name] - row[name] for name in losses if name in row and name != NAMES[number]]
        assert each["worst_other_rise"] == pytest.approx(max(rises), abs=1e-12)
        older += len(losses) - 1 - len(rises)
    assert older >= 3


def test_a_rise_that_the_verdict_measured_counts():
    rows = [{"a": 5.0, "b": 5.0, "c": 5.0}, {"a": 1.0, "c": 4.9}, {"a": 1.1, "b": 2.0, "c": 2.5}]
    training_run, skill = SimpleNamespace(state=SimpleNamespace(matrix=rows)), SimpleNamespace(name="c")
    verdict = CreationVerdict(True, 2.4, (2.0, 2.8), "b", 0.3, 1, "", {"b": 0.3})
    assert outcome._other_rises(training_run, skill, None) == pytest.approx({"a": 0.1})
    assert outcome._other_rises(training_run, skill, verdict) == pytest.approx({"a": 0.1, "b": 0.3})
    assert outcome._other_rises(training_run, skill, replace(verdict, kept=False)) == pytest.approx({"a": 0.1})


def test_memory_holds_features_of_selected_domains_only(home, run, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    again, seen, at_the_end = tmp_path / "run", [], []
    interrupt(run, again, "step-000010")
    finish = loop.finish_skill

    def noting(training_run, *arguments):
        finish(training_run, *arguments)
        held = {name for name, domain in training_run.domains.items() if domain.features}
        seen.append((held, training_run.selected, set(training_run.measured)))

    write_metadata = loop.metadata.write_metadata

    def noting_the_end(training_run, status):
        at_the_end.append({name for name, domain in training_run.tests.items() if domain.features})
        return write_metadata(training_run, status)

    monkeypatch.setattr(loop, "finish_skill", noting)
    monkeypatch.setattr(loop.metadata, "write_metadata", noting_the_end)
    assert train.main(["--resume", str(again), "--quiet"]) == 0
    assert seen
    assert at_the_end[-1] == set()
    assert all(held and held <= selected and measured <= selected for held, selected, measured in seen)


def test_the_report_shows_the_last_value_of_the_others(run):
    page = run_page(run, ["matrix", "gates", "text"])
    assert "evaluated 1 skill before" in page
    assert "damaged" not in page


def test_a_run_that_still_learns_has_the_same_matrix(run, tmp_path):
    """Without results.json the losses at arrival come from the decisions, so backward and forward transfer are known."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/results.json").unlink()
    drawn = loss_matrix(read_records(tmp_path / "run"))
    assert drawn.labels == ["base", *NAMES]
    assert drawn.rows[:-1] == results(run)["matrix"][:-1]
    assert drawn.rows[-1].items() < results(run)["matrix"][-1].items()
    metrics = overview.summary(drawn)
    assert metrics is not None
    assert metrics.fwt == pytest.approx(results(run)["continual"]["fwt"], abs=1e-12)


def test_evaluate_measures_all(home, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(home)
    assert evaluate.main([str(run), "--split", "validation", "--json", str(tmp_path / "l.json")]) == 0
    losses = json.loads((tmp_path / "l.json").read_text())
    last = results(run)["matrix"][-1]
    assert losses.keys() == last.keys()
    for name, each in losses.items():
        assert each["mixture"] == pytest.approx(last[name], abs=1e-5)


def test_the_selection_by_hand():
    """Two similar skills by their similarity, and a random sample of the others that any of them may be in."""
    names = [f"s{i}" for i in range(30)]
    domains = {name: SimpleNamespace(positions=100) for name in [*names, "text"]}
    library = SimpleNamespace(experts_of={name: i + 1 for i, name in enumerate(names[:20])})

    def selected(index: int, action: str = "create", expert: int = 0, budget: int | None = 1000, seed: int = 0):
        skills = [SimpleNamespace(name=name) for name in names]
        similarities = {name: i / 100 for i, name in enumerate(names[:index])}
        decision = SimpleNamespace(action=action, expert=expert, similarities=similarities)
        state = SimpleNamespace(skill_index=index)
        config = SimpleNamespace(eval=EvalConfig(total_tokens=budget), growth=GrowthConfig(), seed=seed)
        fake = SimpleNamespace(config=config, domains=domains, skills=skills, state=state, library=library)
        return select_domains(fake, skills[index], decision)

    assert selected(20, budget=None) is None
    assert selected(20, budget=3100) is None
    chosen = selected(20)
    assert isinstance(chosen, Selection)
    assert set(chosen.certain[:2]) == {"s20", "text"}
    assert chosen.certain[2:] == ["s19", "s18", "s17", "s16"]
    assert len(chosen.sample) == 4
    assert set(chosen.sample) <= set(names[:16])
    assert selected(20) == chosen
    assert "s3" in selected(20, action="refine", expert=4).certain
    # A skill that is only served changes nothing, so the others that the same expert serves need not be looked at.
    assert selected(20, action="reuse", expert=4) == chosen
    drawn = np.concatenate([[names.index(n) for n in selected(20, seed=seed).sample] for seed in range(200)])
    counts = np.bincount(drawn, minlength=16)
    assert counts[:16].min() > 25
    assert counts[:16].max() < 80
    tiny = selected(20, budget=100)
    assert len(tiny.certain) == 3
    assert len(tiny.sample) == 2
    assert selected(0).sample == []


def test_the_run_opens_as_any_other(home, run, monkeypatch):
    monkeypatch.chdir(home)
    assert len(run_folder.open_run(run).pool) == SKILLS


def test_the_estimate_counts_the_selection(home, run, monkeypatch):
    """Of nine domains of 256 positions, four are evaluated after a skill; memory holds the features of four."""
    monkeypatch.chdir(home)
    built, _ = run_folder.reopen_finished(run)
    together = count.evaluated_together(built)
    sizes = [domain.positions for domain in built.domains.values()]
    assert 1 <= len(together) < len(sizes)
    assert sum(domain.positions for domain in together) <= 1024 < sum(sizes[: len(together) + 1])
    everything = replace(built, config=replace(built.config, eval=EvalConfig(total_tokens=None)))
    assert count.evaluated_together(everything) == list(built.domains.values())


def test_of_many_experts_the_most_similar_are_probed(home, run, monkeypatch):
    monkeypatch.chdir(home)
    built, _ = run_folder.reopen_finished(run)
    similarities, owners = {"s5": 0.9, "s2": 0.8, "s7": 0.7, "s1": 0.1}, built.library.experts_of
    every = probe.ProbeEvidence(built, built.skills[0], None, similarities).existing()
    assert len(every.losses) == SKILLS + 1
    monkeypatch.setattr(probe, "MAX_PROBED", 3)
    some = probe.ProbeEvidence(built, built.skills[0], None, similarities).existing()
    assert set(some.losses) == {0, owners["s5"], owners["s2"], owners["s7"]}
    assert all(loss == pytest.approx(every.losses[expert_id], abs=1e-6) for expert_id, loss in some.losses.items())
    # The rewards of the bandit compare with the same experts.
    decision, measured = SimpleNamespace(novel=True, creates=True, expert=8, similarities=similarities), []

    def noting(name, expert_id):
        measured.append(expert_id)
        return SimpleNamespace(loss=9.0)

    monkeypatch.setattr(built, "evaluate_expert", noting)
    assert outcome.rewards(built, built.skills[0], decision, 0)["create"] == pytest.approx(
        9.0 - built.state.matrix[-1]["s1"]
    )
    assert measured == [0, owners["s5"], owners["s2"], owners["s7"]]
