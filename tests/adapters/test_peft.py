"""An expert as a PEFT LoRA adapter: its tensors and config, and equal logits where torch and peft are installed."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx.adapters import mlx_lm, peft
from dylora_mlx.growth.library import Library
from dylora_mlx.run.run_folder import OpenedRun
from tests.exporting.mixtures import gap, ours, theirs, tokens_of, transformers_base


@pytest.mark.parametrize("router_layer", ["final", 2])
def test_mapping_transposes_every_factor(make_pool, router_layer):
    expert = make_pool([4], router_layer=router_layer, projections=["q_proj", "down_proj"]).model.experts[0]
    mlx_lm_weights, peft_weights = mlx_lm.weights(expert), peft.weights(expert)
    assert len(mlx_lm_weights) == len(peft_weights) == 2 * 2 * (6 if router_layer == "final" else 4)
    a = peft_weights["base_model.model.model.layers.5.mlp.down_proj.lora_A.weight"]
    assert mx.array_equal(a, mlx_lm_weights["model.layers.5.mlp.down_proj.lora_a"].T)
    assert peft_weights["base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight"].shape == (256, 4)


def test_config_names_layers_only_when_partial(make_pool):
    full = peft.config(make_pool([4]).model.experts[0], "some/base")
    partial = peft.config(make_pool([4], router_layer=2).model.experts[0], "some/base")
    assert "layers_to_transform" not in full
    assert partial["layers_to_transform"] == [2, 3, 4, 5]
    assert partial["layers_pattern"] == "layers"
    assert (full["r"], full["lora_alpha"], full["target_modules"]) == (4, 8.0, ["q_proj", "v_proj"])


@pytest.mark.export
@pytest.mark.parametrize("router_layer", ["final", 3])
def test_random_expert_equals_peft(base, make_pool, tmp_path, router_layer):
    """With an inner router layer only the upper layers have factors. The config names them, so PEFT does not warn."""
    from peft import PeftModel

    pool = make_pool(
        [8], router_layer=router_layer, projections=["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    )
    expert = pool.model.experts[0]
    mx.save_safetensors(str(tmp_path / "adapter_model.safetensors"), peft.weights(expert), metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(json.dumps(peft.config(expert, str(base.folder))))
    model, rows = PeftModel.from_pretrained(transformers_base(base), str(tmp_path)).eval(), tokens_of(base, 1, 200)
    run = OpenedRun(None, base, pool.model, pool, Library(base.fingerprint), tmp_path)  # pyright: ignore
    assert gap(ours(run, rows, None, 1.0, expert_id=1)[0], theirs(model, rows)) < 1e-4
    assert gap(ours(run, rows, None, 1.0, expert_id=0)[0], theirs(model, rows)) > 0.1


@pytest.mark.export
def test_base_has_equal_logits_in_transformers(base):
    rows = tokens_of(base, 1, 300)
    assert gap(np.array(base.model(mx.array(rows))), theirs(transformers_base(base), rows)) < 1e-4
