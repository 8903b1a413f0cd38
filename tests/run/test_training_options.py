"""Runs with the options of training that are off by default: they learn, and going on after a stop changes no bit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dylora_mlx import train
from dylora_mlx.adapters import mlx_lm, peft
from dylora_mlx.config.load import load_config
from dylora_mlx.model.experts import lora
from dylora_mlx.run import run_folder
from dylora_mlx.training.skill import learn
from tests.conftest import FEW, start

OPTIONS = f"""
skills: [{{name: requests, source: {FEW}/requests}}, {{name: sql, source: {FEW}/sql, rank: 3, alpha: 6}}]
growth: {{base_skill: null, threshold: 0.99, dense_steps: 1, anneal_steps: 1, rank: {{epsilon: 9, steps: 2, max: 4}}}}
model: {{use_rslora: true, projections: all-linear, rank: 2, alpha: 8}}
data: {{max_seq_length: 256}}
training: {{max_steps: 6, steps_per_eval: 2, save_every: 1, memory_tokens: 512, optimizer: adafactor, lora_dropout: 0.2,
  optimizer_config: {{adafactor: {{beta_1: 0.9}}}}, learning_rate: 3.0e-3, loraplus_lr_ratio: 2, lr_schedule: step_decay, lr_step_size: 3}}
log: {{steps_per_report: 1}}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, list[float]]:
    """A finished run, and the dropout rate of every forward pass that had one."""
    folder, rates = tmp_path_factory.mktemp("options"), []
    original = lora.with_dropout
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "with_dropout", lambda *args: (rates.append(args[1]), original(*args))[1])
        assert train.main(start(folder, OPTIONS)) == 0
    return folder / "small", rates


def test_only_training_drops_inputs(made):
    run, rates = made
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in steps if "train_loss" in record]
    assert rates == [0.2] * 2 * len(trained), "two micro-batches a step; no evaluation has any"
    assert [record["learning_rate"] for record in trained[:6]] == pytest.approx([3e-3, 3e-3, 3e-3, 3e-3, 3e-4, 3e-4])


def test_learns_with_all_of_them(made):
    base, *after = json.loads((made[0] / "results.json").read_text())["matrix"]
    assert after[0]["requests"] < base["requests"] - 0.02
    assert after[-1]["sql"] < base["sql"] - 0.02


def test_rslora_is_stored_and_exported_as_a_scale(made):
    opened = run_folder.open_run(made[0], load_experts=False)
    scales = [8 / math.sqrt(2), 6 / math.sqrt(3)]  # a rank that grows keeps the scale
    assert [record.rank for record in opened.pool.records] == [4, 3]
    assert [expert.scale for expert in opened.model.experts] == pytest.approx(scales, rel=1e-12)
    for expert, scale in zip(opened.model.experts, scales, strict=True):
        config = peft.config(expert, "base")
        assert config["lora_alpha"] / config["r"] == pytest.approx(scale, rel=1e-12)
        assert mlx_lm.config(expert, "base")["lora_parameters"]["scale"] == pytest.approx(scale, rel=1e-12)
        assert len(config["target_modules"]) == 7
    assert load_config(made[0] / "config.yaml").model.projections == "all-linear"


def test_a_resumed_run_ends_with_the_same_bits(made, tmp_path, monkeypatch):
    step, calls = learn.train_step, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 9:  # in the second skill, after a rank growth in the first
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(learn, "train_step", stopping)
    assert train.main(start(tmp_path, OPTIONS)) == 130
    monkeypatch.setattr(learn, "train_step", step)
    assert train.main(["--resume", str(tmp_path / "small")]) == 0
    ours, theirs = (run / "checkpoints/final/MANIFEST.json" for run in (tmp_path / "small", made[0]))
    assert json.loads(ours.read_text()) == json.loads(theirs.read_text())
