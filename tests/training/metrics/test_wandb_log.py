"""W&B tracking: the logged records, failures that do not stop a run, and the real library offline."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dylora_mlx.config import LogConfig
from dylora_mlx.run import metadata as identity
from dylora_mlx.training.metrics.trackers.tracker import flatten_record
from dylora_mlx.training.metrics.trackers.trackers import Trackers


class Stub:
    """A W&B run that stores what it receives and fails from call number `fails` on."""

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
def wandb_stub(monkeypatch) -> dict:
    """Replace the wandb module by a stub; return it and the arguments of wandb.init."""
    captured: dict = {"stub": Stub()}
    fake = SimpleNamespace(
        Settings=lambda **k: k, init=lambda **k: captured.update(k) or captured["stub"], Artifact=Artifact,
        Html=lambda text, inject: ("html", text), Table=lambda columns, data: ("table", columns, data),
        Histogram=lambda np_histogram: ("histogram", *np_histogram),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return captured


def test_a_failing_wandb_is_reported_once(tmp_path, wandb_stub):
    wandb_stub["stub"], warnings = Stub(fails=2), []
    tracker = Trackers(LogConfig(wandb="offline", project_name="mine"), tmp_path, {"seed": 3}, "abc", warnings.append)
    for step in (1, 2, 3):
        tracker.log(step, {"lm_loss": float(step)})
    tracker.finish({}, [], [])
    assert (wandb_stub["mode"], wandb_stub["project"], wandb_stub["id"], wandb_stub["resume"]) == (
        "offline",
        "mine",
        "abc",
        "allow",
    )
    assert wandb_stub["config"] == {"seed": 3}
    assert wandb_stub["stub"].records == [(1, {"lm_loss": 1.0})]
    assert (wandb_stub["stub"].calls, wandb_stub["stub"].ended) == (2, None)
    assert warnings == ["W&B stopped answering, metrics.jsonl goes on: gone"]


def test_wandb_that_does_not_start_is_reported_once(tmp_path, monkeypatch):
    def fail(**_):
        raise RuntimeError("no key")

    warnings: list[str] = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Settings=dict, init=fail))
    tracker = Trackers(LogConfig(wandb="online"), tmp_path, {}, "abc", warnings.append)
    tracker.log(1, {"lm_loss": 1.0})
    tracker.log_charts(1)
    tracker.close(130)
    assert warnings == ["W&B could not start, metrics.jsonl has everything: no key"]


def test_disabled_tracking_does_not_import_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = Trackers(LogConfig(), tmp_path, {}, "abc", pytest.fail)
    tracker.log(1, {"lm_loss": 1.0})
    tracker.finish({}, [], [])
    tracker.close(1)


def test_finish_logs_the_matrix_the_report_and_the_adapters(finished, wandb_stub):
    tracker = Trackers(LogConfig(wandb="offline", artifact=True), finished, {}, "abc", pytest.fail)
    tracker.log_charts(4)
    matrix = [{"a": 3.0, "b": 4.0}, {"a": 2.0}, {"a": 2.1, "b": 1.0}]
    tracker.finish({"final_mean": 1.5}, matrix, ["base", "a", "b"])
    (step, pictures), (_, last) = wandb_stub["stub"].records
    assert step == 4
    assert 'id="matrix"' in pictures["pictures"][1]
    assert 'id="gates"' in pictures["pictures"][1]
    assert 'id="settings"' not in pictures["pictures"][1]
    assert 'id="settings"' in last["report"][1]
    assert last["matrix"] == (
        "table", ["after", "a", "b"], [["base", 3.0, 4.0], ["a", 2.0, None], ["b", 2.1, 1.0]]
    )  # fmt: skip
    (artifact,) = wandb_stub["stub"].artifacts
    assert (artifact.name, artifact.type) == ("small-adapters", "model")
    assert artifact.files == [str(finished / "checkpoints" / "final"), str(finished / "config.yaml")]
    assert wandb_stub["stub"].summary == {"final_mean": 1.5}
    assert wandb_stub["stub"].ended == 0


def test_nothing_is_logged_after_close(tmp_path, wandb_stub):
    tracker = Trackers(LogConfig(wandb="offline"), tmp_path, {}, "abc", pytest.fail)
    tracker.close(143)
    tracker.log(1, {"lm_loss": 1.0})
    assert wandb_stub["stub"].ended == 143
    assert wandb_stub["stub"].records == []


def test_records_become_scalars():
    record = {
        "skill": "sql", "usage": {"sql": [0.25, 0.75]}, "similarity_scores_on_creation": {"flask": 0.5},
        "packed_sequence_length_histogram": [1, 2], "packed_sequence_length_edges": [0, 8, 16],
        "lm_loss": 2.0, "frozen_projections": ["q_proj"],
    }  # fmt: skip
    assert flatten_record(record) == {
        "skill": "sql", "usage/sql/0": 0.25, "usage/sql/1": 0.75, "similarity_scores_on_creation/flask": 0.5,
        "lm_loss": 2.0, "frozen_projections/0": "q_proj",
    }  # fmt: skip


def test_the_packing_is_a_histogram(finished, wandb_stub):
    """Of the records of a run: the counts with their bin edges."""
    tracker = Trackers(LogConfig(wandb="offline"), finished, {}, "abc", pytest.fail)
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    packed = [line for line in lines if "packed_sequence_length_histogram" in line]
    for line in packed:
        tracker.log(line["step"], line)
    edges = [0, 32, 64, 96, 128, 160, 192, 224, 256]
    sent = [record["packed_sequence_length_histogram"] for _, record in wandb_stub["stub"].records]
    assert sent == [("histogram", line["packed_sequence_length_histogram"], edges) for line in packed]
    assert [len(counts) for _, counts, _ in sent] == [8] * len(packed)
    assert not any(name.startswith("packed_sequence_length_edges") for _, r in wandb_stub["stub"].records for name in r)


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
def test_the_real_wandb_offline(finished, tmp_path):
    """The test uses a separate process, because W&B has one service for all runs of a process."""
    program = (
        "import sys; from pathlib import Path; from dylora_mlx.config import LogConfig\n"
        "from dylora_mlx.training.metrics.trackers.trackers import Trackers\n"
        "folder = Path(sys.argv[1])\n"
        "tracker = Trackers(LogConfig(wandb='offline', artifact=True), folder, {'seed': 1}, 'abcd1234', sys.exit)\n"
        "tracker.log(1, {'lm_loss': 2.0, 'usage': {'sql': [0.5, 0.5]}}); tracker.log_charts(1)\n"
        "tracker.log(2, {'packed_sequence_length_histogram': [1, 2], 'packed_sequence_length_edges': [0, 8, 16]})\n"
        "tracker.finish({'final_mean': 1.0}, [{'sql': 2.0}, {'sql': 1.0}], ['base', 'sql'])\n"
    )
    folder = tmp_path / "small"
    shutil.copytree(finished, folder)
    ran = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=180)
    assert ran.returncode == 0, ran.stderr
    (written,) = folder.glob("wandb/offline-run-*-abcd1234/run-abcd1234.wandb")
    content = written.read_bytes()
    for name in (b"lm_loss", b"usage/sql/1", b"final_mean", b"small-adapters", b'"histogram"', b"[0,8,16]"):
        assert name in content
