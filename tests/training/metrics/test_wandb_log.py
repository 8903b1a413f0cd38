"""W&B: what it is sent, a failing one that is left alone, and the real one offline."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dylora_mlx.config import LogConfig
from dylora_mlx.run import metadata as identity
from dylora_mlx.training.metrics.wandb_log import WandbTracker, flatten_record


class Stub:
    """W&B that notes what it gets, and fails from record `fails` on."""

    def __init__(self, fails: int = 99):
        self.fails, self.records, self.calls, self.artifacts, self.ended = fails, [], 0, [], None
        self.summary: dict = {}

    def log(self, record, step=None):
        self.calls += 1
        if self.calls >= self.fails:
            raise ConnectionError("gone\nmore")
        self.records.append((step, record))

    def log_artifact(self, artifact):
        self.artifacts.append(artifact)

    def finish(self, exit_code=0):
        self.ended = exit_code


class Artifact:
    def __init__(self, name, type, metadata):
        self.name, self.type, self.metadata, self.files = name, type, metadata, []

    def add_dir(self, path):
        self.files.append(path)

    add_file = add_dir


@pytest.fixture
def asked(monkeypatch) -> dict:
    """Puts a stub in W&B's place; what it was started with."""
    found: dict = {"stub": Stub()}
    fake = SimpleNamespace(
        Settings=lambda **k: k, init=lambda **k: found.update(k) or found["stub"], Artifact=Artifact,
        Html=lambda text, inject: ("html", text), Table=lambda columns, data: ("table", columns, data),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return found


def test_a_failing_wandb_is_reported_once(tmp_path, asked):
    asked["stub"], warnings = Stub(fails=2), []
    made = WandbTracker(LogConfig(wandb="offline", project_name="mine"), tmp_path, {"seed": 3}, "abc", warnings.append)
    for step in (1, 2, 3):
        made.log(step, {"lm_loss": float(step)})
    made.finish({}, [], [])
    assert (asked["mode"], asked["project"], asked["id"], asked["resume"]) == ("offline", "mine", "abc", "allow")
    assert asked["config"] == {"seed": 3}
    assert asked["stub"].records == [(1, {"lm_loss": 1.0})]
    assert (asked["stub"].calls, asked["stub"].ended) == (2, None)
    assert warnings == ["W&B stopped answering, metrics.jsonl goes on: gone"]


def test_one_that_does_not_start_is_left_alone(tmp_path, monkeypatch):
    def fail(**_):
        raise RuntimeError("no key")

    warnings: list[str] = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Settings=dict, init=fail))
    made = WandbTracker(LogConfig(wandb="online"), tmp_path, {}, "abc", warnings.append)
    made.log(1, {"lm_loss": 1.0})
    made.log_charts(1)
    made.close(130)
    assert warnings == ["W&B could not start, metrics.jsonl has everything: no key"]


def test_disabled_means_that_nothing_is_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    made = WandbTracker(LogConfig(), tmp_path, {}, "abc", pytest.fail)
    made.log(1, {"lm_loss": 1.0})
    made.finish({}, [], [])
    made.close(1)


def test_the_end_has_the_matrix_the_report_and_the_adapters(finished, asked):
    made = WandbTracker(LogConfig(wandb="offline", artifact=True), finished, {}, "abc", pytest.fail)
    made.log_charts(4)
    matrix = [{"a": 3.0, "b": 4.0}, {"a": 2.0}, {"a": 2.1, "b": 1.0}]
    made.finish({"final_mean": 1.5}, matrix, ["base", "a", "b"])
    (step, pictures), (_, last) = asked["stub"].records
    assert step == 4
    assert 'id="matrix"' in pictures["pictures"][1]
    assert 'id="gates"' in pictures["pictures"][1]
    assert 'id="settings"' not in pictures["pictures"][1]
    assert 'id="settings"' in last["report"][1]
    assert last["matrix"] == (
        "table", ["after", "a", "b"], [["base", 3.0, 4.0], ["a", 2.0, None], ["b", 2.1, 1.0]]
    )  # fmt: skip
    (artifact,) = asked["stub"].artifacts
    assert (artifact.name, artifact.type) == ("small-adapters", "model")
    assert artifact.files == [str(finished / "checkpoints" / "final"), str(finished / "config.yaml")]
    assert asked["stub"].summary == {"final_mean": 1.5}
    assert asked["stub"].ended == 0


def test_leaving_early_keeps_what_was_logged(tmp_path, asked):
    made = WandbTracker(LogConfig(wandb="offline"), tmp_path, {}, "abc", pytest.fail)
    made.close(143)
    made.log(1, {"lm_loss": 1.0})
    assert asked["stub"].ended == 143
    assert asked["stub"].records == []


def test_records_become_scalars():
    record = {
        "skill": "sql", "usage": {"sql": [0.25, 0.75]}, "similarity_scores_on_creation": {"flask": 0.5},
        "packed_sequence_length_histogram": [1, 2], "lm_loss": 2.0, "frozen_projections": ["q_proj"],
    }  # fmt: skip
    assert flatten_record(record) == {
        "skill": "sql", "usage/sql/0": 0.25, "usage/sql/1": 0.75, "similarity_scores_on_creation/flask": 0.5,
        "lm_loss": 2.0, "frozen_projections/0": "q_proj",
    }  # fmt: skip


def test_a_run_keeps_its_id(finished, tmp_path):
    copy = tmp_path / "renamed"
    shutil.copytree(finished, copy)
    first = json.loads((finished / "run.json").read_text())["id"]
    assert identity.run_id(copy) == first
    (copy / "run.json").write_text('{"id": "../../x"}')
    other = identity.run_id(copy)
    assert other != first
    assert other.isalnum()
    (copy / "run.json").unlink()
    assert identity.run_id(copy) not in (first, other)


@pytest.mark.slow
def test_the_real_one_offline(finished, tmp_path):
    """In a process of its own: W&B keeps one service for all runs of a process."""
    program = (
        "import sys; from pathlib import Path; from dylora_mlx.config import LogConfig\n"
        "from dylora_mlx.training.metrics.wandb_log import WandbTracker\n"
        "folder = Path(sys.argv[1])\n"
        "made = WandbTracker(LogConfig(wandb='offline', artifact=True), folder, {'seed': 1}, 'abcd1234', sys.exit)\n"
        "made.log(1, {'lm_loss': 2.0, 'usage': {'sql': [0.5, 0.5]}}); made.log_charts(1)\n"
        "made.finish({'final_mean': 1.0}, [{'sql': 2.0}, {'sql': 1.0}], ['base', 'sql'])\n"
    )
    folder = tmp_path / "small"
    shutil.copytree(finished, folder)
    ran = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=180)
    assert ran.returncode == 0, ran.stderr
    (written,) = folder.glob("wandb/offline-run-*-abcd1234/run-abcd1234.wandb")
    content = written.read_bytes()
    for name in (b"lm_loss", b"usage/sql/1", b"final_mean", b"small-adapters"):
        assert name in content
