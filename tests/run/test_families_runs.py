"""Every model family from end to end: training, generation and export."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import dylora_mlx
from dylora_mlx import export, fuse, train
from dylora_mlx.cli.parser import run_command
from dylora_mlx.generation.decode import fused_experts
from dylora_mlx.model.base.load import load_base
from dylora_mlx.model.decoder.attention import packed_masks
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.run import run_folder
from tests.bases import config_of, quantised, write
from tests.conftest import start
from tests.tiny import DENSE, close, column_gates

CONFIG = """
skills:
  - {name: sql, source: SKILLS/sql}
  - {name: requests, source: SKILLS/requests}
growth: {base_skill: {name: python, source: SKILLS/python}, min_samples: 8, min_tokens: 100, top_k: 1,
  dense_steps: 1, anneal_steps: 1, policy: threshold, threshold: 1.0,
  acceptance: always}
model: {projections: [q_proj, v_proj, o_proj, down_proj], dtype: float32}
data: {max_seq_length: 128}
training: {max_steps: 12, steps_per_eval: 100, save_every: 100, memory_tokens: 256, learning_rate: 0.02}
log: {steps_per_report: 1}
"""
KINDS = ["llama", "qwen3-4bit", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("qwen3", "gemma3-4bit"))]


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory, short_skills) -> Path:
    """A finished run of two skills on a random base."""
    home = tmp_path_factory.mktemp(request.param)
    plain = request.param.removesuffix("-4bit")
    base = write(home / "base", config_of(plain))
    if plain != request.param:
        base = quantised(base, home / "packed", 4)
    text = CONFIG.replace("SKILLS", str(short_skills))
    assert train.main(start(home, text, "--name", "run", base=base)) == 0
    return home / "run"


def test_a_run_learns(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    losses = [result["lm_loss"] for line in lines if "lm_loss" in (result := json.loads(line))]
    assert len(losses) == 24
    # The second expert starts from the first, so its loss falls less.
    for skill, least in ((losses[:12], 0.2), (losses[12:], 0.05)):
        assert np.mean(skill[-3:]) < np.mean(skill[:3]) - least
    opened = dylora_mlx.load(str(run))
    result = opened.losses()
    assert result["sql"].best != "base"
    assert result["sql"].mixture < result["sql"].base - 0.1


def test_a_run_generates(run):
    opened = dylora_mlx.load(str(run))
    generation = opened.generate("SELECT name", max_tokens=6, temperature=0.0)
    assert sum(generation.experts.values()) == 6
    assert opened.generate("SELECT name", max_tokens=6, temperature=0.0).text == generation.text


def test_fused_experts_equal_the_routed_pass(run):
    """Under constant gates, mlx-lm's model with fused projections computes the same as the routed forward pass."""
    opened = run_folder.open_run(run, "float32")
    tokens = mx.array(np.random.default_rng(0).integers(3, 4096, (1, 30)).astype(np.int32))
    attn_layout = packed_masks(mx.ones(tokens.shape, mx.int32), opened.model.window)
    routed = opened.model(tokens, attn_layout, DENSE, gates=column_gates(1, len(opened.pool) + 1, 1, 30))
    expected = opened.model.logits(routed.hidden)
    with fused_experts(opened.base, opened.model, np.eye(len(opened.pool) + 1)[1]) as model:
        assert close(model(tokens), expected, 1e-3)
    assert mx.abs(opened.base.model(tokens) - expected).max() > 0.05


def test_a_run_exports(run, tmp_path, capsys):
    assert export.command([str(run), "--out", str(tmp_path / "peft")]) == 0
    adapter_config = json.loads((tmp_path / "peft" / "expert_1" / "adapter_config.json").read_text())
    assert adapter_config["target_modules"] == ["down_proj", "o_proj", "q_proj", "v_proj"]
    opened = run_folder.open_run(run, "float32")
    if opened.base.args.model_type != "gemma3_text":
        for kind in ("xlora", "runtime"):
            options = [str(run), "--format", kind, "--out", str(tmp_path / kind)]
            assert run_command(export.command, options) == 2
            line = capsys.readouterr().err
            assert f"the base is {opened.base.family.title}: use --format experts" in line
            assert line.count("\n") == 1
    assert fuse.main([str(run), "--expert", "sql", "--out", str(tmp_path / "full")]) == 0
    full = RoutedDecoder(load_base(str(tmp_path / "full"), "float32"), [], "final")
    tokens = mx.array(np.random.default_rng(0).integers(3, 4096, (1, 30)).astype(np.int32))
    attn_layout = packed_masks(mx.ones(tokens.shape, mx.int32), full.window)
    expected = opened.model(tokens, attn_layout, DENSE, gates=column_gates(1, len(opened.pool) + 1, 1, 30)).hidden
    # A quantised base's full model is stored in bfloat16.
    allowed = 0.05 if opened.base.is_quantized else 1e-3
    assert mx.abs(full.base_states(tokens, attn_layout) - expected).mean() < allowed * mx.abs(expected).mean()


@pytest.mark.export
@pytest.mark.parametrize("run", ["llama", "qwen3"], indirect=True)
def test_peft_and_transformers_compute_the_same(run, tmp_path, capsys):
    for options in (["--format", "experts"], ["--format", "gguf-lora"], ["--format", "merged", "--expert", "sql"]):
        out = tmp_path / options[1]
        assert export.command([str(run), *options, "--out", str(out), "--verify"]) == 0
        assert "ok" in capsys.readouterr().out
