"""Gemma 3 270M's exact architecture, with random weights and a small vocabulary, through the shipped config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx import assets, train
from dylora_mlx.growth.pool import ExpertRecord, Pool
from dylora_mlx.model.base.load import load_base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.run import run_folder

# google/gemma-3-270m's config.json, but for the vocabulary (262,144 there).
CONFIG = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 640, "intermediate_size": 2048,
    "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
    "rope_scaling": None, "sliding_window": 512, "_sliding_window_pattern": 6, "max_position_embeddings": 32768,
    "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "attention_dropout": 0.0, "use_cache": True,
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "bos_token_id": 2, "eos_token_id": 1,
    "pad_token_id": 0, "torch_dtype": "bfloat16", "use_bidirectional_attention": False, "vocab_size": 4096,
    "layer_types": ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(18)],
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A model folder as on the Hugging Face hub: config.json, two shards with their index, the tokenizer."""
    folder = tmp_path_factory.mktemp("gemma-3-270m")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(assets.BASE / name, folder / name)
    rng, d, inner, h = np.random.default_rng(0), 640, 2048, 256
    shards: list[dict[str, mx.array]] = [{}, {}]

    def add_weight(shard: int, name: str, *shape: int, scale: float = 0.02) -> None:
        shards[shard][name] = mx.array(rng.standard_normal(shape, np.float32) * scale).astype(mx.bfloat16)

    add_weight(0, "model.embed_tokens.weight", 4096, d)
    add_weight(1, "model.norm.weight", d)
    for i in range(18):
        prefix, shard = f"model.layers.{i}", int(i >= 9)
        for name, shape in {
            "self_attn.q_proj": (4 * h, d), "self_attn.k_proj": (h, d), "self_attn.v_proj": (h, d),
            "self_attn.o_proj": (d, 4 * h), "mlp.gate_proj": (inner, d), "mlp.up_proj": (inner, d), "mlp.down_proj": (d, inner),
        }.items():  # fmt: skip
            add_weight(shard, f"{prefix}.{name}.weight", *shape)
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            add_weight(shard, f"{prefix}.{name}_layernorm.weight", d)
        for name in ("q_norm", "k_norm"):
            add_weight(shard, f"{prefix}.self_attn.{name}.weight", h)
    index = {}
    for number, weights in enumerate(shards, 1):
        file = f"model-0000{number}-of-00002.safetensors"
        mx.save_safetensors(str(folder / file), weights, metadata={"format": "pt"})
        index |= dict.fromkeys(weights, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def test_parameter_count_is_the_published_one(checkpoint):
    base = load_base(str(checkpoint), "bfloat16")
    pool = Pool(RoutedDecoder(base, ["q_proj", "v_proj"], "final"))
    pool.add(ExpertRecord("any", 8, 16.0, 0), mx.random.key(0))
    assert pool.num_parameters() == 368_640
    assert base.dtype == mx.bfloat16


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_shipped_config_trains_two_steps(checkpoint, tmp_path, monkeypatch, dtype):
    """The bfloat16 case is slow: on a CPU its matrix products do not use the fast BLAS.

    The reference text is short: reading all of it would take ten times as long as everything else.
    """
    monkeypatch.setattr(assets, "reference_text", lambda: ["def f(x):", "return x", "SELECT 1"])
    rows = [json.dumps({"instruction": f"add {i}", "input": "", "output": f"x += {i}"}) for i in range(10)]
    mbpp = [json.dumps({"text": f"t{i}", "code": f"c = {i}", "test_list": []}) for i in range(4)]
    for name, lines in (("code", rows), ("mbpp", mbpp)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    skills = [{"name": "code_alpaca", "source": str(tmp_path / "code.jsonl"), "preset": "code_alpaca", "rank": 8}]
    domains = [{"name": "mbpp", "source": str(tmp_path / "mbpp.jsonl"), "preset": "mbpp"}]
    options = {
        "--model.base": checkpoint, "--model.dtype": dtype, "--runs": tmp_path, "--name": "two", "--skills": json.dumps(skills),
        "--domains": json.dumps(domains), "--training.max_steps": 2, "--training.batch_size": 1, "--data.max_seq_length": 32,
        "--growth.min_samples": 2, "--growth.min_tokens": 1, "--growth.base_skill": "null", "--log.steps_per_report": 1,
    }  # fmt: skip
    argv = ["--config", "gemma3-270m", *(str(x) for pair in options.items() for x in pair)]
    assert train.main(argv) == 0
    run = run_folder.open_run(tmp_path / "two")
    logged = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in logged if "train_loss" in r]
    assert len(steps) == 2
    assert all(np.isfinite(r["train_loss"]) and r["grad_norm_expert_1"] > 0 for r in steps)
    factors = run.model.experts[0].layers[17]["v_proj"]
    assert factors.lora_b.dtype == mx.float32
    assert mx.abs(factors.lora_b).max().item() > 0
