"""A run's state in a checkpoint: a resumed run continues bit for bit like one that never stopped."""

from __future__ import annotations

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx.config import TrainingConfig
from dylora_mlx.errors import UserError
from dylora_mlx.growth.decide.bandit_log import BanditContext, BanditTrial
from dylora_mlx.growth.decide.policy import Decision, ExistingLosses, TrialResult
from dylora_mlx.growth.feature_statistics import FeatureStatistics
from dylora_mlx.growth.library import Library, LibraryEntry
from dylora_mlx.growth.pool import Pool
from dylora_mlx.system.seeds import SeedStream, generator
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.checkpoint.state import (
    BestState,
    TrainerState,
    checkpoint_content,
    restore_pool,
    restore_training,
    step_folder_name,
    trainable_weights,
)
from dylora_mlx.training.step.losses import RehearsalBatch, device_batch
from dylora_mlx.training.step.optimizers import Optimizers, make_optimizers
from dylora_mlx.training.step.step import Step
from tests.tiny import ALL, ARGS, batch_of, flat, tiny_base, tiny_pool

TRAINING = TrainingConfig(load_balance_coef=0.01)


def make_library() -> Library:
    library = Library("0" * 64)
    for number in range(2):
        memory = np.random.default_rng(number).normal(size=(30, ARGS.hidden_size)).astype(np.float32)
        library.add(
            LibraryEntry(f"skill_{number}", number, memory[:4], FeatureStatistics.from_features(memory), memory)
        )
    return library


def train_steps(pool: Pool, optimizers: Optimizers, library: Library, steps: range) -> dict[str, np.ndarray]:
    """Train expert 2 over some steps and return all parameters and optimizer moments."""
    step = Step(pool.model, optimizers, TRAINING, None, 2, compiled=False)
    for number in steps:
        memory = RehearsalBatch(
            *(mx.array(a) for a in library.sample_memory(8, generator(0, SeedStream.REHEARSAL, number)))
        )
        optimizers.set_learning_rates(1 / (1 + number), TRAINING)
        step([device_batch(batch_of([[20, 9], [30]], 32, number), ARGS.sliding_window)], memory, mx.array(1.0))
        mx.eval(pool.model.parameters(), optimizers.state)
    moments = {"optimizers": {"experts": optimizers.experts.state, "router": optimizers.router.state}}
    return flat(pool.model.parameters()) | flat(moments)


DECISION = Decision(
    "skill_1", "create", 2, {"skill_0": 0.2}, 0.2, (0.1, 0.3), 0.75, False, "skill_0", 32, 4000, 1, 0, True, "probe", "novel", 5,
    ExistingLosses({0: 3.0, 1: 2.5}, 0.2, 30), TrialResult(2.0, 0.5, (0.4, 0.6), 12),
    BanditTrial(BanditContext(0.2, -0.55, 0.2, 0.5, 1, 4000), "create", 0.9, {}),
)  # fmt: skip


def make_pool(router_layer: int | str) -> tuple[Pool, Optimizers]:
    pool = tiny_pool([2, 3], router_layer, ALL)
    pool.freeze(1)
    optimizers = make_optimizers(TRAINING)
    optimizers.init(pool.model)
    return pool, optimizers


@pytest.mark.parametrize("router_layer", ["final", 2])
def test_a_resumed_run_continues_bit_for_bit(tmp_path, router_layer):
    pool, optimizers = make_pool(router_layer)
    train_steps(pool, optimizers, make_library(), range(3))
    saved_state = TrainerState(3, 1, 3, DECISION, [{"a": 1 / 3}, {"a": 0.1}], 10**15, 0, {"a": "ff"})
    saved_state.best = BestState(0.1, 2, 1, trainable_weights(pool))
    checkpoint.write(tmp_path / "c", checkpoint_content(saved_state, tiny_base(), pool, make_library(), optimizers))
    expected = train_steps(pool, optimizers, make_library(), range(3, 6))

    resumed_pool, resumed_optimizers = (
        tiny_pool(router_layer=router_layer, projections=ALL, filled=False),
        make_optimizers(TRAINING),
    )
    files = checkpoint.read(tmp_path / "c")
    resumed_library = restore_pool(files, tiny_base(), resumed_pool, tmp_path)
    state = restore_training(files, resumed_optimizers)
    resumed_optimizers.init(resumed_pool.model)
    assert replace(state, best=BestState()) == replace(saved_state, best=BestState())
    assert (state.best.loss, state.best.step, state.best.evals_since_best) == (0.1, 2, 1)
    assert state.best.weights.keys() == saved_state.best.weights.keys()
    assert all(mx.array_equal(state.best.weights[n], w) for n, w in saved_state.best.weights.items())
    assert resumed_pool.describe() == pool.describe()
    assert resumed_pool.frozen_hashes() == pool.frozen_hashes()
    assert resumed_pool.trainable == [2]
    resumed = train_steps(resumed_pool, resumed_optimizers, resumed_library, range(3, 6))
    assert resumed.keys() == expected.keys()
    assert [name for name in expected if not np.array_equal(resumed[name], expected[name])] == []


