"""An expert as an mlx-lm adapter: mlx-lm loads the folder, and its logits equal those of the forced gate."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx_lm as theirs
import numpy as np
import pytest

from dylora_mlx.adapters import mlx_lm
from dylora_mlx.errors import UserError
from tests.tiny import ALL, alone, close, column_gates, flat, tiny_pool
from tests.tiny import DENSE as ROUTING

LENGTH = 40


def save(expert, base, folder) -> None:
    """Save an expert as an adapter folder of mlx-lm."""
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), mlx_lm.weights(expert))
    (folder / "adapter_config.json").write_text(json.dumps(mlx_lm.config(expert, str(base.folder))))


@pytest.mark.parametrize(
    ("router_layer", "projections"),
    [("final", ("q_proj", "v_proj")), ("final", ALL), (3, ("k_proj", "o_proj", "down_proj"))],
)
def test_logits_equal_the_forced_gate(base, make_pool, tmp_path, router_layer, projections):
    pool = make_pool([4, 3], router_layer, projections)
    tokens = mx.array(np.random.default_rng(0).integers(4, base.args.vocab_size, (1, LENGTH)))
    attn_layout, base_logits = alone(LENGTH, window=pool.model.window), np.array(base.model(tokens))
    for expert_id in (1, 2):
        save(pool.model.experts[expert_id - 1], base, tmp_path / str(expert_id))
        model = theirs.load(str(base.folder), adapter_path=str(tmp_path / str(expert_id)))[0]
        model.set_dtype(mx.float32)
        out = pool.model(tokens, attn_layout, ROUTING, gates=column_gates(expert_id, 3, 1, LENGTH))
        assert close(model(tokens), pool.model.logits(out.hidden), 1e-4)
        assert np.abs(np.array(model(tokens)) - base_logits).max() > 0.1


def test_the_adapter_config(base, make_pool):
    expert = make_pool([4], 2, ("q_proj", "down_proj")).model.experts[0]
    assert mlx_lm.config(expert, "some/base") == {
        "fine_tune_type": "lora",
        "model": "some/base",
        "num_layers": base.args.num_hidden_layers - 2,
        "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["mlp.down_proj", "self_attn.q_proj"]},
    }


def test_weights_load_into_another_expert():
    source, target = (tiny_pool([3], 2, ALL, seed=seed).model.experts[0] for seed in (0, 1))
    mlx_lm.load_weights(target, mlx_lm.weights(source))
    expected, loaded = flat(source.parameters()), flat(target.parameters())
    assert expected.keys() == loaded.keys()
    assert all(np.array_equal(expected[name], loaded[name]) for name in expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.layers.3.mlp.up_proj.lora_a"), "up_proj.lora_a' is missing"),
        (lambda w: w.update({"model.layers.3.mlp.other.lora_a": mx.zeros(1)}), "not part of this expert"),
        (lambda w: w.update({"model.layers.2.self_attn.q_proj.lora_b": mx.zeros((4, 96))}), "shape"),
    ],
    ids=["missing", "foreign", "misshapen"],
)
def test_weights_that_do_not_fit_are_named(change, message):
    expert = tiny_pool([3], 2, ALL).model.experts[0]
    weights = mlx_lm.weights(expert)
    change(weights)
    with pytest.raises(UserError, match=message):
        mlx_lm.load_weights(expert, weights)
