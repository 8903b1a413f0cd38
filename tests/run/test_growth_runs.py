"""Refinement, rank growth, merging and eviction, each in a small run from end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx import plan, restore, train
from dylora_mlx.growth.decide import bandit_log
from dylora_mlx.growth.decide.bandit_log import BanditContext
from dylora_mlx.run import forecast, run_folder
from dylora_mlx.system import console
from dylora_mlx.training.skill import learn
from tests.conftest import SMALL_BASE, start

STREAM = """
skills:
  - {name: requests, source: DATA/requests}
  - {name: sql, source: DATA/sql, rank: 4, alpha: 8}
  - {name: THIRD, source: DATA/THIRD}
growth: {base_skill: {name: python, source: DATA/python}, dense_steps: 1, anneal_steps: 1, bootstrap: 100,
  MORE}
model: {projections: [q_proj, v_proj]}
data: {max_seq_length: 256}
training:
  {grad_accumulation_steps: 1, max_steps: 4, epochs: 4, steps_per_eval: 2, save_every: 2, memory_tokens: 256, router_fit_steps: 40,
   keep_checkpoints: 20}
log: {steps_per_report: 1}
"""


@pytest.fixture
def run(short_skills, tmp_path) -> Callable[..., Path]:
    """Return a function that trains the stream with a third skill and more growth options and returns the run folder."""

    def train_stream(third: str, more: str, name: str = "run", steps: int = 4) -> Path:
        (tmp_path / name).mkdir()
        options = more if "threshold: " in more else f"threshold: 0.88, {more}"
        text = STREAM.replace("THIRD", third).replace("MORE", options).replace("DATA", str(short_skills))
        assert train.main(start(tmp_path / name, text.replace("max_steps: 4", f"max_steps: {steps}"))) == 0
        return tmp_path / name / "small"

    return train_stream


def decisions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "decisions.jsonl").read_text().splitlines()]


def adapter(folder: Path, checkpoint: str, expert: int) -> dict[str, mx.array]:
    weights = mx.load(str(folder / "checkpoints" / checkpoint / f"experts/expert_{expert}/adapters.safetensors"))
    assert isinstance(weights, dict)
    return weights


def equal(first: dict[str, mx.array], second: dict[str, mx.array]) -> bool:
    return first.keys() == second.keys() and all(
        first[n].shape == second[n].shape and mx.array_equal(first[n], second[n]).item() for n in first
    )


def test_a_known_skill_refines_its_expert(run):
    trained_run = run("requests_more", "when_known: refine, epsilon: 0.5", steps=8)
    last = decisions(trained_run)[-1]
    assert (last["action"], last["expert"]) == ("refine", 1)
    outcome = last["outcome"]
    assert outcome["refined"]["kept"]
    assert outcome["steps"] == 8
    assert outcome["loss"] < outcome["loss_before"], "the loss before and after"
    assert outcome["refined"]["gain"] == pytest.approx(outcome["loss_before"] - outcome["loss"])
    assert not equal(adapter(trained_run, "step-000016", 1), adapter(trained_run, "final", 1))
    assert equal(adapter(trained_run, "step-000016", 2), adapter(trained_run, "final", 2))


def test_a_harmful_refinement_is_rolled_back_exactly(run, monkeypatch, capsys):
    """Each update of the third skill is reversed and enlarged, which makes every loss worse."""
    advance = learn.train_step

    def harmful(run, step, work, now):
        before = [mx.array(run.model.experts[0].layers[-1]["q_proj"].lora_b)]
        outcome = advance(run, step, work, now)
        if run.state.skill_index == 2:
            held = run.model.experts[0].layers[-1]["q_proj"]
            held.lora_b = before[0] - 40 * (held.lora_b - before[0])
        return outcome

    monkeypatch.setattr(learn, "train_step", harmful)
    trained_run = run("requests_more", "when_known: refine, epsilon: 0.0")
    last = decisions(trained_run)[-1]
    assert not last["outcome"]["refined"]["kept"]
    assert last["outcome"]["loss"] == last["outcome"]["loss_before"]
    assert "rolled back" in capsys.readouterr().out
    before, after = (trained_run / "checkpoints" / name for name in ("step-000008", "final"))
    for expert in (1, 2):
        assert equal(adapter(trained_run, before.name, expert), adapter(trained_run, after.name, expert))
        files = [folder / f"experts/expert_{expert}/adapters.safetensors" for folder in (before, after)]
        assert files[0].samefile(files[1]), "rolled back to the same arrays, which are linked"
    rows = [mx.load(str(folder / "router.safetensors")) for folder in (before, after)]
    assert isinstance(rows[0], dict)
    assert isinstance(rows[1], dict)
    assert equal(*rows)
    pools = [json.loads((folder / "pool.json").read_text())["experts"] for folder in (before, after)]
    assert pools[0] == pools[1]


def test_the_rank_doubles_when_the_loss_stalls(run):
    """No step improves the loss by ten nats, so every check doubles the rank, up to the maximum."""
    trained_run = run("stripe", "rank: {epsilon: 10.0, steps: 3, max: 16}", steps=8)
    results = json.loads((trained_run / "results.json").read_text())
    assert [e["rank"] for e in results["experts"]] == [16, 16, 16]
    assert [e["alpha"] for e in results["experts"]] == [32.0, 32.0, 32.0], "alpha / r stays"
    lines = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    growths = [(line["step"], line["rank_growth"]) for line in lines if "rank_growth" in line]
    assert growths == [(3, 16), (11, 8), (14, 16), (19, 16)], "every three steps, the first against the start"
    evaluated = [line["step"] for line in lines if "eval_requests_loss" in line and "after_skill" not in line]
    assert evaluated == [0, 2, 3, 4, 6, 8], "every two steps, and at the checks"
    for number, name in enumerate(("requests", "sql", "stripe"), 1):
        before, after = results["matrix"][number - 1][name], results["matrix"][number][name]
        assert after < before, "the loss before and after"


SIZE = 2 * 8 * ((64 + 64) + (64 + 32))
"""Parameters of an expert of rank 8."""


@pytest.mark.parametrize(
    ("more", "action", "experts"),
    [
        ("epsilon: 9.0, budget: {adapters: CAP, merge_distance: 1.5, merge_steps: 2}", "merge", [1, 2]),
        ("epsilon: 9.0, budget: {adapters: CAP, merge_distance: 0.0}", "evict", None),
    ],
)
def test_the_budget_removes_an_expert(run, more, action, experts, capsys):
    cap = 2 * SIZE
    trained_run = run("stripe", more.replace("CAP", str(cap)))
    lines = decisions(trained_run)
    assert [line["action"] for line in lines] == ["create", "create", action, "create"]
    removal = lines[2]
    assert removal["kept"]
    assert experts is None or removal["experts"] == experts
    assert removal["saved"] > 0
    assert removal["details"]["seconds"] > 0
    assert abs(removal["worst_rise"]) > 0, "the loss before and after"
    pool = json.loads((trained_run / "checkpoints/final/pool.json").read_text())
    assert len(pool["experts"]) == 2
    owners = {entry["skill"]: entry["expert"] for entry in pool["library"]["entries"]}
    assert owners["stripe"] == 2 == lines[3]["expert"]
    if action == "merge":
        assert owners["requests"] == owners["sql"] == 1
        assert pool["experts"][0]["skill"] == "requests+sql"
    opened = run_folder.open_run(trained_run, "float32")
    assert opened.pool.num_parameters() <= cap
    archive = trained_run / "removed" / removal["details"]["archive"]
    assert json.loads((archive / "removed.json").read_text())["action"] == action
    check_restore(trained_run, archive, capsys)


def check_restore(trained_run: Path, archive: Path, capsys) -> None:
    """Restore an archive and check that its experts return bit for bit and serve their skills again."""
    assert restore.main([str(trained_run)]) == 0
    assert f"removed/{archive.name}" in capsys.readouterr().out
    described = json.loads((archive / "removed.json").read_text())["experts"]
    assert restore.main([str(trained_run), f"removed/{archive.name}"]) == 0
    opened = run_folder.open_run(trained_run, "float32")
    assert len(opened.pool) == 2 + len(described)
    limit = f"{opened.pool.num_parameters()} adapter parameters, growth.budget.adapters is {2 * SIZE}"
    assert f"warning: the pool now has {limit}" in capsys.readouterr().err
    for expert_id, item in enumerate(described, 3):
        archived = mx.load(str(archive / f"experts/expert_{item['expert_id']}/adapters.safetensors"))
        assert isinstance(archived, dict)
        assert equal(archived, adapter(trained_run, "final", expert_id))
        assert all(opened.library.experts_of[skill] == expert_id for skill in item["skills"])
    assert (trained_run / "checkpoints/final.before-001/MANIFEST.json").is_file(), "what was there is kept"
    capsys.readouterr()
    assert restore.main([str(trained_run), f"removed/{archive.name}"]) == 2
    assert "in the pool already" in capsys.readouterr().err
    assert restore.main([str(trained_run), "checkpoints/final"]) == 2
    assert "not an archive" in capsys.readouterr().err


@pytest.mark.slow
def test_no_expert_is_removed_that_raises_a_loss(run):
    """With no rise allowed, no expert is removed, the third skill gets none and the pool is unchanged."""
    trained_run = run("stripe", f"epsilon: 0.0, budget: {{adapters: {2 * SIZE}, merge_distance: 1.5, merge_steps: 1}}")
    lines = decisions(trained_run)
    tried = [line for line in lines if line["action"] in ("merge", "evict")]
    assert tried
    assert not any(line["kept"] for line in tried)
    assert lines[-1]["action"] in ("reuse", "skip")
    assert "growth.budget.adapters" in lines[-1]["reason"]
    assert lines[-1]["novel"]
    for expert in (1, 2):
        assert equal(adapter(trained_run, "step-000008", expert), adapter(trained_run, "final", expert))
    assert not list((trained_run / "removed").iterdir())


def test_a_close_call_is_probed(run):
    """The threshold is just above the third skill's similarity, so a trial expert decides."""
    score = decisions(run("requests_more", "policy: threshold", "known"))[-1]["score"]
    trained_run = run("requests_more", f"threshold: {score + 1e-4}, probe: {{steps: 2, rows: 2}}")
    last = decisions(trained_run)[-1]
    assert (last["policy"], last["undecided"]) == ("probe", True)
    losses, trial = last["probe"]["losses"], last["probe"]["trial"]
    assert losses.keys() == {"0", "1", "2"}
    low, high = trial["interval"]
    assert low <= trial["gain"] <= high
    assert trial["gain"] == pytest.approx(min(losses.values()) - trial["loss"], abs=1e-6)
    assert last["novel"] == (low > 0.02)
    best = min(losses, key=lambda expert_id: losses[expert_id])
    assert last["action"] == ("create" if last["novel"] else "refine")
    assert last["expert"] == (3 if last["novel"] else int(best))


