"""Bandit records: round trip through decisions.jsonl, and the errors for lines that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dylora_mlx.errors import UserError
from dylora_mlx.growth.decide import bandit_log
from dylora_mlx.growth.decide.bandit_log import BanditContext, BanditTrial

CONTEXT = BanditContext(0.4, -0.35, 0.6, 0.25, 3, 12_000)
CREATED = BanditTrial(CONTEXT, "create", 0.73, {"create": 0.12, "known": 0.0})
KNOWN = BanditTrial(CONTEXT._replace(similarity=0.9, margin=0.15), "known", None, {"known": -0.01})
OPEN = BanditTrial(CONTEXT, "create", 0.5, {})


def write(path: Path, *trials: BanditTrial, **fields) -> Path:
    """Write a decision log with these trials and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"skill": "some", "bandit": bandit_log.to_json(trial), **fields}) for trial in trials]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_json_of_a_record():
    assert json.loads(json.dumps(bandit_log.to_json(CREATED))) == {
        "version": 1,
        "context": {
            "similarity": 0.4, "margin": -0.35, "entropy": 0.6, "loss_gap": 0.25, "pool_size": 3, "tokens": 12_000,
        },
        "action": "create", "propensity": 0.73, "rewards": {"create": 0.12, "known": 0.0},
    }  # fmt: skip
    assert bandit_log.to_json(KNOWN)["propensity"] is None


@pytest.mark.parametrize("trial", [CREATED, KNOWN, OPEN])
def test_round_trip(trial):
    assert bandit_log.from_json(json.loads(json.dumps(bandit_log.to_json(trial))), "here") == trial


def test_numbers_of_numpy_can_be_written():
    context = BanditContext(*(np.float32(v) for v in CONTEXT[:4]), np.int64(3), np.int32(12_000))
    trial = BanditTrial(context, "create", np.float64(0.73), {"create": np.float32(0.5)})
    restored = bandit_log.from_json(json.loads(json.dumps(bandit_log.to_json(trial))), "here")
    assert np.allclose(restored.context, CONTEXT)
    assert restored.rewards == {"create": 0.5}


def test_history_from_files_and_run_folders(tmp_path):
    first = write(tmp_path / "runs" / "a" / "decisions.jsonl", CREATED, OPEN)
    with first.open("a") as file:
        file.write(json.dumps({"skill": "plain"}) + "\n" + json.dumps({"bandit": None}) + "\n\n[]\n")
    write(tmp_path / "runs" / "b" / "decisions.jsonl", KNOWN)
    (tmp_path / "runs" / "begun").mkdir()
    single_file = write(tmp_path / "more.jsonl", KNOWN._replace(propensity=0.25))
    assert bandit_log.read_history([tmp_path / "runs" / "a"]) == [CREATED]
    assert bandit_log.read_history([tmp_path / "runs"]) == [CREATED, KNOWN]
    assert bandit_log.read_history([single_file, tmp_path / "runs" / "b"]) == [KNOWN._replace(propensity=0.25), KNOWN]
    assert bandit_log.read_history([]) == []


def test_repeated_runs_count_once(tmp_path):
    for name in "ab":
        write(tmp_path / name / "decisions.jsonl", CREATED, KNOWN, run=name)
    assert bandit_log.read_history([tmp_path, tmp_path / "a"]) == [CREATED, KNOWN]


@pytest.mark.parametrize("torn", [10, -3, -2])
def test_a_truncated_last_line_is_skipped(tmp_path, torn):
    path = write(tmp_path / "decisions.jsonl", CREATED, KNOWN)
    last = path.read_text().splitlines()[1]
    path.write_text(json.dumps({"bandit": bandit_log.to_json(CREATED)}) + "\n" + last[:torn])
    assert bandit_log.read_history([path]) == [CREATED]


def test_broken_json_is_named_by_its_line(tmp_path):
    path = write(tmp_path / "decisions.jsonl", CREATED)
    for broken in (b"{\n", b"{]\n{}\n", b'"\xff"\n'):
        path.write_bytes(json.dumps({}).encode() + b"\n" + broken)
        with pytest.raises(UserError, match=r"decisions.jsonl, line 2: not JSON; repair the line or remove it"):
            bandit_log.read_history([path])


@pytest.mark.parametrize("version", [3, None, "1"])
def test_another_version_is_refused(tmp_path, version):
    line = {"bandit": {**bandit_log.to_json(CREATED), "version": version}}
    path = tmp_path / "decisions.jsonl"
    path.write_text(json.dumps({}) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(
        UserError, match=rf"line 2: the bandit's record is of version {version}, this release reads 1; "
    ):
        bandit_log.read_history([tmp_path])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": {"similarity": 0.1}}, "lacks 'margin'"),
        ({"context": {**CONTEXT._asdict(), "entropy": float("nan")}}, "nan is not a finite number"),
        ({"context": {**CONTEXT._asdict(), "tokens": "many"}}, "'many' is not a finite number"),
        ({"context": {**CONTEXT._asdict(), "tokens": True}}, "True is not a finite number"),
        ({"context": {**CONTEXT._asdict(), "pool_size": -1}}, "a count is below 0"),
        ({"context": None}, "damaged"),
        ({"action": "reuse"}, "'reuse' is not one of create, known"),
        ({"action": ["create"]}, "is not one of create, known"),
        ({"propensity": 0}, "0 is not a probability"),
        ({"propensity": 1.5}, "1.5 is not a probability"),
        ({"rewards": {"merge": 0.5}}, "'merge' is not one of"),
        ({"rewards": {"create": None}}, "None is not a finite number"),
        ({"rewards": [0.5]}, "damaged"),
    ],
)
def test_damaged_records_give_a_one_line_error(tmp_path, change, message):
    path = tmp_path / "decisions.jsonl"
    path.write_text(json.dumps({"bandit": {**bandit_log.to_json(CREATED), **change}}) + "\n")
    with pytest.raises(UserError, match=r"decisions.jsonl, line 1: the bandit's record") as raised:
        bandit_log.read_history([path])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_folder_without_decisions_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=r"no decisions.jsonl here; give a run folder"):
            bandit_log.read_history([path])


def test_the_reward_subtracts_the_cost_of_parameters():
    assert bandit_log.reward(0.3, 2_500_000, 0.02) == pytest.approx(0.3 - 0.05)
    assert bandit_log.reward(-0.1, 0, 0.02) == -0.1
