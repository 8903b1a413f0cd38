"""Refining, growing ranks, merging and evicting, each in a small run from end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx import restore, train
from dylora_mlx.growth.decide import bandit_log
from dylora_mlx.growth.decide.bandit_log import BanditContext
from dylora_mlx.run import run_folder
from dylora_mlx.training.skill import learn
from tests.conftest import start

STREAM = """
skills:
  - {name: requests, source: DATA/requests}
  - {name: sql, source: DATA/sql, rank: 4, alpha: 8}
  - {name: THIRD, source: DATA/THIRD}
growth: {base_skill: {name: python, source: DATA/python}, dense_steps: 1, anneal_steps: 1, bootstrap: 100,
  threshold: 0.88, MORE}
data: {max_seq_length: 256}
training:
  {grad_accumulation_steps: 1, max_steps: 4, epochs: 4, steps_per_eval: 2, save_every: 2, memory_tokens: 256, router_fit_steps: 40,
   keep_checkpoints: 20}
log: {steps_per_report: 1}
"""


@pytest.fixture
def run(short_skills, tmp_path) -> Callable[..., Path]:
    """Runs the stream with a third skill and more options of growth; returns the run folder."""

    def made(third: str, more: str, name: str = "run", steps: int = 4) -> Path:
        (tmp_path / name).mkdir()
        text = STREAM.replace("THIRD", third).replace("MORE", more).replace("DATA", str(short_skills))
        assert train.main(start(tmp_path / name, text.replace("max_steps: 4", f"max_steps: {steps}"))) == 0
        return tmp_path / name / "small"

    return made


def decisions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "decisions.jsonl").read_text().splitlines()]


def adapter(folder: Path, checkpoint: str, expert: int) -> dict[str, mx.array]:
    found = mx.load(str(folder / "checkpoints" / checkpoint / f"experts/expert_{expert}/adapters.safetensors"))
    assert isinstance(found, dict)
    return found


def equal(first: dict[str, mx.array], second: dict[str, mx.array]) -> bool:
    return first.keys() == second.keys() and all(
        first[n].shape == second[n].shape and mx.array_equal(first[n], second[n]).item() for n in first
    )


def test_a_known_skill_refines_its_expert(run):
    found = run("requests_more", "when_known: refine, epsilon: 0.5", steps=8)
    last = decisions(found)[-1]
    assert (last["action"], last["expert"]) == ("refine", 1)
    outcome = last["outcome"]
    assert outcome["refined"]["kept"]
    assert outcome["steps"] == 8
    assert outcome["loss"] < outcome["loss_before"], "the loss before and after"
    assert outcome["refined"]["gain"] == pytest.approx(outcome["loss_before"] - outcome["loss"])
    assert not equal(adapter(found, "step-000016", 1), adapter(found, "final", 1))
    assert equal(adapter(found, "step-000016", 2), adapter(found, "final", 2))


def test_a_refinement_that_harms_is_rolled_back_exactly(run, monkeypatch, capsys):
    """Training with the signs of all updates turned makes everything worse."""
    advance = learn.train_step

    def harmful(run, step, work, now):
        before = [mx.array(run.model.experts[0].layers[-1]["q_proj"].lora_b)]
        outcome = advance(run, step, work, now)
        if run.state.skill_index == 2:
            held = run.model.experts[0].layers[-1]["q_proj"]
            held.lora_b = before[0] - 40 * (held.lora_b - before[0])
        return outcome

    monkeypatch.setattr(learn, "train_step", harmful)
    found = run("requests_more", "when_known: refine, epsilon: 0.0")
    last = decisions(found)[-1]
    assert not last["outcome"]["refined"]["kept"]
    assert last["outcome"]["loss"] == last["outcome"]["loss_before"]
    assert "rolled back" in capsys.readouterr().out
    before, after = (found / "checkpoints" / name for name in ("step-000008", "final"))
    for expert in (1, 2):
        assert equal(adapter(found, before.name, expert), adapter(found, after.name, expert))
    rows = [mx.load(str(folder / "router.safetensors")) for folder in (before, after)]
    assert isinstance(rows[0], dict)
    assert isinstance(rows[1], dict)
    assert equal(*rows)
    pools = [json.loads((folder / "pool.json").read_text())["experts"] for folder in (before, after)]
    assert pools[0] == pools[1]


def test_a_rank_doubles_when_the_loss_stands_still(run):
    """An improvement of ten nats in a step cannot be, so every look but the first doubles the rank, up to the cap."""
    found = run("stripe", "rank: {epsilon: 10.0, steps: 1, max: 16}", steps=8)
    results = json.loads((found / "results.json").read_text())
    assert [e["rank"] for e in results["experts"]] == [16, 16, 16]
    assert [e["alpha"] for e in results["experts"]] == [32.0, 32.0, 32.0], "alpha / r stays"
    lines = [json.loads(line) for line in (found / "metrics.jsonl").read_text().splitlines()]
    assert [line["rank_growth"] for line in lines if "rank_growth" in line] == [16, 8, 16, 16]
    for number, name in enumerate(("requests", "sql", "stripe"), 1):
        before, after = results["matrix"][number - 1][name], results["matrix"][number][name]
        assert after < before, "the loss before and after"


@pytest.mark.slow
def test_a_rank_stays_until_it_is_looked_at(run):
    found = run("stripe", "rank: {epsilon: 10.0, steps: 100, max: 16}", steps=8)
    assert [e["rank"] for e in json.loads((found / "results.json").read_text())["experts"]] == [8, 4, 8]


SIZE = 2 * 8 * ((64 + 64) + (64 + 32))
"""Parameters of an expert of rank 8."""


@pytest.mark.parametrize(
    ("more", "action", "experts"),
    [
        ("epsilon: 9.0, budget: {adapters: CAP, merge_distance: 1.5, merge_steps: 2}", "merge", [1, 2]),
        ("epsilon: 9.0, budget: {adapters: CAP, merge_distance: 0.0}", "evict", None),
    ],
)
def test_the_budget_makes_room(run, more, action, experts, capsys):
    cap = 2 * SIZE
    found = run("stripe", more.replace("CAP", str(cap)))
    lines = decisions(found)
    assert [line["action"] for line in lines] == ["create", "create", action, "create"]
    removal = lines[2]
    assert removal["kept"]
    assert experts is None or removal["experts"] == experts
    assert removal["saved"] > 0
    assert removal["details"]["seconds"] > 0
    assert abs(removal["worst_rise"]) > 0, "the loss before and after"
    pool = json.loads((found / "checkpoints/final/pool.json").read_text())
    assert len(pool["experts"]) == 2
    owners = {entry["skill"]: entry["expert"] for entry in pool["library"]["entries"]}
    assert owners["stripe"] == 2 == lines[3]["expert"]
    if action == "merge":
        assert owners["requests"] == owners["sql"] == 1
        assert pool["experts"][0]["skill"] == "requests+sql"
    opened = run_folder.open_run(found, "float32")
    assert opened.pool.num_parameters() <= cap
    archive = found / "removed" / removal["details"]["archive"]
    assert json.loads((archive / "removed.json").read_text())["action"] == action
    restored(found, archive, capsys)


def restored(found: Path, archive: Path, capsys) -> None:
    """Put an archive back: its experts come back to the bit, and its skills are theirs again."""
    assert restore.main([str(found)]) == 0
    assert f"removed/{archive.name}" in capsys.readouterr().out
    described = json.loads((archive / "removed.json").read_text())["experts"]
    assert restore.main([str(found), f"removed/{archive.name}"]) == 0
    opened = run_folder.open_run(found, "float32")
    assert len(opened.pool) == 2 + len(described)
    for expert_id, item in enumerate(described, 3):
        own = mx.load(str(archive / f"experts/expert_{item['expert_id']}/adapters.safetensors"))
        assert isinstance(own, dict)
        assert equal(own, adapter(found, "final", expert_id))
        assert all(opened.library.experts_of[skill] == expert_id for skill in item["skills"])
    assert (found / "checkpoints/final.before-001/MANIFEST.json").is_file(), "what was there is kept"
    capsys.readouterr()
    assert restore.main([str(found), f"removed/{archive.name}"]) == 2
    assert "in the pool already" in capsys.readouterr().err
    assert restore.main([str(found), "checkpoints/final"]) == 2
    assert "not an archive" in capsys.readouterr().err


@pytest.mark.slow
def test_nothing_is_removed_that_would_be_missed(run):
    """Any rise is too much, so the third skill gets no expert, and the pool is what it was."""
    found = run("stripe", f"epsilon: 0.0, budget: {{adapters: {2 * SIZE}, merge_distance: 1.5, merge_steps: 1}}")
    lines = decisions(found)
    tried = [line for line in lines if line["action"] in ("merge", "evict")]
    assert tried
    assert not any(line["kept"] for line in tried)
    assert lines[-1]["action"] in ("reuse", "skip")
    assert "growth.budget.adapters" in lines[-1]["reason"]
    assert lines[-1]["novel"]
    for expert in (1, 2):
        assert equal(adapter(found, "step-000008", expert), adapter(found, "final", expert))
    assert not list((found / "removed").iterdir())


def test_a_close_call_is_probed(run):
    """The threshold lies just above the third skill's similarity: a trial expert has to show that it is worth it."""
    score = decisions(run("requests_more", "policy: threshold", "known"))[-1]["score"]
    found = run("requests_more", f"threshold: {score + 1e-4}, probe: {{steps: 2, rows: 2}}")
    last = decisions(found)[-1]
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
    """A stream of one file that mixes two skills, and which of its training documents are the second's."""
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
        "MORE", "policy: threshold"
    )
    text = "\n".join(line for line in text.splitlines() if "name: sql" not in line and "THIRD" not in line)
    return text.replace("DATA", str(short_skills)).replace("max_steps: 4", "max_steps: 2"), owners["train"]


