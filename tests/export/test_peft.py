"""PEFT folders: the mapping everywhere, and equal logits where torch and peft are installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx.export import mlx_lm, peft

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def export_peft():
    spec = importlib.util.spec_from_file_location("export_peft", ROOT / "tools" / "export_peft.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("tap", ["final", 2])
def test_mapping_transposes_every_factor(make_pool, tap):
    expert = make_pool([4], tap=tap, projections=["q_proj", "down_proj"]).model.experts[0]
    ours, theirs = mlx_lm.weights(expert), peft.weights(expert)
    assert len(ours) == len(theirs) == 2 * 2 * (6 if tap == "final" else 4)
    a = theirs["base_model.model.model.layers.5.mlp.down_proj.lora_A.weight"]
    assert mx.array_equal(a, ours["model.layers.5.mlp.down_proj.lora_a"].T)
    assert theirs["base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight"].shape == (256, 4)


def test_config_names_layers_only_when_partial(make_pool):
    whole = peft.config(make_pool([4]).model.experts[0], "some/base")
    part = peft.config(make_pool([4], tap=2).model.experts[0], "some/base")
    assert "layers_to_transform" not in whole
    assert part["layers_to_transform"] == [2, 3, 4, 5]
    assert part["layers_pattern"] == "layers"
    assert (whole["r"], whole["lora_alpha"], whole["target_modules"]) == (4, 8.0, ["q_proj", "v_proj"])


def test_exports_one_expert_by_skill_or_number(finished, export_peft, tmp_path, capsys):
    for wanted in ("sql", "2", "expert_2"):
        out = tmp_path / wanted
        assert export_peft.command([str(finished), "--expert", wanted, "--out", str(out)]) == 0
        assert [p.name for p in out.iterdir()] == ["expert_2"]
        assert json.loads((out / "expert_2" / "adapter_config.json").read_text())["r"] == 4
    assert "1 adapter" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--expert", "cobol"], "--expert cobol"), (["--expert", "7"], "--expert 7"), ([], "exists already")],
)
def test_mistakes_write_nothing(finished, export_peft, tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    if not arguments:
        out.mkdir()
    assert export_peft.cli.guarded(export_peft.command, [str(finished), *arguments, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.export
def test_verify_passes_on_every_expert_and_fails_on_a_changed_one(finished, export_peft, tmp_path, capsys):
    out = tmp_path / "adapters"
    assert export_peft.command([str(finished), "--expert", "all", "--out", str(out), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert shown.count(": ok") == 2
    run = export_peft.open_run(finished, "float32")
    path = out / "expert_1" / "adapter_model.safetensors"
    weights = mx.load(str(path))
    name = next(n for n in weights if "lora_B" in n)
    weights[name] = weights[name] + 0.05
    mx.save_safetensors(str(path), weights, metadata={"format": "pt"})
    assert not export_peft.verify(run, {"expert_1": 1}, out)


@pytest.mark.export
@pytest.mark.parametrize("tap", ["final", 3])
def test_random_expert_equals_peft(base, make_pool, export_peft, tmp_path, tap):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    pool = make_pool([8], tap=tap, projections=["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"])
    expert = pool.model.experts[0]
    mx.save_safetensors(str(tmp_path / "adapter_model.safetensors"), peft.weights(expert), metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(json.dumps(peft.config(expert, str(base.folder))))
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32), tmp_path
    ).eval()
    tokens = np.random.default_rng(0).integers(4, 4096, 200)
    with torch.no_grad():
        expected = theirs(input_ids=torch.from_numpy(tokens[None])).logits[0].numpy()
    run = export_peft.Opened(None, base, pool.model, pool, None, tmp_path)
    assert np.abs(export_peft.mlx_logits(run, tokens.astype(np.int32), 1) - expected).max() < 1e-3


@pytest.mark.export
def test_base_has_equal_logits_in_transformers(base):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32).eval()
    tokens = np.random.default_rng(1).integers(4, 4096, 300)
    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(tokens[None])).logits[0].numpy()
    ours = np.array(base.model(mx.array(tokens[None]))[0])
    assert np.abs(ours - theirs).max() < 1e-3
