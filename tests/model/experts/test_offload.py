"""Offloaded experts compute the same bits as experts in memory, within a byte limit of the cache."""

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
    """Run with both orders of (token, expert) pairs, whatever the device."""
    monkeypatch.setattr(numerics, "on_cpu", lambda: request.param == "by token")


def pool_of(folder: Path | None, budget: int = 0) -> Pool:
    """Return a pool with all but the last expert frozen.

    With a folder, the frozen experts are offloaded to files in it.
    """
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
    """Return the bytes that this many experts need."""
    return 4 * pool.expert_parameters(max(RANKS)) * experts


@pytest.mark.parametrize("experts", [0, 3, 100])
@pytest.mark.parametrize("top_k", [1, 3])
def test_forward_pass_equals_that_of_experts_in_memory(tmp_path, order, experts, top_k):
    plain = pool_of(None)
    offloaded = pool_of(tmp_path, room(plain, experts))
    tokens, _ = rows_of([[40]], 40)
    routing = Routing(top_k, mx.array(1.0))
    outputs = []
    for pool in (plain, offloaded, offloaded):  # the second time from the cache, as far as its limit allows
        adapters = pool.model.adapters(top_k)
        outputs.append(pool.model(mx.array(tokens), alone(40), routing, adapters=adapters))
    for output in outputs[1:]:
        assert mx.array_equal(outputs[0].gates, output.gates)
        assert mx.array_equal(outputs[0].hidden, output.hidden)
    assert offloaded.cache is not None
    assert offloaded.cache.nbytes <= offloaded.cache.max_bytes
    assert bool(offloaded.cache.nbytes) is bool(experts)


@pytest.mark.parametrize("experts", [0, 3, 100])
def test_training_step_equals_that_of_experts_in_memory(tmp_path, order, experts):
    """Compare weights, optimizer state and loss after steps of two micro-batches that run concurrently."""
    end_states = []
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
        end_states.append(flat([pool.model.trainable_parameters(), optimizers.state, outcome.train_loss]))
    assert end_states[0].keys() == end_states[1].keys()
    assert [name for name, value in end_states[0].items() if (value != end_states[1][name]).any()] == []


def test_a_step_on_offloaded_experts_is_not_compiled(tmp_path):
    pool = pool_of(tmp_path)
    optimizers = make_optimizers(TrainingConfig())
    optimizers.init(pool.model)
    assert not Step(pool.model, optimizers, TrainingConfig(), 2, len(RANKS), compiled=True).compiled
    assert Step(pool.model, optimizers, TrainingConfig(), None, len(RANKS), compiled=True).compiled, (
        "dense routing keeps all experts in memory"
    )


def test_the_cache_evicts_the_least_recently_used(tmp_path):
    pool = pool_of(tmp_path)
    offloaded = [expert for expert in pool.model.experts if isinstance(expert, OffloadedExpert)]
    cache = ExpertCache(sum(expert.nbytes for expert in offloaded[:3]))
    one, two, three, four = offloaded[:4]
    assert four.rank > max(one.rank, two.rank, three.rank)

    def cached_paths() -> set[Path]:
        return set(cache._held)

    assert cache.acquire([one, two, three]).keys() == {one.path, two.path, three.path}
    assert cache.acquire([one]).keys() == {one.path}
    cache.acquire([four])
    assert one.path in cached_paths(), "used more recently"
    assert four.path in cached_paths()
    assert two.path not in cached_paths()
    assert cache.nbytes == sum(e.nbytes for e in offloaded if e.path in cached_paths()) <= cache.max_bytes
    assert cache.acquire([one, two, three, four]).keys() >= {one.path, four.path}, "no requested expert is evicted"
    assert cache.nbytes <= cache.max_bytes


def test_hashes_merging_and_unfreezing_equal_those_in_memory(tmp_path):
    plain, offloaded = pool_of(None), pool_of(tmp_path)
    assert offloaded.frozen_hashes() == plain.frozen_hashes()
    assert flat(offloaded.model.trainable_parameters()).keys() == flat(plain.model.trainable_parameters()).keys()
    assert (merge.distances(offloaded.model.experts) == merge.distances(plain.model.experts)).all()
    weights = [0.5, 0, 0, 0.25, *[0.0] * (len(RANKS) - 4)]
    blends = [blend_experts(pool.model.experts, weights, pool.model.shapes) for pool in (plain, offloaded)]
    assert expert_hash(blends[0]) == expert_hash(blends[1])
    offloaded.unfreeze(4)
    plain.unfreeze(4)
    assert offloaded.trainable == plain.trainable == [4, len(RANKS)]
    assert expert_hash(offloaded.model.experts[3]) == expert_hash(plain.model.experts[3])
    assert not isinstance(offloaded.model.experts[3], OffloadedExpert)


def test_a_missing_expert_file_is_named(tmp_path):
    pool = pool_of(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(Failure, match=r"1.safetensors: an expert's file is gone or damaged while it was in use"):
        pool.frozen_hashes()
