"""A run's state through a checkpoint: what comes back goes on bit by bit like the run that never stopped."""

from __future__ import annotations

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx.config import Training
from dylora_mlx.errors import UserError
from dylora_mlx.growth.gate_init import Statistics
from dylora_mlx.growth.library import Entry, Library
from dylora_mlx.growth.pool import Pool
from dylora_mlx.system.seeds import SeedStream, generator
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.checkpoint import state as states
from dylora_mlx.training.checkpoint.state import Best, State
from dylora_mlx.training.step.losses import Rehearsal, device_batch
from dylora_mlx.training.step.optimizers import Optimizers, make_optimizers
from dylora_mlx.training.step.step import Step
from tests.tiny import ALL, ARGS, batch_of, flat, tiny_base, tiny_pool

TRAINING = Training(balance=0.01)


def library() -> Library:
    made = Library("0" * 64)
    for number in range(2):
        memory = np.random.default_rng(number).normal(size=(30, ARGS.hidden_size)).astype(np.float32)
        made.add(Entry(f"skill_{number}", number, memory[:4], Statistics.of(memory), memory))
    return made


def trained(pool: Pool, optimizers: Optimizers, known: Library, steps: range) -> dict[str, np.ndarray]:
    """Train expert 2 over some steps; all parameters and moments at the end."""
    step = Step(pool.model, optimizers, TRAINING, None, 2, compiled=False)
    for number in steps:
        memory = Rehearsal(*(mx.array(a) for a in known.rehearse(8, generator(0, SeedStream.REHEARSAL, number))))
        optimizers.set_rates(1 / (1 + number), TRAINING)
        step([device_batch(batch_of([[20, 9], [30]], 32, number), ARGS.sliding_window)], memory, mx.array(1.0))
        mx.eval(pool.model.parameters(), optimizers.state)
    moments = {"optimizers": {"experts": optimizers.experts.state, "router": optimizers.router.state}}
    return flat(pool.model.parameters()) | flat(moments)


def begun(tap: int | str) -> tuple[Pool, Optimizers]:
    pool = tiny_pool([2, 3], tap, ALL)
    pool.freeze(1)
    optimizers = make_optimizers(TRAINING)
    optimizers.init(pool.model)
    return pool, optimizers


@pytest.mark.parametrize("tap", ["final", 2])
def test_a_resumed_run_goes_on_bit_by_bit(tmp_path, tap):
    pool, optimizers = begun(tap)
    trained(pool, optimizers, library(), range(3))
    at = State(3, 1, 3, {"action": "create"}, [{"a": 1 / 3}, {"a": 0.1}], 10**15, 0, {"a": "ff"})
    at.best = Best("young", 0.1, 2, 1, states.trainable_weights(pool))
    checkpoint.write(tmp_path / "c", states.content(at, tiny_base(), pool, library(), optimizers))
    expected = trained(pool, optimizers, library(), range(3, 6))

    again, fresh = tiny_pool(tap=tap, projections=ALL, filled=False), make_optimizers(TRAINING)
    files = checkpoint.read(tmp_path / "c")
    known = states.restore_pool(files, tiny_base(), again, tmp_path)
    state = states.restore_training(files, fresh)
    fresh.init(again.model)
    assert replace(state, best=Best()) == replace(at, best=Best())
    assert (state.best.phase, state.best.loss, state.best.step, state.best.waited) == ("young", 0.1, 2, 1)
    assert state.best.weights.keys() == at.best.weights.keys()
    assert all(mx.array_equal(state.best.weights[n], w) for n, w in at.best.weights.items())
    assert again.describe() == pool.describe()
    assert again.frozen_hashes() == pool.frozen_hashes()
    assert again.trainable == [2]
    found = trained(again, fresh, known, range(3, 6))
    assert found.keys() == expected.keys()
    assert [name for name in expected if not np.array_equal(found[name], expected[name])] == []


def test_another_base_is_refused(tmp_path):
    pool, optimizers = begun("final")
    files = states.content(State(), tiny_base(), pool, library(), optimizers)
    other = replace(tiny_base(), fingerprint="1" * 64, name="other")
    with pytest.raises(UserError, match="another base than other"):
        states.restore_pool(files, other, tiny_pool(filled=False), tmp_path)


def test_other_projections_are_refused(tmp_path):
    pool, optimizers = begun("final")
    files = states.content(State(), tiny_base(), pool, library(), optimizers)
    with pytest.raises(UserError, match="not part of this expert"):
        states.restore_pool(files, tiny_base(), tiny_pool(filled=False), tmp_path)


def test_a_run_without_expert_or_library(tmp_path):
    pool, optimizers = tiny_pool(filled=False), make_optimizers(TRAINING)
    optimizers.init(pool.model)
    checkpoint.write(tmp_path / "c", states.content(State(), tiny_base(), pool, Library("x"), optimizers))
    files = checkpoint.read(tmp_path / "c")
    again = tiny_pool(filled=False)
    assert len(states.restore_pool(files, tiny_base(), again, tmp_path)) == len(again) == 0
    assert states.restore_training(files, make_optimizers(TRAINING)) == State()


def test_the_files_of_a_checkpoint():
    pool, optimizers = begun("final")
    files = states.content(State(), tiny_base(), pool, library(), optimizers)
    assert {n for n in files if "/" not in n} == {
        "pool.json", "trainer.json", "router.safetensors", "library.safetensors", "optimizer.safetensors",
    }  # fmt: skip
    for column in (1, 2):
        assert files[f"experts/expert_{column}/adapter_config.json"]["fine_tune_type"] == "lora"
        assert files[f"experts/expert_{column}/adapters.safetensors"]
    assert json.loads(json.dumps(files["trainer.json"]))["step"] == 0


@pytest.mark.parametrize(
    "change",
    [{"step": -1}, {"skill": 1.0}, {"digests": []}, {"lookup_ratio": "4"}, {"lookup_ratio": True},
     {"best": {"phase": "", "loss": "low", "step": 0, "waited": 0}}, {"best": {"phase": "", "loss": None, "step": 0}},
     {"seen": {"losses": ["x"]}}, {"seen": {"unserved": {"a": None}}}, {"seen": {"collapsed": "no"}}, {"seen": []}, {"more": 1}],
    ids=str,
)  # fmt: skip
def test_values_that_no_run_writes(change):
    pool, optimizers = begun("final")
    files = states.content(State(), tiny_base(), pool, library(), optimizers)
    with pytest.raises(UserError, match=r"of this checkpoint is damaged"):
        states.restore_training({**files, "trainer.json": {**files["trainer.json"], **change}}, optimizers)


def test_best_weights_are_a_copy():
    pool, optimizers = begun("final")
    kept = states.trainable_weights(pool)
    before = {name: np.array(value) for name, value in kept.items()}
    after = trained(pool, optimizers, library(), range(1))
    assert all(np.array_equal(np.array(kept[name]), value) for name, value in before.items())
    assert any(not np.array_equal(after[name], value) for name, value in before.items())


def test_the_next_skill_starts_anew():
    state = State(30, 1, 9, {"action": "create"}, best=Best("mature", 0.5))
    state.next_skill()
    assert (state.step, state.skill, state.skill_step, state.decision, state.best) == (30, 2, 0, None, Best())


def test_generators_belong_to_a_purpose():
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
    assert sorted(map(states.step_folder, (100, 20, 3))) == ["step-000003", "step-000020", "step-000100"]
