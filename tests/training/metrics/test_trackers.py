"""Trackers through their own packages, offline: what they wrote is read back. A failing one stops itself alone, a missing one is named."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from dylora_mlx import train
from dylora_mlx.config import LogConfig
from dylora_mlx.errors import UserError
from dylora_mlx.training.metrics.trackers import trackers
from dylora_mlx.training.metrics.trackers.tracker import numbers
from dylora_mlx.training.metrics.trackers.trackers import Trackers, check_installed
from tests.conftest import start

PROGRAM = """
import sys
from pathlib import Path
from dylora_mlx.config import LogConfig
from dylora_mlx.training.metrics.trackers.trackers import Trackers
log = LogConfig(to=[sys.argv[1]], project_name="a project")
tracker = Trackers(log, Path(sys.argv[2]), {"seed": 3, "model": {"rank": 8}}, "abcd1234", sys.exit)
tracker.log(1, {"skill": "sql", "lm_loss": 2.5, "usage": {"sql": [0.25, 0.75]}, "frozen": True, "grad_norm": None})
tracker.log(2, {"skill": "sql", "lm_loss": 2.25, "grad_norm": float("inf")})
tracker.log_charts(2)
tracker.finish({"final_mean": 1.5}, [{"sql": 2.0}], ["base"])
"""
WRITTEN = {"lm_loss": [(1, 2.5), (2, 2.25)], "usage/sql/0": [(1, 0.25)], "usage/sql/1": [(1, 0.75)]}


def written(name: str, folder: Path) -> None:
    """Log two records and the summary with a tracker in a process of its own, which must print nothing. Skips without its package."""
    pytest.importorskip(name)
    (folder / "small").mkdir()
    environment = os.environ | {"TRACKIO_DIR": str(folder / "trackio")}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, name, str(folder / "small")],
        capture_output=True, text=True, timeout=180, env=environment, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == ""


def scalars_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return (step, value) by name from TensorBoard's event files, read by its own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # float32 values of a tensor each, as `add_scalar` writes them.
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    values = {
        name: [(e.step, float(e.tensor_proto.float_val[0])) for e in events.Tensors(name)]
        for name in events.Tags()["tensors"]
    }
    return {name: sorted(steps) for name, steps in values.items()}


def test_tensorboard_reads_what_was_logged(tmp_path):
    written("tensorboard", tmp_path)
    assert scalars_of(tmp_path / "small" / "tensorboard") == WRITTEN | {"final_mean": [(2, 1.5)]}


def test_trackio_reads_what_was_logged(tmp_path):
    written("trackio", tmp_path)
    (file,) = (tmp_path / "trackio").glob("*.db")
    with closing(sqlite3.connect(file)) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
        (config,) = database.execute("select config from configs").fetchone()
    assert {name for name, _, _ in rows} == {"small-abcd1234"}
    assert [(step, json.loads(metrics)) for _, step, metrics in rows] == [
        (1, {"lm_loss": 2.5, "usage/sql/0": 0.25, "usage/sql/1": 0.75}), (2, {"lm_loss": 2.25}), (2, {"final_mean": 1.5}),
    ]  # fmt: skip
    assert json.loads(config)["model"] == {"rank": 8}


def test_swanlab_reads_what_was_logged(tmp_path):
    written("swanlab", tmp_path)
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    (file,) = (tmp_path / "small" / "swanlab").rglob("run-*.swanlab")
    reader, values = DataStoreReader(), {}
    reader.open(file)
    while (content := reader.scan()) is not None:
        record = Record.FromString(content)
        if record.HasField("scalar"):
            values.setdefault(record.scalar.key, []).append((record.scalar.step, record.scalar.value.number))
    reader.close()
    assert values == WRITTEN | {"final/final_mean": [(2, 1.5)]}


def test_a_run_logs_the_numbers_of_its_records(tmp_path, capfd):
    pytest.importorskip("tensorboard")
    options = ("--log.to", "tensorboard", "--training.max_steps", "2", "--json")
    assert train.main(start(tmp_path, SHORT, *options)) == 0
    assert all(json.loads(line) for line in capfd.readouterr().out.splitlines())
    seen = scalars_of(tmp_path / "small" / "tensorboard")
    records = [json.loads(line) for line in (tmp_path / "small" / "metrics.jsonl").read_text().splitlines()]
    losses = [(record["step"], record["lm_loss"]) for record in records if "lm_loss" in record]
    assert [step for step, _ in seen["lm_loss"]] == [step for step, _ in losses] == [1, 2]
    assert [value for _, value in seen["lm_loss"]] == pytest.approx([value for _, value in losses], rel=1e-6)
    assert seen["final_mean"][0][0] == 2


SHORT = """
skills: [{name: requests, source: packaged/requests, limit: 40}]
growth: {base_skill: null}
data: {max_seq_length: 128}
log: {steps_per_report: 1}
"""


class Stub:
    """A tracker that notes its calls and fails at the call with this name."""

    def __init__(self, calls: list[str], fails: str = ""):
        self.calls, self.fails = calls, fails

    def __getattr__(self, name):
        def call(*_):
            self.calls.append(name)
            if name == self.fails:
                raise ConnectionError("gone\nmore")

        return call


@pytest.mark.parametrize("fails", ["log", "log_charts", "finish"])
def test_a_tracker_that_fails_stops_itself_alone(tmp_path, monkeypatch, fails):
    calls, failing, warnings = [], [], []
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", ("TensorBoard", lambda *_: Stub(calls)))
    monkeypatch.setitem(trackers.TRACKERS, "swanlab", ("SwanLab", lambda *_: Stub(failing, fails)))
    running = Trackers(LogConfig(to=["swanlab", "tensorboard"]), tmp_path, {}, "id", warnings.append)
    for step in (1, 2):
        running.log(step, {})
        running.log_charts(step)
    running.finish({}, [], [])
    running.close(1)
    assert calls == ["log", "log_charts"] * 2 + ["finish"]
    assert failing == calls[: calls.index(fails) + 1]
    assert warnings == ["SwanLab stopped answering, metrics.jsonl goes on: gone"]


def test_a_tracker_that_does_not_start_is_a_warning(tmp_path, monkeypatch):
    calls, warnings = [], []
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=lambda *_, **__: 1 / 0))
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", ("TensorBoard", lambda *_: Stub(calls)))
    running = Trackers(LogConfig(to=["trackio", "tensorboard"]), tmp_path, {}, "id", warnings.append)
    running.close(130)
    assert warnings == ["Trackio could not start, metrics.jsonl has everything: division by zero"]
    assert calls == ["close"]


def test_numbers_leave_out_what_no_tracker_plots():
    record = {"a": 1, "b": None, "c": float("nan"), "d": True, "e": "text", "f": {"g": [0.5]}}
    assert numbers(record) == {"a": 1, "f/g/0": 0.5}


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio", "swanlab"])
def test_a_missing_package_is_named_before_anything_is_written(tmp_path, monkeypatch, capfd, name):
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    assert train.main(start(tmp_path, SHORT, "--log.to", name)) == 2
    line = f"error: log.to: the package {name} is not installed; pip install 'dylora-mlx[{name}]'\n"
    assert capfd.readouterr().err == line
    assert not (tmp_path / "small").exists()


def test_wandb_has_its_own_option_too(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"^log\.wandb: the package wandb is not installed"):
        check_installed(LogConfig(wandb="offline"))
    check_installed(LogConfig())
    assert LogConfig(wandb="online", to=["tensorboard"]).trackers == ["wandb", "tensorboard"]
    assert LogConfig(wandb="online", to=["wandb"]).trackers == ["wandb"]
