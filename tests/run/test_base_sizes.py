"""Shapes of Gemma 3 270M, 1B and 4B on 4-bit bases, and rows of 8,192 tokens: each trains a step."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from dylora_mlx.config import TrainingConfig
from dylora_mlx.growth.pool import ExpertRecord, Pool
from dylora_mlx.model.base.load import Base, load_base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.training.step.losses import RehearsalBatch, micro_batch
from dylora_mlx.training.step.optimizers import make_optimizers
from dylora_mlx.training.step.step import Step
from tests.bases import config_of, quantised, write
from tests.tiny import close, flat

SIZES = {
    # Published shapes but for the vocabulary (262,144 there) and the layers (18, 26 and 34, every sixth global).
    "270m": {"hidden_size": 640, "intermediate_size": 2048, "num_attention_heads": 4, "num_key_value_heads": 1,
             "num_hidden_layers": 6, "sliding_window": 512},
    "1b": {"hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4, "num_key_value_heads": 1,
           "num_hidden_layers": 3, "sliding_window": 512, "sliding_window_pattern": 3},
    "4b": {"hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 8, "num_key_value_heads": 4,
           "num_hidden_layers": 2, "sliding_window": 1024, "sliding_window_pattern": 2,
           "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
}  # fmt: skip
LONG = 8192
NO_MEMORY = RehearsalBatch(mx.zeros((0, 0)), mx.zeros((0,), mx.int32), mx.zeros((0,)))


class StepResult(NamedTuple):
    """Result of one training step."""

    loss: float
    """The language-model loss before the update."""
    expert: dict[str, np.ndarray]
    """The expert's weights after the step."""
    peak: int
    """Peak memory in bytes beyond the memory in use before the step."""


def random_tokens(base: Base, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, base.args.vocab_size, (1, length)).astype(np.int32)


def train_one_step(base: Base, length: int, grad_checkpoint: bool) -> StepResult:
    """Train a new expert one step on a row of one document; the base's features are computed as well."""
    pool = Pool(RoutedDecoder(base, ["q_proj", "v_proj"], "final", grad_checkpoint))
    pool.add(ExpertRecord("one", 8, 16.0, 0), mx.random.key(0))
    training = TrainingConfig(learning_rate=1e-2)
    optimizers = make_optimizers(training)
    optimizers.init(pool.model)
    optimizers.set_learning_rates(1.0, training)
    step = Step(pool.model, optimizers, training, None, 1, compiled=False)
    tokens, segments = (
        random_tokens(base, length),
        np.ones((1, length), np.int32),
    )
    loss_mask = np.arange(length)[None] < length - 1
    batch = micro_batch(tokens, np.roll(tokens, -1, 1), loss_mask, segments, None, pool.model.window)
    mx.eval(pool.model.parameters(), batch)
    mx.clear_cache()
    active_before = mx.get_active_memory()
    mx.reset_peak_memory()
    outcome = step([batch], NO_MEMORY, mx.array(1.0))
    mx.eval(pool.model.parameters(), outcome)
    return StepResult(
        outcome.terms.lm_loss.item(), flat(pool.model.experts[0].parameters()), mx.get_peak_memory() - active_before
    )


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory):
    """Return a function that writes and loads a 4-bit base of a size."""
    home = tmp_path_factory.mktemp("sizes")

    def load(size: str) -> Base:
        shape = {"head_dim": 256, "query_pre_attn_scalar": 256, "rope_theta": 1e6, "sliding_window_pattern": 6}
        folder = write(home / size, config_of("gemma3", **{**shape, **SIZES[size]}), mx.bfloat16, size=0.02)
        packed: Path = quantised(folder, home / f"{size}-4bit", 4, group=64)
        return load_base(str(packed), "float32")

    return load


@pytest.mark.parametrize("size", ["270m", *(pytest.param(size, marks=pytest.mark.slow) for size in ("1b", "4b"))])
def test_a_step_on_a_4bit_base(four_bits, size):
    base = four_bits(size)
    assert base.is_quantized
    before = [np.array(base.projection(0, name)["weight"]) for name in ("q_proj", "v_proj")]
    plain, checkpointed_step = (train_one_step(base, 48, checkpointed) for checkpointed in (False, True))
    tokens = mx.array(random_tokens(base, 48))
    expected = nn.losses.cross_entropy(base.model(tokens[:, :-1]), tokens[:, 1:]).mean().item()
    assert abs(plain.loss - expected) < 1e-2  # a new expert is the identity
    moved = [value for name, value in plain.expert.items() if name.endswith("lora_b")]
    assert len(moved) == 2 * base.args.num_hidden_layers
    assert all(np.abs(value).max() > 1e-3 for value in moved)
    assert close(checkpointed_step.loss, plain.loss, 1e-5)
    after = [np.array(base.projection(0, name)["weight"]) for name in ("q_proj", "v_proj")]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    print(f"{size}: peak {plain.peak / 1e6:.0f} MB, {checkpointed_step.peak / 1e6:.0f} MB with grad_checkpoint")


@pytest.mark.slow
def test_gradient_checkpointing_reduces_the_memory_of_a_long_row():
    """A row of 8,192 tokens of one document: attention of the global layers takes most of the memory."""
    base = load_base("embedded", "float32")
    plain, checkpointed_step = (train_one_step(base, LONG, checkpointed) for checkpointed in (False, True))
    assert close(checkpointed_step.loss, plain.loss, 1e-5)
    for name, value in plain.expert.items():
        # Adam's first step turns rounding of tiny gradients into whole steps, so few may differ and none by more than two.
        assert np.mean(np.abs(checkpointed_step.expert[name] - value) > 1e-4) < 0.01, name
    assert checkpointed_step.peak < 0.75 * plain.peak
    print(f"peak {plain.peak / 1e6:.0f} MB, {checkpointed_step.peak / 1e6:.0f} MB with grad_checkpoint")
