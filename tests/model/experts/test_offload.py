"""Experts in files compute what experts in memory compute, bit for bit, within a number of bytes."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from dylora_mlx.adapters import mlx_lm
from dylora_mlx.adapters.fuse import blend_experts
from dylora_mlx.config import TrainingConfig
from dylora_mlx.errors import Failure
from dylora_mlx.growth import merge
from dylora_mlx.growth.pool import Pool, expert_hash
from dylora_mlx.model.experts.offload import ExpertCache, OffloadedExpert
from dylora_mlx.model.kernels import numerics
from dylora_mlx.model.routing.router import Routing
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.step.losses import RehearsalBatch, device_batch
from dylora_mlx.training.step.optimizers import make_optimizers
from dylora_mlx.training.step.step import Step
from tests.tiny import ARGS, alone, batch_of, flat, rows_of, tiny_pool

RANKS = [2, 3, 2, 4, 2, 2, 1, 2, 3, 2, 2]
NOTHING = RehearsalBatch(mx.zeros((0, ARGS.hidden_size)), mx.zeros(0, mx.int32), mx.zeros(0))


@pytest.fixture(params=["by token", "by expert"])
def order(request, monkeypatch):
    """Both orders of pairs, whatever the device."""
    monkeypatch.setattr(numerics, "on_cpu", lambda: request.param == "by token")


def pool_of(folder: Path | None, budget: int = 0) -> Pool:
    """All but the last expert frozen, and in files below a folder if there is one."""
    pool = tiny_pool(RANKS)
    pool.model.gather_threshold = 0.0
    pool.cache = ExpertCache(budget) if folder else None
    names = mlx_lm.factor_names(pool.model.shapes)
    for expert_id in range(1, len(RANKS)):
        pool.freeze(expert_id)
        if folder:
            path = folder / f"{expert_id}.safetensors"
            checkpoint.save_arrays(path, mlx_lm.weights(pool.model.experts[expert_id - 1]))
            pool.offload(expert_id, path, names)
    return pool


def room(pool: Pool, experts: int) -> int:
    return 4 * pool.expert_parameters(max(RANKS)) * experts


@pytest.mark.parametrize("experts", [0, 3, 100])
@pytest.mark.parametrize("top_k", [1, 3])
def test_a_pass_is_the_same(tmp_path, order, experts, top_k):
    plain = pool_of(None)
    filed = pool_of(tmp_path, room(plain, experts))
    tokens, _ = rows_of([[40]], 40)
    routing = Routing(top_k, mx.array(1.0))
    outs = []
    for pool in (plain, filed, filed):  # the second time from memory, as far as there is room
        adapters = pool.model.adapters(top_k)
        outs.append(pool.model(mx.array(tokens), alone(40), routing, adapters=adapters))
    for again in outs[1:]:
        assert mx.array_equal(outs[0].gates, again.gates)
        assert mx.array_equal(outs[0].hidden, again.hidden)
    assert filed.cache is not None
    assert filed.cache.nbytes <= filed.cache.max_bytes
    assert bool(filed.cache.nbytes) is bool(experts)


@pytest.mark.parametrize("experts", [0, 3, 100])
def test_a_step_is_the_same(tmp_path, order, experts):
    """With two micro-batches in lanes; gradients, moments and weights."""
    ends = []
    plain = pool_of(None)
    for pool in (plain, pool_of(tmp_path, room(plain, experts))):
        training = TrainingConfig(rehearsal_coef=0.0)
        optimizers = make_optimizers(training)
        optimizers.init(pool.model)
        step = Step(pool.model, optimizers, training, 2, len(RANKS), compiled=False, min_gate=0.3)
        for number in range(3):
            batches = [device_batch(batch_of([[30], [17, 9]], 32, 2 * number + i), ARGS.sliding_window) for i in (0, 1)]
            outcome = step(batches, NOTHING, mx.array(1.0))
            mx.eval(step.state, outcome)
        ends.append(flat([pool.model.trainable_parameters(), optimizers.state, outcome.train_loss]))
    assert ends[0].keys() == ends[1].keys()
    assert [name for name, value in ends[0].items() if (value != ends[1][name]).any()] == []


def test_a_step_on_experts_in_files_is_not_compiled(tmp_path):
    pool = pool_of(tmp_path)
    optimizers = make_optimizers(TrainingConfig())
    optimizers.init(pool.model)
    assert not Step(pool.model, optimizers, TrainingConfig(), 2, len(RANKS), compiled=True).compiled
    assert Step(pool.model, optimizers, TrainingConfig(), None, len(RANKS), compiled=True).compiled, (
        "all are in memory there"
    )


def test_the_ones_used_last_stay(tmp_path):
    pool = pool_of(tmp_path)
    filed = [expert for expert in pool.model.experts if isinstance(expert, OffloadedExpert)]
    shelf = ExpertCache(sum(expert.nbytes for expert in filed[:3]))
    one, two, three, four = filed[:4]
    assert four.rank > max(one.rank, two.rank, three.rank)

    def held() -> set[Path]:
        return set(shelf._held)

    assert shelf.acquire([one, two, three]).keys() == {one.path, two.path, three.path}
    assert shelf.acquire([one]).keys() == {one.path}
    shelf.acquire([four])
    assert one.path in held(), "used last before"
    assert four.path in held()
    assert two.path not in held()
    assert shelf.nbytes == sum(e.nbytes for e in filed if e.path in held()) <= shelf.max_bytes
    assert shelf.acquire([one, two, three, four]).keys() >= {one.path, four.path}, "none that is asked for has to leave"
    assert shelf.nbytes <= shelf.max_bytes


def test_everything_else_sees_the_same_expert(tmp_path):
    plain, filed = pool_of(None), pool_of(tmp_path)
    assert filed.frozen_hashes() == plain.frozen_hashes()
    assert flat(filed.model.trainable_parameters()).keys() == flat(plain.model.trainable_parameters()).keys()
    assert (merge.distances(filed.model.experts) == merge.distances(plain.model.experts)).all()
    weights = [0.5, 0, 0, 0.25, *[0.0] * (len(RANKS) - 4)]
    blends = [blend_experts(pool.model.experts, weights, pool.model.shapes) for pool in (plain, filed)]
    assert expert_hash(blends[0]) == expert_hash(blends[1])
    filed.unfreeze(4)
    plain.unfreeze(4)
    assert filed.trainable == plain.trainable == [4, len(RANKS)]
    assert expert_hash(filed.model.experts[3]) == expert_hash(plain.model.experts[3])
    assert not isinstance(filed.model.experts[3], OffloadedExpert)


def test_a_file_that_is_gone(tmp_path):
    pool = pool_of(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(Failure, match=r"1.safetensors: an expert's file is gone or damaged while it was in use"):
        pool.frozen_hashes()
