"""Overflow in half precision: the update is skipped and training continues; sensitive computations run in float32."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from dylora_mlx import train
from dylora_mlx.model.base import load as base
from dylora_mlx.model.decoder import attention
from dylora_mlx.model.kernels import chunked_loss
from dylora_mlx.model.routing import router
from dylora_mlx.model.routing.router import Gate, Routing
from dylora_mlx.training import health
from dylora_mlx.training.step.losses import RehearsalBatch, rehearsal_loss, z_loss
from dylora_mlx.training.step.step import Step
from tests.conftest import start
from tests.tiny import rows_of, tiny_pool

LARGE = {mx.bfloat16: 2e38, mx.float16: 6e4}
"""A value near the largest of each dtype."""
HALF = pytest.mark.parametrize("dtype", LARGE, ids=["bfloat16", "float16"])
RUNS = pytest.mark.parametrize(
    "dtype", [mx.bfloat16, pytest.param(mx.float16, marks=pytest.mark.slow)], ids=["bfloat16", "float16"]
)
"""A CPU is slow in half precision, so by default only bfloat16 is tested in whole runs."""
STREAM = """
skills: [{name: sql, source: SQL, limit: 36}]
growth: {base_skill: null}
data: {max_seq_length: 32}
model: {dtype: bfloat16}
training:
  {grad_accumulation_steps: 1, max_steps: 5, steps_per_eval: 5, memory_tokens: 64, save_every: 1, max_skipped: 2,
   keep_checkpoints: 9}
log: {steps_per_report: 1}
"""


@pytest.fixture
def run_arguments(short_skills, tmp_path, monkeypatch, dtype) -> list[str]:
    """Command-line arguments of a run on a base of this dtype; float16 is not an option, so the resolver is patched."""
    monkeypatch.setattr(base, "_resolve_dtype", lambda _: dtype)
    return [*start(tmp_path, STREAM.replace("SQL", str(short_skills / "sql"))), "--quiet"]


def overflow_in_steps(monkeypatch, dtype: mx.Dtype, bad: set[int]) -> None:
    """Scale the base's last norm in some steps, counted from 1, so that its states leave the range of the dtype."""
    original, seen = Step.__call__, []

    def call(self, *arguments):
        seen.append(1)
        norm = self.model.base.model.norm
        weight = norm.weight
        assert weight.dtype == dtype
        if len(seen) in bad:
            norm.weight = mx.full(weight.shape, LARGE[dtype], dtype)
        outcome = original(self, *arguments)
        norm.weight = weight
        return outcome

    monkeypatch.setattr(Step, "__call__", call)


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@HALF
def test_updates_with_overflowing_activations_are_skipped(run_arguments, tmp_path, monkeypatch, capsys, dtype):
    overflow_in_steps(monkeypatch, dtype, {2, 4})
    assert train.main(run_arguments) == 0
    folder = tmp_path / "small"
    assert [r["skipped_update"] for r in records(folder) if "skipped_update" in r] == [1, 2]
    saved = sorted(path.name for path in (folder / health.SKIPPED_FOLDER).iterdir())
    assert saved == ["step-000002.safetensors", "step-000004.safetensors"]
    trained = mx.load(str(folder / "checkpoints" / "final" / "experts" / "expert_1" / "adapters.safetensors"))
    assert all(value.dtype == mx.float32 and mx.isfinite(value).all().item() for value in trained.values())
    assert max(mx.abs(value).max().item() for name, value in trained.items() if "lora_b" in name) > 0
    assert capsys.readouterr().err.count("the update is left out") == 2


@RUNS
def test_too_many_in_a_row_stop_at_the_last_good_state(run_arguments, tmp_path, monkeypatch, capsys, dtype):
    overflow_in_steps(monkeypatch, dtype, {3, 4})
    assert train.main(run_arguments) == 1
    assert "failed: 2 updates in a row were not finite" in " ".join(capsys.readouterr().err.split())
    folder = tmp_path / "small"
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    last = mx.load(str(newest / "experts" / "expert_1" / "adapters.safetensors"))
    good = mx.load(str(folder / "checkpoints" / "step-000002" / "experts" / "expert_1" / "adapters.safetensors"))
    assert all(mx.array_equal(last[name], good[name]).item() for name in good)
    assert len(list((folder / health.SKIPPED_FOLDER).iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.bfloat16], ids=["bfloat16"])
