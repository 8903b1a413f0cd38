"""When a skill is evaluated, and the warnings of options that cannot act at any evaluation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dylora_mlx.config import Config, GrowthConfig, RankConfig, Source, TrainingConfig
from dylora_mlx.growth.pool import ExpertRecord
from dylora_mlx.training.skill.evaluations import evaluation_steps, warn_of_idle_options


def config(every: int = 25, patience: int = 5, rank: RankConfig | None = None, **growth) -> Config:
    training = TrainingConfig(steps_per_eval=every, patience=patience)
    skills = [Source(name="sql", source="packaged/sql")]
    return Config(skills, training=training, growth=GrowthConfig(rank=rank or RankConfig(), **growth))


@pytest.mark.parametrize(
    ("options", "steps", "expected"),
    [
        (config(4), 10, [4, 8, 10]),
        (config(4), 8, [4, 8]),
        (config(25), 3, [3]),
        (config(4, rank=RankConfig(epsilon=0.5, steps=3)), 10, [3, 4, 6, 8, 9, 10]),
        (config(4, rank=RankConfig(steps=3)), 10, [4, 8, 10]),
    ],
)
def test_evaluations(options, steps, expected):
    assert evaluation_steps(options, steps) == expected


GROWS = config(rank=RankConfig(epsilon=0.5))


@pytest.mark.parametrize(
    ("options", "steps", "record", "warning"),
    [
        (GROWS, 25, {}, "rank.epsilon does nothing for sql: it takes 26 steps at growth.rank.steps 25, the skill has 25"),
        (GROWS, 26, {}, ""),
        (GROWS, 99, {"rank": 32}, "rank.epsilon does nothing for sql: twice its LoRA rank, 64, is above the largest, 32"),
        (GROWS, 99, {"rank": 32, "steps": 30}, ""),
        (config(freeze_after=2), 50, {}, "mature phase, take 51 steps at training.steps_per_eval 25, the skill has 50"),
        (config(freeze_after=2), 51, {}, ""),
        # Dense and annealing take 3 steps each of 9, so that no evaluation of the mature phase is left before the last.
        (config(5, freeze_after=1), 9, {}, "take 11 steps at training.steps_per_eval 5, the skill has 9"),
        (config(5, freeze_after=1), 11, {}, ""),
        (config(1, patience=3, freeze_after=3), 99, {}, "3 evaluations without improvement end the skill (training.patience 3)"),
        (config(1, patience=3, freeze_after=2), 99, {}, ""),
        (config(), 1, {}, ""),
    ],
)  # fmt: skip
def test_options_that_cannot_act(options, steps, record, warning, capsys):
    warn_of_idle_options(options, "sql", steps, replace(ExpertRecord("sql", 8, 16.0, 0), **record), 32)
    printed = " ".join(capsys.readouterr().err.split())
    assert warning in printed
    assert printed.count("warning: ") == bool(warning)
