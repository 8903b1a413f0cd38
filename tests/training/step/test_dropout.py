"""LoRA dropout in a step: drawn from the batch's key alone, the same recomputed, compiled and restarted."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from dylora_mlx.config import TrainingConfig
from dylora_mlx.training.step.losses import RehearsalBatch
from dylora_mlx.training.step.optimizers import make_optimizers
from dylora_mlx.training.step.step import Step
from tests.tiny import close, flat, micro, tiny_pool

TRAINING = TrainingConfig(lora_dropout=0.5)
NO_MEMORY = RehearsalBatch(mx.zeros((0, 0)), mx.zeros((0,), mx.int32), mx.zeros((0,)))


def trained(
    key: int | None, grad_checkpoint: bool = False, compiled: bool = False
) -> tuple[float, dict[str, np.ndarray]]:
    """Return the loss of one step with this key of dropout, and the experts' weights after it."""
    pool = tiny_pool([2, 3], grad_checkpoint=grad_checkpoint)
    pool.freeze(1)
    optimizers = make_optimizers(TRAINING)
    optimizers.init(pool.model)
    batch = micro([[20, 9]], 32)._replace(dropout_key=None if key is None else mx.random.key(key))
    step = Step(pool.model, optimizers, TRAINING, None, 2, compiled)
    outcome = step([batch], NO_MEMORY, mx.array(1.0))
    weights = {n: value for n, value in flat(pool.model.parameters()).items() if n.startswith("experts.1.")}
    return outcome.terms.lm_loss.item(), weights


def test_the_key_decides_what_is_dropped():
    (loss, weights), again, other, whole = trained(3), trained(3), trained(4), trained(None)
    assert loss == again[0]
    assert all(np.array_equal(value, again[1][name]) for name, value in weights.items())
    assert len({loss, other[0], whole[0]}) == 3
    assert any(not np.array_equal(value, other[1][name]) for name, value in weights.items())


def test_recomputed_and_compiled_steps_drop_the_same():
    loss, weights = trained(3)
    for other_loss, other in (trained(3, grad_checkpoint=True), trained(3, compiled=True)):
        assert close(loss, other_loss, 1e-5)
        assert all(close(value, other[name], 2e-3) for name, value in weights.items())