def mixed_stream(short_skills: Path, tmp_path: Path) -> tuple[str, np.ndarray]:
    """Return a stream of one file that mixes two skills, and which of its training documents belong to the second."""
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    owners = {}
    for split in ("train", "validation", "test"):
        kinds = [(short_skills / skill / f"{split}.jsonl").read_text().splitlines() for skill in ("stripe", "sql")]
        both = [*kinds[0], *kinds[1]]
        order = np.random.default_rng(0).permutation(len(both))
        (mixed / f"{split}.jsonl").write_text("\n".join(both[i] for i in order) + "\n")
        owners[split] = order >= len(kinds[0])
    text = STREAM.replace("requests, source: DATA/requests", f"both, source: {mixed}").replace(
        "MORE", "threshold: 0.88, policy: threshold"
    )
    text = "\n".join(line for line in text.splitlines() if "name: sql" not in line and "THIRD" not in line)
    return text.replace("DATA", str(short_skills)).replace("max_steps: 4", "max_steps: 3"), owners["train"]


def test_a_file_of_two_skills_becomes_two_experts(short_skills, tmp_path, monkeypatch, capsys):
    """The parts replace the file; each is decided on and learned in turn. A plan says the same before."""
    text, is_sql = mixed_stream(short_skills, tmp_path)
    assert train.main(start(tmp_path, text)) == 0
    decided = decisions(tmp_path / "small")
    assert [(line["skill"], line["action"], line["expert"]) for line in decided] == [
        ("both.1", "create", 1), ("both.2", "create", 2),
    ]  # fmt: skip
    matrix = json.loads((tmp_path / "small/results.json").read_text())["matrix"]
    assert {"both", "both.1", "both.2"} <= matrix[0].keys()
    assert matrix[2]["both.2"] < matrix[1]["both.2"]
    state = json.loads((tmp_path / "small/checkpoints/final/trainer.json").read_text())
    agree = np.mean(np.array(state["skill_parts"]["both"]["train"]) == is_sql)
    assert max(agree, 1 - agree) > 0.95, "each document on its side"
    capsys.readouterr()
    monkeypatch.setattr(forecast, "measure_cost", lambda *_: forecast.MeasuredCost(60.0, 1.0, 1, 1))
    monkeypatch.setattr(console.console, "_width", 200)
    assert plan.main([str(tmp_path / "small.yaml"), "--model.base", str(SMALL_BASE)]) == 0
    planned = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")] for line in planned.splitlines() if " -> " in line]
    sizes = [np.sum(np.array(state["skill_parts"]["both"]["train"]) == part) for part in (0, 1)]
    for row, line, documents in zip(rows, decided, sizes, strict=True):
        assert row[1:3] == [line["skill"], str(documents)]
        assert row[5:7] == [f"{line['action']} -> {line['expert']}", f"{line['score']:.3f}"]
        assert row[7:10] == [str(line["outcome"]["parameters"]), str(line["outcome"]["steps"]), "3.0"]
    assert f"both holds documents of 2 kinds: both.1 ({sizes[0]} documents), both.2 ({sizes[1]} documents)" in planned
    total = sum(line["outcome"]["parameters"] for line in decided)
    assert f"2 experts, {total} adapter parameters" in planned
    assert "about 6.0 minutes of steps" in planned