def test_gradients_that_overflow_stop_the_run(run_arguments, tmp_path, capsys, dtype):
    """With alpha near the largest float, the first loss is the base's but its gradient overflows."""
    assert train.main([*run_arguments, "--model.alpha", "1e38"]) == 1
    folder = tmp_path / "small"
    assert [r["skipped_update"] for r in records(folder) if "skipped_update" in r] == [1, 2]
    err = " ".join(capsys.readouterr().err.split())
    assert "are not finite; the update is left out" in err
    assert "Traceback" not in err


# Logits of ten thousand.


@HALF
@pytest.mark.parametrize("differentiable", [True, False])
def test_loss_head_computes_in_float32(dtype, differentiable):
    layer = nn.Linear(64, 90, bias=False)
    layer.weight = mx.zeros((90, 64)).at[:, 0].add(mx.linspace(-1.0, 1.0, 90)).astype(dtype)
    states = mx.zeros((3, 64)).at[:, 0].add(mx.array([1e4, -1e4, 1.0])).astype(dtype)
    targets = mx.array([89, 89, 0])

    def total(h):
        return chunked_loss.token_losses(layer, h, targets, 32, differentiable).sum()

    losses = chunked_loss.token_losses(layer, states, targets, 32, differentiable)
    assert losses.dtype == mx.float32
    assert np.allclose(np.array(losses)[:2], [0.0, 2e4], rtol=0.01, atol=0.01)
    if differentiable:
        assert mx.isfinite(mx.grad(total)(states)).all().item()


@HALF
@pytest.mark.parametrize("top_k", [None, 2])
def test_router_computes_in_float32(dtype, top_k):
    features = mx.array([[1e4, 0.0], [-1e4, 0.0], [0.0, 0.0]]).astype(dtype)
    gate = Gate(mx.array([[1.0, 0.0], [-1.0, 0.0], [0.5, 0.0]]), mx.zeros(3))
    logits = router.logits(features, gate)
    gates = router.gates(logits, Routing(top_k, mx.array(0.1)))
    assert logits.dtype == gates.dtype == mx.float32
    assert mx.abs(logits).max().item() > 9e3
    assert np.allclose(np.array(gates.sum(-1)), 1.0)
    assert np.array(mx.argmax(gates, -1))[:2].tolist() == [0, 1]
    assert mx.isfinite(router.entropy(gates)).all().item()


@HALF
def test_router_losses_compute_in_float32(dtype):
    features = mx.full((1, 2, 2), 1e4).astype(dtype)
    memory = RehearsalBatch(mx.full((4, 2), -1e4), mx.array([0, 1, 0, 1]), mx.full((4,), 0.5))
    valid_mask = mx.ones((1, 2))

    def loss(weight):
        gate = Gate(weight, mx.zeros(2))
        return rehearsal_loss(gate, memory, features, valid_mask, 1) + z_loss(router.logits(features, gate), valid_mask)

    value, grad = mx.value_and_grad(loss)(mx.array([[1.0, 0.0], [-1.0, 0.0]]))
    assert value.dtype == grad.dtype == mx.float32
    assert value.item() > 1e7, "the square of ten thousand"
    assert mx.isfinite(grad).all().item()


@HALF
def test_attention_scores_do_not_overflow(dtype):
    """Query and key norms give scores near ten thousand: each token attends to one position and nothing overflows."""
    model = tiny_pool().model
    _, segments = rows_of([[9, 6]], 16)
    layer = model.base.model.layers[1].self_attn
    norm_weights = layer.q_norm.weight, layer.k_norm.weight
    try:
        layer.q_norm.weight = layer.k_norm.weight = mx.full((24,), 40.0)
        attn_layout = attention.attention_layout(segments, model.window)
        outputs = {}
        for kind in (mx.float32, dtype):
            rng = np.random.default_rng(0)
            qkv = [mx.array(rng.normal(size=(1, 16, heads, 24)).astype(np.float32)) for heads in (4, 2, 2)]
            outputs[kind] = attention.attend(
                model.family, layer, *(x.astype(kind) for x in qkv), attn_layout, True, None
            ).astype(mx.float32)
    finally:
        layer.q_norm.weight, layer.k_norm.weight = norm_weights
    valid_mask = np.array(segments[0]) > 0
    exact, half = (np.array(value)[0][valid_mask] for value in outputs.values())
    assert np.isfinite(half).all()
    assert np.abs(half).max() < 1.05 * max(np.abs(exact).max(), 4.0), "a mean of values stays among them"