def test_another_base_is_refused(tmp_path):
    pool, optimizers = make_pool("final")
    files = checkpoint_content(TrainerState(), tiny_base(), pool, make_library(), optimizers)
    other = replace(tiny_base(), fingerprint="1" * 64, name="other")
    with pytest.raises(UserError, match="another base than other"):
        restore_pool(files, other, tiny_pool(filled=False), tmp_path)


def test_other_projections_are_refused(tmp_path):
    pool, optimizers = make_pool("final")
    files = checkpoint_content(TrainerState(), tiny_base(), pool, make_library(), optimizers)
    with pytest.raises(UserError, match="not part of this expert"):
        restore_pool(files, tiny_base(), tiny_pool(filled=False), tmp_path)


def test_a_run_without_expert_or_library(tmp_path):
    pool, optimizers = tiny_pool(filled=False), make_optimizers(TRAINING)
    optimizers.init(pool.model)
    checkpoint.write(tmp_path / "c", checkpoint_content(TrainerState(), tiny_base(), pool, Library("x"), optimizers))
    files = checkpoint.read(tmp_path / "c")
    again = tiny_pool(filled=False)
    assert len(restore_pool(files, tiny_base(), again, tmp_path)) == len(again) == 0
    assert restore_training(files, make_optimizers(TRAINING)) == TrainerState()


def test_the_files_of_a_checkpoint():
    pool, optimizers = make_pool("final")
    files = checkpoint_content(TrainerState(), tiny_base(), pool, make_library(), optimizers)
    assert {n for n in files if "/" not in n} == {
        "pool.json", "trainer.json", "router.safetensors", "optimizer.safetensors",
    }  # fmt: skip
    parts = {f"library/entry_{i}.{part}.safetensors" for i in range(2) for part in ("statistics", "memory")}
    assert {n for n in files if n.startswith("library/")} == parts
    for expert_id in (1, 2):
        assert files[f"experts/expert_{expert_id}/adapter_config.json"]["fine_tune_type"] == "lora"
        assert files[f"experts/expert_{expert_id}/adapters.safetensors"]
    assert json.loads(json.dumps(files["trainer.json"]))["step"] == 0


@pytest.mark.parametrize(
    "change",
    [{"step": -1}, {"skill_index": 1.0}, {"data_digests": []}, {"gather_threshold": "4"}, {"gather_threshold": True},
     {"best": {"phase": "", "loss": "low", "step": 0, "evals_since_best": 0}}, {"best": {"phase": "", "loss": None, "step": 0}},
     {"anomalies": {"losses": ["x"]}}, {"anomalies": {"unserved": {"a": None}}}, {"anomalies": {"collapsed": "no"}},
     {"anomalies": []}, {"more": 1}, {"decision": {"skill": "a"}}, {"decision": []}],
    ids=str,
)  # fmt: skip
def test_invalid_trainer_values_are_refused(change):
    pool, optimizers = make_pool("final")
    files = checkpoint_content(TrainerState(), tiny_base(), pool, make_library(), optimizers)
    with pytest.raises(UserError, match=r"of this checkpoint is damaged"):
        restore_training({**files, "trainer.json": {**files["trainer.json"], **change}}, optimizers)


def test_best_weights_are_a_copy():
    pool, optimizers = make_pool("final")
    weights = trainable_weights(pool)
    before = {name: np.array(value) for name, value in weights.items()}
    after = train_steps(pool, optimizers, make_library(), range(1))
    assert all(np.array_equal(np.array(weights[name]), value) for name, value in before.items())
    assert any(not np.array_equal(after[name], value) for name, value in before.items())


def test_next_skill_resets_its_progress():
    state = TrainerState(30, 1, 9, DECISION, best=BestState(0.5))
    state.next_skill()
    assert (state.step, state.skill_index, state.skill_step, state.decision, state.best) == (
        30,
        2,
        0,
        None,
        BestState(),
    )


def test_random_streams_differ_by_purpose_and_seed():
    draws = [
        generator(seed, stream, *parts).random()
        for seed, stream, *parts in (
            (0, SeedStream.BASE_PASS), (0, SeedStream.BASE_PASS), (0, SeedStream.EXPERT_INIT), (1, SeedStream.BASE_PASS),
            (0, SeedStream.BASE_PASS, 0),
        )
    ]  # fmt: skip
    assert draws[0] == draws[1]
    assert len(set(draws[1:4])) == 3


def test_folders_sort_by_step():
    assert sorted(map(step_folder_name, (100, 20, 3))) == ["step-000003", "step-000020", "step-000100"]
