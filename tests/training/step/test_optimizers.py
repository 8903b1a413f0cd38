"""The optimizers of the experts: their updates, their moments as ranks grow and runs resume, LoRA+, and the schedules."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from dylora_mlx.config import OptimizerConfig, TrainingConfig
from dylora_mlx.config.optimizers import AdafactorConfig, LionConfig, MuonConfig, OptimizerName, SGDConfig
from dylora_mlx.growth.library import Library
from dylora_mlx.growth.pool import ExpertRecord, Pool
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.checkpoint.state import TrainerState, checkpoint_content, restore_pool, restore_training
from dylora_mlx.training.step.losses import RehearsalBatch, device_batch
from dylora_mlx.training.step.optimizers import Optimizers, lr_schedule, make_optimizers, moments_per_parameter
from dylora_mlx.training.step.step import Step
from tests.tiny import ARGS, batch_of, close, flat, tiny_base, tiny_pool

NAMES = get_args(OptimizerName)
NO_MEMORY = RehearsalBatch(mx.zeros((0, 0)), mx.zeros((0,), mx.int32), mx.zeros((0,)))
CONFIGS = {
    "adafactor with a first moment": TrainingConfig(
        optimizer="adafactor", optimizer_config=OptimizerConfig(adafactor=AdafactorConfig(beta_1=0.9))
    ),
    "sgd with momentum": TrainingConfig(
        optimizer="sgd", optimizer_config=OptimizerConfig(sgd=SGDConfig(momentum=0.9, nesterov=True))
    ),
    **{name: TrainingConfig(optimizer=name, loraplus_lr_ratio=4.0) for name in NAMES},
}


def ready(pool: Pool, training: TrainingConfig) -> Optimizers:
    optimizers = make_optimizers(training)
    optimizers.init(pool.model)
    return optimizers


def take(pool: Pool, optimizers: Optimizers, training: TrainingConfig, steps: range, compiled: bool = False) -> dict:
    """Train the last expert and return all parameters and moments."""
    step = Step(pool.model, optimizers, training, None, len(pool), compiled)
    for number in steps:
        optimizers.set_learning_rates(1 / (1 + number), training)
        outcome = step([device_batch(batch_of([[20, 9]], 32, number), ARGS.sliding_window)], NO_MEMORY, mx.array(1.0))
        mx.eval(step.state, outcome)
    return flat(pool.model.parameters()) | flat({"m": optimizers.experts.state, "r": optimizers.router.state})


def factors(pool: Pool) -> dict[str, np.ndarray]:
    return {name: value for name, value in flat(pool.model.parameters()).items() if name.startswith("experts")}


@pytest.mark.parametrize("training", CONFIGS.values(), ids=CONFIGS)
def test_a_resumed_run_continues_bit_for_bit_after_a_rank_growth(tmp_path, training):
    pool = tiny_pool([2])
    optimizers = ready(pool, training)
    take(pool, optimizers, training, range(2))
    pool.grow_rank(1, 4, mx.random.key(5))
    optimizers.grow_moments(pool.model)
    state = TrainerState(2, matrix=[{}])
    checkpoint.write(tmp_path / "c", checkpoint_content(state, tiny_base(), pool, Library("x"), optimizers))
    expected = take(pool, optimizers, training, range(2, 4))
    files, again, restored = checkpoint.read(tmp_path / "c"), tiny_pool(filled=False), make_optimizers(training)
    restore_pool(files, tiny_base(), again, tmp_path)
    restore_training(files, restored)
    restored.init(again.model)
    resumed = take(again, restored, training, range(2, 4))
    assert resumed.keys() == expected.keys()
    assert [name for name in expected if not np.array_equal(resumed[name], expected[name])] == []


@pytest.mark.parametrize("training", CONFIGS.values(), ids=CONFIGS)
def test_a_growing_rank_keeps_the_moments_of_the_old_ranks(training):
    pool = tiny_pool([2])
    optimizers = ready(pool, training)
    before = take(pool, optimizers, training, range(2))
    pool.grow_rank(1, 3, mx.random.key(5))
    optimizers.grow_moments(pool.model)
    after = flat({"m": optimizers.experts.state})
    for name, value in after.items():
        old = before[name]
        assert np.array_equal(value[tuple(slice(size) for size in old.shape)], old), name
        if value.shape == old.shape:
            continue
        added = value[2:] if value.shape[0] != old.shape[0] else value[:, 2:]
        assert np.allclose(added, old.mean() if "exp_avg_sq" in name else 0, rtol=1e-6, atol=0), name
    grown = [name for name in after if after[name].shape != before[name].shape]
    assert len(grown) >= 2 * ARGS.num_hidden_layers * 2
    trained = take(pool, optimizers, training, range(2, 3))
    assert all(np.isfinite(value).all() for value in trained.values())


def reference(name: str) -> optim.Optimizer:
    """Return mlx's optimizer with the settings that the option's defaults should give, at a rate of 1e-2."""
    made = {
        "adamw": lambda: optim.AdamW(1e-2, betas=[0.9, 0.99], weight_decay=0.01),
        "adam": lambda: optim.Adam(1e-2, betas=[0.9, 0.99]),
        "adafactor": lambda: optim.Adafactor(1e-2, scale_parameter=False, relative_step=False),
        "lion": lambda: optim.Lion(1e-2),
        "muon": lambda: optim.Muon(1e-2),
        "sgd": lambda: optim.SGD(1e-2),
    }
    return made[name]()


@pytest.mark.parametrize("name", NAMES)
def test_the_updates_are_those_of_mlx(name):
    rng = np.random.default_rng(0)
    parameters, ours = (
        {"w": mx.array(rng.normal(size=(6, 3)), mx.float32)},
        make_optimizers(TrainingConfig(optimizer=name)),
    )
    expected, theirs = parameters, reference(name)
    for _ in range(3):
        gradients = {"w": mx.array(rng.normal(size=(6, 3)), mx.float32)}
        parameters = ours.updated_experts(gradients, parameters)
        expected = theirs.apply_gradients(gradients, expected)
    assert mx.array_equal(parameters["w"], expected["w"])
    assert type(ours.router) is optim.AdamW


def test_options_of_an_optimizer_reach_it():
    options = OptimizerConfig(muon=MuonConfig(momentum=0.5, nesterov=False, ns_steps=3))
    muon = make_optimizers(TrainingConfig(optimizer="muon", optimizer_config=options, weight_decay=0.2)).experts
    assert isinstance(muon, optim.Muon)
    assert (muon.momentum, muon.nesterov, muon.ns_steps, muon.weight_decay) == (0.5, False, 3, 0.2)
    options = OptimizerConfig(lion=LionConfig(betas=[0.8, 0.95]))
    made = make_optimizers(TrainingConfig(optimizer="lion", optimizer_config=options))
    assert isinstance(made.experts, optim.Lion)
    assert (made.experts.betas, made.experts.weight_decay, made.router.weight_decay) == ([0.8, 0.95], 0.0, 0.01)
    assert make_optimizers(TrainingConfig(weight_decay=0.3)).router.weight_decay == 0.3


@pytest.mark.parametrize("name", NAMES)
def test_lora_plus_gives_b_its_own_learning_rate(name):
    rates = {"lora_a": 1e-2, "lora_b": 4e-2}
    rng, plus = np.random.default_rng(0), make_optimizers(TrainingConfig(optimizer=name, loraplus_lr_ratio=4.0))
    alone = {
        factor: make_optimizers(TrainingConfig(optimizer=name, learning_rate=rate)) for factor, rate in rates.items()
    }
    both = {factor: mx.array(rng.normal(size=(6, 3)), mx.float32) for factor in rates}
    expected = dict(both)
    for _ in range(3):
        gradients = {factor: mx.array(rng.normal(size=(6, 3)), mx.float32) for factor in rates}
        both = plus.updated_experts(gradients, both)
        for factor, optimizers in alone.items():
            expected[factor] = optimizers.updated_experts(
                {factor: gradients[factor]}, {factor: expected[factor]}
            )[factor]  # fmt: skip
    assert mx.array_equal(both["lora_a"], expected["lora_a"])
    assert close(both["lora_b"], expected["lora_b"], 1e-5)


def test_adafactor_starts_anew_with_each_expert():
    training = TrainingConfig(optimizer="adafactor")
    pool = tiny_pool([2])
    optimizers = ready(pool, training)
    take(pool, optimizers, training, range(3))
    optimizers.init(pool.model)
    assert optimizers.experts.step.item() == 3  # nothing is new
    pool.freeze(1)
    optimizers.init(pool.model)
    assert optimizers.experts.step.item() == 3
    pool.add(ExpertRecord("new", 2, 4.0, 3), mx.random.key(8))
    optimizers.init(pool.model)
    assert (optimizers.experts.step.item(), optimizers.router.step.item()) == (0, 3)
    take(pool, optimizers, training, range(1))
    pool.freeze(2)
    pool.unfreeze(1)
    optimizers.drop_moments(1)
    optimizers.init(pool.model)
    assert optimizers.experts.step.item() == 0


@pytest.mark.parametrize("name", ["adafactor", "muon"])  # the others have no operations that a compiled AdamW has not
def test_a_compiled_step_does_the_same(name):
    training = TrainingConfig(optimizer=name, loraplus_lr_ratio=2.0)
    pools = [tiny_pool([2], layers=1), tiny_pool([2], layers=1)]
    plain, compiled = (
        take(pool, ready(pool, training), training, range(3), is_compiled)
        for pool, is_compiled in zip(pools, (False, True), strict=True)
    )
    assert plain.keys() == compiled.keys()
    assert [n for n in plain if n.startswith("experts") and not close(plain[n], compiled[n], 2e-3)] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_undone_with_its_moments(name):
    training, pool = TrainingConfig(optimizer=name), tiny_pool([2])
    optimizers = ready(pool, training)
    before = take(pool, optimizers, training, range(2))
    step = Step(pool.model, optimizers, training, None, 1, False)
    snapshot = step.snapshot()
    mx.eval(step.state, step([device_batch(batch_of([[20]], 32), 8)], NO_MEMORY, mx.array(1.0)))
    changed = flat(pool.model.parameters()) | flat({"m": optimizers.experts.state, "r": optimizers.router.state})
    assert not np.array_equal(changed["experts.0.layers.0.q_proj.lora_b"], before["experts.0.layers.0.q_proj.lora_b"])
    step.restore(snapshot)
    after = flat(pool.model.parameters()) | flat({"m": optimizers.experts.state, "r": optimizers.router.state})
    assert after.keys() == before.keys()
    assert all(np.array_equal(after[n], before[n]) for n in before)


@pytest.mark.parametrize("training", CONFIGS.values(), ids=CONFIGS)
def test_moments_are_counted_as_they_are(training):
    pool = tiny_pool([2])
    optimizers = ready(pool, training)
    moments = [value for name, value in flat({"m": optimizers.experts.state}).items() if ".experts." in name]
    size = sum(value.size for value in moments if value.ndim == 2)
    assert size == moments_per_parameter(training) * sum(value.size for value in factors(pool).values())


# Schedules.


def fractions(steps: int, **options: object) -> list[float]:
    training = replace(TrainingConfig(), **options)
    return [lr_schedule(step, steps, training) for step in range(steps)]


def test_cosine_decay_is_the_default():
    training = TrainingConfig()
    assert training.lr_schedule == "cosine_decay"
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * ((step - 5) / 45))) for step in range(5, 50)]
    assert [lr_schedule(step, 50, training) for step in range(5, 50)] == expected


def test_schedules_have_the_values_of_mlx():
    for step, value in enumerate(fractions(20, lr_schedule="linear", lr_warmup_fraction=0.0)):
        assert value == pytest.approx(float(optim.linear_schedule(1.0, 0.1, 20)(mx.array(step))), rel=1e-6)
    for step, value in enumerate(fractions(20, lr_warmup_fraction=0.0)):
        assert value == pytest.approx(float(optim.cosine_decay(1.0, 20, 0.1)(mx.array(step))), rel=1e-5)
    decay = {"lr_decay_rate": 0.8, "lr_warmup_fraction": 0.0, "lr_min_fraction": 0.0}
    assert fractions(20, lr_schedule="exponential_decay", **decay) == [
        pytest.approx(optim.exponential_decay(1.0, 0.8)(step)) for step in range(20)
    ]
    assert fractions(20, lr_schedule="step_decay", lr_step_size=6, **decay) == [
        pytest.approx(optim.step_decay(1.0, 0.8, 6)(step)) for step in range(20)
    ]


def test_schedules_warm_up_and_end_at_the_lowest_fraction():
    for name in ("cosine_decay", "linear", "exponential_decay", "step_decay", "constant"):
        size = {"lr_step_size": 15} if name == "step_decay" else {}
        values = fractions(50, lr_schedule=name, **size)
        assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        assert values[5] == 1
        assert values[5:] == sorted(values[5:], reverse=True)
        end = {"cosine_decay": 0.101, "linear": 0.12, "constant": 1.0}
        assert values[-1] == pytest.approx(end.get(name, 0.1), abs=1e-3)
    steps = fractions(50, lr_schedule="step_decay", lr_step_size=15)
    assert len({round(value, 9) for value in steps[5:]}) == 3
    assert min(fractions(50, lr_schedule="exponential_decay", lr_decay_rate=0.5)) == 0.1
    assert fractions(1, lr_schedule="exponential_decay") == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_schedule": "step_decay"}, "lr_step_size: step_decay needs it"),
        ({"lr_step_size": 10}, "lr_step_size: cosine_decay has no steps"),
        ({"lr_schedule": "step_decay", "lr_step_size": 0}, "lr_step_size: 0 is not at least 1"),
        ({"lr_decay_rate": 0.5}, "lr_decay_rate: cosine_decay has no decay rate"),
        ({"lr_schedule": "exponential_decay", "lr_decay_rate": 1.0}, "lr_decay_rate: 1.0 is not between 0 and 1"),
        (
            {"lr_schedule": "exponential_decay", "lr_min_fraction": 0.0},
            "lr_min_fraction: exponential_decay never reaches",
        ),
        ({"optimizer": "adam", "weight_decay": 0.1}, "weight_decay: 0.1, but adam has none"),
        ({"weight_decay": -0.1}, "weight_decay: -0.1 is below 0"),
        ({"optimizer": "muon", "learning_rate": 1.0}, "learning_rate: 1.0 is not between 0 and 1$"),
        ({"optimizer": "sgd", "learning_rate": 1000.0}, "learning_rate: 1000.0 is not between 0 and 1000"),
        ({"loraplus_lr_ratio": 0.0}, "loraplus_lr_ratio: 0.0 is not above 0"),
        (
            {"optimizer_config": OptimizerConfig(lion=LionConfig(betas=[0.5, 0.5]))},
            "optimizer_config.lion: the optimizer is adamw",
        ),
    ],
)
def test_what_an_option_cannot_do_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**options)
