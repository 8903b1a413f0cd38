"""Runs that offload frozen experts to files: training, stopping and resuming, generation, adding a skill."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from dylora_mlx import add, generate, train
from dylora_mlx.model.experts.offload import OffloadedExpert
from dylora_mlx.run import run_folder
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.skill import learn
from tests.conftest import start

STREAM = """
skills: [{name: sql, source: HOME/sql}, {name: requests, source: HOME/requests}, {name: stripe, source: HOME/stripe}]
model: {expert_memory_mb: 0, rank: 2}
growth: {base_skill: null, dense_steps: 1, anneal_steps: 1, top_k: 2, epsilon: 0.0, threshold: 0.99}
data: {max_seq_length: 256}
training: {grad_accumulation_steps: 1, max_steps: 4, steps_per_eval: 2, memory_tokens: 128, save_every: 1, keep_checkpoints: 2}
"""


@pytest.fixture(scope="module")
def stream(short_skills) -> str:
    return STREAM.replace("HOME", str(short_skills))


@pytest.fixture(scope="module")
def offloaded_run(stream, tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("filed")
    assert train.main(start(home, stream)) == 0
    return home / "small"


def hashes(run: Path) -> dict[str, str]:
    return json.loads((run / "checkpoints/final/MANIFEST.json").read_text())["sha256"]


def test_an_offloaded_run_learns_like_one_in_memory(offloaded_run, stream, tmp_path):
    """The results differ only by rounding, because sums are added in another order."""
    assert train.main(start(tmp_path, stream.replace("expert_memory_mb: 0", "expert_memory_mb: null"))) == 0
    ours, theirs = (json.loads((run / "results.json").read_text()) for run in (offloaded_run, tmp_path / "small"))
    assert len(ours["experts"]) == 3
    assert ours["experts"] == theirs["experts"]
    for name, losses in theirs["test"].items():
        numbers = ("base", "mixture", "own_expert")
        assert {each: losses[each] for each in numbers} == pytest.approx(
            {each: ours["test"][name][each] for each in numbers}, abs=2e-3
        )
    assert not (offloaded_run / "experts").exists(), "the final checkpoint has them"
    moments = mx.load(str(offloaded_run / "checkpoints/final/optimizer.safetensors"))
    assert not any(".layers." in name for name in moments), "frozen experts in files have no moments"
    assert hashes(offloaded_run).keys() == hashes(tmp_path / "small").keys()


def test_a_stopped_run_ends_with_the_same_bits(offloaded_run, stream, tmp_path, monkeypatch):
    original, steps = learn.train_step, []

    def failing(*arguments):
        steps.append(1)
        if len(steps) == 11:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(learn, "train_step", failing)
    assert train.main(start(tmp_path, stream)) == 130
    run = tmp_path / "small"
    assert len(list((run / "experts").iterdir())) == 2
    newest, files = checkpoint.newest(run)
    inodes = {path.stat().st_ino for path in (run / "experts").iterdir()}
    assert {(newest / f"experts/expert_{i}/adapters.safetensors").stat().st_ino for i in (1, 2)} == inodes, "links"
    assert "experts/expert_3/adapters.safetensors" in files
    assert train.main(["--resume", str(run)]) == 0
    assert hashes(run) == hashes(offloaded_run)


def test_it_generates_and_learns_another_skill(offloaded_run, short_skills, tmp_path, capsys):
    opened = run_folder.open_run(offloaded_run, "float32", load_experts=False)
    assert all(isinstance(expert, OffloadedExpert) for expert in opened.model.experts)
    assert not any(
        isinstance(expert, OffloadedExpert) for expert in run_folder.open_run(offloaded_run, "float32").model.experts
    )
    texts = []
    for routing in ("token", "prompt"):
        assert generate.main([str(offloaded_run), "--prompt", "import", "--max-tokens", "6", "--routing", routing]) == 0
        texts.append(capsys.readouterr().out)
    assert all(texts)
    copy = tmp_path / "small"
    shutil.copytree(offloaded_run, copy)
    assert add.main([str(copy), str(short_skills / "requests_more"), "--name", "requests_more"]) == 0
    assert json.loads((copy / "results.json").read_text())["skills"][-1] == "requests_more"
    assert not (copy / "experts").exists()
