"""Mistakes in the options and files of growth: a one-line error before any training."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest

from dylora_mlx import train
from dylora_mlx.growth.novelty.projection import ProjectionHead
from dylora_mlx.run import loop

STREAM = """
skills: [{name: requests, source: packaged/requests, limit: 40}, {name: sql, source: SOURCE, rank: 4, alpha: 8, limit: 40}]
growth: {base_skill: {name: python, source: packaged/python, limit: 40}, MORE}
"""


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """A function that runs train with more options of growth, checks the form of its error, and returns the error line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "train_stream", lambda run: pytest.fail("nothing was refused"))

    def run(more: str = "policy: probe", source: str = "packaged/sql") -> str:
        (tmp_path / "my.yaml").write_text(STREAM.replace("MORE", more).replace("SOURCE", source))
        assert train.main(["--config", "my.yaml"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert not (tmp_path / "runs").exists()
        return error

    return run


def test_one_repeated_document(refused, tmp_path):
    rows = [json.dumps({"text": "SELECT name FROM customers WHERE city = 'Oslo' ORDER BY name;" * 3})] * 60
    (tmp_path / "same.jsonl").write_text("\n".join(rows))
    error = refused(source="same.jsonl")
    assert "sql" in error
    assert "same text" in error


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (
            "budget: {adapters: 30000}",
            ["growth.budget.adapters", "30000", "rank 8", "requests", "208896", "raise the cap"],
        ),
        ("budget: {trainable: 20000}", ["growth.budget.trainable", "requests"]),
        ("budget: {adapters: 0}", ["adapters", "not at least 1"]),
        ("probe: {steps: 0}", ["steps", "not at least 1"]),
        ("false_new: 0.9", ["false_new", "not between 0 and 0.5"]),
        ("false_alarm: 0.1", ["false_alarm", "no longer an option"]),
        ("rank: {schedule: nowhere.json}", ["nowhere.json", "cannot be read"]),
        ("threshold: 0.75, projection: nowhere.safetensors", ["nowhere.safetensors"]),
        ("policy: bandit, bandit: {history: [nowhere]}", ["nowhere", "no decisions.jsonl here"]),
        ("policy: guess", ["policy"]),
    ],
)
def test_options_that_cannot_work(refused, more, parts):
    error = refused(more)
    for part in parts:
        assert part in error


def test_a_history_of_another_version(refused, tmp_path):
    (tmp_path / "old.jsonl").write_text(json.dumps({"bandit": {"version": 7}}) + "\n")
    error = refused("policy: bandit, bandit: {history: [old.jsonl]}")
    assert "old.jsonl, line 1" in error
    assert "version 7" in error


def test_a_projection_head_of_another_base(refused, tmp_path):
    ProjectionHead(256, 8, np.random.default_rng(0)).save(tmp_path / "head.safetensors", "0" * 64, 0.1)
    assert "base" in refused("threshold: 0.75, projection: head.safetensors")


def test_a_library_made_with_another_tokenizer(finished, tmp_path, capsys):
    copy = tmp_path / "small"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "checkpoints/final")
    newest = sorted((copy / "checkpoints").glob("step-*"))[-1]
    pool = json.loads((newest / "pool.json").read_text())
    (newest / "pool.json").write_text(json.dumps(pool | {"tokenizer": "0" * 64}))
    manifest = json.loads((newest / "MANIFEST.json").read_text())
    digest = hashlib.sha256((newest / "pool.json").read_bytes()).hexdigest()
    manifest["sha256"]["pool.json"] = digest
    (newest / "MANIFEST.json").write_text(json.dumps(manifest))
    assert train.main(["--resume", str(copy)]) == 2
    error = capsys.readouterr().err
    assert "another tokenizer" in error
    assert error.count("\n") == 1