def test_a_file_of_two_skills_becomes_two_experts(short_skills, tmp_path):
    """The parts take the file's place, are decided on and learned one by one."""
    text, is_sql = mixed_stream(short_skills, tmp_path)
    assert train.main(start(tmp_path, text)) == 0
    found = decisions(tmp_path / "small")
    assert [(line["skill"], line["action"], line["expert"]) for line in found] == [
        ("both.1", "create", 1), ("both.2", "create", 2),
    ]  # fmt: skip
    matrix = json.loads((tmp_path / "small/results.json").read_text())["matrix"]
    assert {"both", "both.1", "both.2"} <= matrix[0].keys()
    assert matrix[2]["both.2"] < matrix[1]["both.2"]
    state = json.loads((tmp_path / "small/checkpoints/final/trainer.json").read_text())
    agree = np.mean(np.array(state["skill_parts"]["both"]["train"]) == is_sql)
    assert max(agree, 1 - agree) > 0.95, "each document on its side"


@pytest.mark.slow
def test_a_stopped_run_finds_the_parts_again(short_skills, tmp_path, monkeypatch):
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
def test_the_bandit_learns_from_ledgers(run, tmp_path):
    """A history in which creating always paid a little and never cost: the bandit creates where the threshold would not."""
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
    found = decisions(folder)
    assert [line["policy"] for line in found] == ["bandit", "bandit", "bandit"]
    assert [line["action"] for line in found] == ["create", "create", "create"]
    for line in found:
        assert line["bandit"]["rewards"].keys() == {"create", "known"}, "the outcome teaches the next run"
        assert line["bandit"]["propensity"] > 0.5
    again = bandit_log.read_history([folder])
    assert len(again) == 3


@pytest.mark.parametrize("start", ["mean", "scratch"])
def test_where_a_new_expert_starts(run, monkeypatch, start):
    """The second from the first, as much of it as its rank of 4 holds; the third from both, of what rank of 8 holds."""
    advance, begun = learn.train_step, {}

    def watched(run, step, work, now):
        experts = run.model.experts
        if len(experts) not in begun:
            sizes = [np.array(expert.layers[-1]["v_proj"].lora_b) for expert in experts]
            begun[len(experts)] = [float(np.abs(size).max()) for size in sizes]
            if len(experts) == 2:
                both = [
                    e.scale * np.array(e.layers[-1]["v_proj"].lora_a @ e.layers[-1]["v_proj"].lora_b) for e in experts
                ]
                begun["alike"] = float((both[0] * both[1]).sum() / (both[0] ** 2).sum())
        return advance(run, step, work, now)

    monkeypatch.setattr(learn, "train_step", watched)
    run("stripe", f"expert_init: {start}")
    assert begun[1] == [0.0], "the first has nobody to start from"
    started = [begun[2][1] > 0, begun[3][2] > 0]
    assert started == [start == "mean"] * 2
    assert (begun["alike"] > 0.9) == (start == "mean")