@pytest.mark.slow
def test_a_resumed_run_restores_the_parts(short_skills, tmp_path, monkeypatch):
    text, _ = mixed_stream(short_skills, tmp_path)
    save = run_folder.save_checkpoint

    def stopping(run, name=None):
        save(run, name)
        if run.state.skill_index == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_folder, "save_checkpoint", stopping)
    assert train.main(start(tmp_path, text)) == 130
    monkeypatch.setattr(run_folder, "save_checkpoint", save)
    assert train.main(["--resume", str(tmp_path / "small")]) == 0
    assert [line["skill"] for line in decisions(tmp_path / "small")] == ["both.1", "both.2"]
    results = json.loads((tmp_path / "small/results.json").read_text())
    assert results["skills"] == ["both.1", "both.2"]
    assert len(results["experts"]) == 2


@pytest.mark.slow
def test_the_bandit_learns_from_decision_logs(run, tmp_path):
    """In this history creating always paid a little and cost nothing, so the bandit creates where the threshold would not."""
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(60):
        similarity = float(rng.uniform(-0.2, 1.0))
        context = BanditContext(similarity, similarity - 0.75, 0.4, 0.1, int(rng.integers(0, 6)), 4000)
        rewards: dict[bandit_log.Arm, float] = {"create": 0.4 + 0.02 * rng.normal(), "known": 0.0}
        lines.append(
            json.dumps({"bandit": bandit_log.to_json(bandit_log.BanditTrial(context, "create", None, rewards))})
        )
    history = tmp_path / "history.jsonl"
    history.write_text("\n".join(lines) + "\n")
    folder = run("requests_more", f"policy: bandit, bandit: {{history: [{history}], cost: 0.0}}")
    decided = decisions(folder)
    assert [line["policy"] for line in decided] == ["bandit", "bandit", "bandit"]
    assert [line["action"] for line in decided] == ["create", "create", "create"]
    for line in decided:
        assert line["bandit"]["rewards"].keys() == {"create", "known"}, "the outcome teaches the next run"
        assert line["bandit"]["propensity"] > 0.5
    again = bandit_log.read_history([folder])
    assert len(again) == 3


@pytest.mark.parametrize("start", ["mean", "scratch"])
def test_initialization_of_a_new_expert(run, monkeypatch, start):
    """The second expert starts from the first at its rank of 4, the third from the mean of both at rank 8."""
    advance, initial = learn.train_step, {}

    def watched(run, step, work, now):
        experts = run.model.experts
        if len(experts) not in initial:
            sizes = [np.array(expert.layers[-1]["v_proj"].lora_b) for expert in experts]
            initial[len(experts)] = [float(np.abs(size).max()) for size in sizes]
            if len(experts) == 2:
                both = [
                    e.scale * np.array(e.layers[-1]["v_proj"].lora_a @ e.layers[-1]["v_proj"].lora_b) for e in experts
                ]
                initial["alike"] = float((both[0] * both[1]).sum() / (both[0] ** 2).sum())
        return advance(run, step, work, now)

    monkeypatch.setattr(learn, "train_step", watched)
    run("stripe", f"expert_init: {start}")
    assert initial[1] == [0.0], "the first has no expert to start from"
    started = [initial[2][1] > 0, initial[3][2] > 0]
    assert started == [start == "mean"] * 2
    assert (initial["alike"] > 0.9) == (start == "mean")
