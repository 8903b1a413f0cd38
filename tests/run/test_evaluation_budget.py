"""Evaluation within a budget in a whole run: what is evaluated, how often, and what the run says about it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from dylora_mlx import add, train
from dylora_mlx.config.load import load_config
from dylora_mlx.model.routing.router import forced_routing
from dylora_mlx.run import run_folder
from dylora_mlx.run.cost import count
from dylora_mlx.system import console
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.skill import refine
from dylora_mlx.training.skill.refine import RefinementVerdict
from dylora_mlx.training.step import evaluate as evaluation
from dylora_mlx.training.step.domains import make_held_out
from tests.conftest import start
from tests.run.homes import STORED

BUDGET = 100
"""Tokens of about two of the four validation documents."""
STREAM = """
skills: [{name: requests, source: DATA/requests}, {name: sql, source: DATA/sql, rank: 4}]
domains: [{name: stripe, source: DATA/stripe}]
growth: {base_skill: {name: python, source: DATA/python}, threshold: 1.0, policy: threshold, split: false, bootstrap: 50,
  min_samples: 8, dense_steps: 1, anneal_steps: 1, top_k: 2, acceptance: always}
data: {max_seq_length: 128}
training: {max_steps: 4, steps_per_eval: 2, save_every: 2, memory_tokens: 128, router_fit_steps: 10, keep_checkpoints: 20}
eval: {tokens: 100, full: true}
"""
NAMES = ["python", "stripe", "requests", "sql"]


@pytest.fixture(scope="module")
def trained(short_skills, tmp_path_factory):
    """A run, the domains of every evaluation that was made in it with the expert that was forced, and what it printed."""
    folder = tmp_path_factory.mktemp("budget")
    with pytest.MonkeyPatch.context() as patch, console.console.capture() as caught:
        calls = recorded(patch)
        assert train.main(start(folder, STREAM.replace("DATA", str(short_skills)), "-v")) == 0
    return folder / "small", calls, caught.get()


class Calls(list):
    """The evaluations that were trained."""

    rows = 0
    """Rows of all of them together."""


def recorded(patch: pytest.MonkeyPatch) -> Calls:
    """Return a list that grows with every evaluation: the expert that is forced, and the domains."""
    calls, original = Calls(), evaluation._evaluate_domains

    def evaluate_domains(evaluator, domains, routing, forced, *rest):
        calls.append((forced, [domain.name for domain in domains]))
        calls.rows += sum(len(batch.inputs) for domain in domains for batch in domain.batches)
        return original(evaluator, domains, routing, forced, *rest)

    patch.setattr(evaluation, "_evaluate_domains", evaluate_domains)
    return calls


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_the_matrix_is_of_the_drawn_documents_and_the_end_of_all(trained):
    stored = results(trained[0])
    matrix, validation, full, test = (stored[name] for name in ("matrix", "validation", "validation_full", "test"))
    for name in NAMES:
        assert matrix[0][name] == validation[name]["base"]
        assert matrix[-1][name] == validation[name]["mixture"]
        assert 0 < validation[name]["documents"] < validation[name]["of_documents"] == 4
        assert validation[name]["tokens"] <= BUDGET < validation[name]["of_tokens"]
        assert full[name]["documents"] == full[name]["of_documents"] == 4
        assert full[name]["tokens"] == full[name]["of_tokens"] == validation[name]["of_tokens"]
        assert test[name]["documents"] == test[name]["of_documents"] == 2
        low, high = test[name]["intervals"]["mixture"]
        assert low <= test[name]["mixture"] <= high
    assert full["sql"]["mixture"] != pytest.approx(validation["sql"]["mixture"], rel=1e-4)


def test_the_numbers_are_those_of_the_finished_run(trained):
    """Evaluated by hand: the drawn documents are drawn again from the run's own records."""
    run, stored = run_folder.open_run(trained[0]), results(trained[0])
    (sql,) = run.read_sources([source for source in run.config.skills if source.name == "sql"])
    held_out = make_held_out([sql], run.config, compiled=False)
    base, own = (
        evaluation.evaluate(run.model, held_out.test["sql"], forced_routing(), expert_id).loss for expert_id in (0, 2)
    )
    assert stored["test"]["sql"]["base"] == pytest.approx(base, rel=1e-5)
    assert stored["test"]["sql"]["own_expert"] == pytest.approx(own, rel=1e-5)
    drawn = evaluation.evaluate(run.model, held_out.validation["sql"], forced_routing(), 0).loss
    assert stored["matrix"][0]["sql"] == pytest.approx(drawn, rel=1e-5)
    whole = evaluation.evaluate(run.model, held_out.final["sql"], forced_routing(), 0).loss
    assert stored["validation_full"]["sql"]["base"] == pytest.approx(whole, rel=1e-5)


def test_no_pass_is_made_twice(trained):
    calls = trained[1]
    others = [name for name in NAMES if name != "requests"]
    # The base; the learned skill at its start and every two steps, and after it the other domains, or all if an earlier
    # step was better.
    assert calls[:4] == [(None, NAMES), *[(None, ["requests"])] * 3]
    assert calls[4] in ((None, others), (None, NAMES))
    assert calls[5:8] == [(None, ["sql"])] * 3
    assert calls[8] in ((None, [name for name in NAMES if name != "sql"]), (None, NAMES))
    # python and stripe have no expert of their own: theirs is the base.
    own = [(0, ["python"]), (0, ["stripe"]), (0, ["requests"]), (1, ["requests"]), (0, ["sql"]), (2, ["sql"])]
    assert calls[9:] == [(None, NAMES), *own, (None, NAMES), *((0, [name]) for name in NAMES)]


def test_a_skill_is_watched_while_it_is_learned_and_every_domain_after_it(trained):
    records = [json.loads(line) for line in (trained[0] / "metrics.jsonl").read_text().splitlines()]
    evaluated = [(r.get("skill"), sorted(k for k in r if k.startswith("eval_"))) for r in records]
    evaluated = [(skill, names) for skill, names in evaluated if names]
    everything = sorted(f"eval_{name}_loss" for name in NAMES)
    expected = [(None, everything)]
    for name in ("requests", "sql"):
        expected += [(name, [f"eval_{name}_loss"])] * 2 + [(name, everything)]
    assert evaluated == expected


def test_what_was_evaluated_is_said(trained):
    folder, _, printed = trained
    printed, stored = " ".join(printed.split()), results(folder)
    sql = stored["validation"]["sql"]
    said = f"sql {sql['documents']} of 4 documents ({sql['tokens']} of {sql['of_tokens']} tokens)"
    assert printed.count("evaluated within eval.tokens: ") == 1, "the test documents are complete"
    assert said in printed
    assert "validation loss on all documents (nats per token)" in printed
    low, high = stored["test"]["sql"]["intervals"]["mixture"]
    assert f"{low:.3f} to {high:.3f}" in printed
    page = (folder / "report.html").read_text()
    assert f"{low:.3f} to {high:.3f}" in page
    assert f">{sql['documents']} of 4<" in page


def test_the_estimate_counts_these_rows(trained):
    folder, calls, _ = trained
    run, _ = run_folder.reopen_finished(folder)
    planned = count.plan_skills(run, count.assume_all_new(run.config, run.skills))
    counted = [work for work in count.count_work(run, planned) if work.phase == "evaluations"]
    everything = [*run.domains.values(), *run.tests.values(), *run.final_domains.values()]
    assert counted[1].amount == sum(len(batch.inputs) for domain in everything for batch in domain.batches)
    # At most: an evaluation within a skill may hold after it, and that of its start before it.
    watched = sum(len(batch.inputs) for name in ("requests", "sql") for batch in run.domains[name].batches)
    assert 0 <= counted[0].amount - calls.rows <= 2 * watched


def test_a_resumed_run_evaluates_the_same_documents(trained, tmp_path):
    folder = tmp_path / "small"
    shutil.copytree(trained[0], folder)
    shutil.rmtree(folder / "checkpoints/final")
    shutil.rmtree(checkpoint.step_folders(folder)[-1])
    assert train.main(["--resume", str(folder), "--quiet"]) == 0
    assert (folder / "results.json").read_bytes() == (trained[0] / "results.json").read_bytes()


@pytest.mark.parametrize("name", ["finished", "interrupted"])
def test_a_run_from_before_the_budget_keeps_evaluating_everything(name):
    assert "eval" not in yaml.safe_load((STORED / name / "config.yaml").read_text())
    kept = load_config(STORED / name / "config.yaml").eval
    assert (kept.tokens, kept.full) == (None, False)


def test_it_keeps_that_when_it_learns_more(tmp_path, monkeypatch):
    shutil.copytree(STORED, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    assert add.main(["finished", "data/signs.jsonl", "--name", "signs", "--quiet"]) == 0
    assert yaml.safe_load(Path("finished/config.yaml").read_text())["eval"] == {
        "tokens": None, "total_tokens": 131072, "full": False
    }  # fmt: skip
    counts = [(v["documents"], v["of_documents"]) for v in results(Path("finished"))["validation"].values()]
    assert len(counts) == 3
    assert all(documents == whole for documents, whole in counts)


REFINE = """
skills: [{name: requests, source: DATA/requests}, {name: requests_more, source: DATA/requests_more}]
growth: {base_skill: null, policy: threshold, split: false, bootstrap: 50, threshold: -1.0,
  min_samples: 8, dense_steps: 0, anneal_steps: 0, top_k: 1}
data: {max_seq_length: 128}
training: {max_steps: 2, steps_per_eval: 2, memory_tokens: 128, router_fit_steps: 10}
"""


def test_a_refinement_that_is_undone_costs_one_evaluation(short_skills, tmp_path, monkeypatch):
    """Losses before it are those of the skill before, and hold again after it."""
    calls, names = recorded(monkeypatch), ["requests", "requests_more"]
    undone = RefinementVerdict(False, "requests", 1.0, 0.0, 0.0, "it was to be undone")
    monkeypatch.setattr(refine, "judge_refinement", lambda *given: undone)
    assert train.main(start(tmp_path, REFINE.replace("DATA", str(short_skills)), "--quiet")) == 0
    stored = results(tmp_path / "small")
    assert len(stored["experts"]) == 1
    assert stored["matrix"][2] == stored["matrix"][1], "it was undone"
    after = calls[calls.index((None, ["requests_more"])) + 1 :]
    assert (None, ["requests"]) in after or (None, names) in after
    own = [(0, ["requests"]), (1, ["requests"]), (0, ["requests_more"]), (1, ["requests_more"])]
    assert calls[-5:] == [(None, names), *own], "the end needs the test documents only"
