"""Options: the documented defaults, documentation of every option, and refusal of invalid values by name."""

from __future__ import annotations

import ast
import inspect
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from itertools import pairwise
from typing import get_type_hints

import pytest

from dylora_mlx import config
from dylora_mlx.config import (
    Config,
    DataConfig,
    GrowthConfig,
    LogConfig,
    ModelConfig,
    Source,
    TrainingConfig,
    yaml_files,
)
from dylora_mlx.config.load import load_config

SKILL = Source(name="some", source="some.jsonl")
SECTIONS = (Source, DataConfig, ModelConfig, GrowthConfig, TrainingConfig, LogConfig, Config)
NAN, INF = float("nan"), float("inf")


def test_defaults():
    default_config = Config(skills=[SKILL])
    assert (default_config.data.validation_fraction, default_config.data.test_fraction) == (0.1, 0.1)
    assert (
        default_config.model.base,
        default_config.model.rank,
        default_config.model.alpha,
        default_config.model.router_layer,
    ) == (
        "embedded",
        8,
        16.0,
        "final",
    )
    assert default_config.model.document_mean_weight == 0.8
    assert default_config.model.document_mean_decay == 0.9
    assert default_config.model.projections == "all-linear"
    assert default_config.growth.base_skill == Source(name="python", source="packaged/python")
    assert (default_config.growth.threshold, default_config.growth.min_samples, default_config.growth.min_tokens) == (
        None,
        32,
        1000,
    )
    assert default_config.training.max_steps is None
    assert (default_config.log.wandb, default_config.seed, default_config.domains) == ("disabled", 0, [])
    assert (SKILL.preset, SKILL.split, SKILL.mask_prompt, SKILL.limit) == ("none", "train", True, None)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_option_is_documented_and_frozen(section):
    body = ast.parse(inspect.getsource(section)).body[0].body
    documented = {
        entry.target.id
        for entry, following in pairwise(body)
        if isinstance(entry, ast.AnnAssign) and isinstance(following, ast.Expr)
    }
    hints = get_type_hints(section)
    sections = {entry.name for entry in fields(section) if is_dataclass(hints[entry.name])}
    assert {entry.name for entry in fields(section)} - documented <= sections
    assert section.__doc__.endswith(".")
    instance = {Source: SKILL, Config: Config(skills=[SKILL])}.get(section) or section()
    with pytest.raises(FrozenInstanceError):
        setattr(instance, fields(section)[0].name, None)


GOOD = [
    (Source, {"name": "a", "source": "b", "limit": 1, "rank": 1, "alpha": 0.1, "prompt": "", "completion": ""}),
    (Source, {"name": "9_-." + "a" * 60, "source": "b"}),
    (DataConfig, {"max_seq_length": 16, "packing_window": 1, "feature_cache_mb": 0, "test_fraction": 0.49}),
    (ModelConfig, {"rank": 1, "alpha": 1e-3, "router_layer": 0, "projections": [*config.ATTENTION, *config.MLP]}),
    (GrowthConfig, {"base_skill": None, "threshold": -1, "whitening": 0, "cooldown_steps": 0, "dense_steps": 0}),
    (GrowthConfig, {"threshold": 1, "min_samples": 1, "embedding_samples": 1, "confidence": 0.5, "bootstrap": 50}),
    (
        TrainingConfig,
        {
            "epochs": 1,
            "max_steps": 1,
            "max_grad_norm": 0,
            "z_loss_coef": 0,
            "lr_warmup_fraction": 0,
            "lr_min_fraction": 1,
        },
    ),
    (LogConfig, {"steps_per_report": 1}),
    (Config, {"skills": [SKILL], "seed": 2**31 - 1, "training": TrainingConfig(early_stop_domain="some")}),
]


@pytest.mark.parametrize(("section", "values"), GOOD)
def test_values_at_the_edge_are_accepted(section, values):
    instance = section(**values)
    assert all(getattr(instance, name) == value for name, value in values.items())


SOURCE = {"name": "some", "source": "some.jsonl"}
BAD = [
    *((Source, {**SOURCE, "name": name}, "is not a name") for name in ("", "a b", "a/b", "-a", ".", "é", "a" * 65)),
    (Source, {**SOURCE, "source": " "}, "names no source"),
    (Source, {**SOURCE, "prompt": "{a}"}, "prompt and completion go together"),
    (Source, {**SOURCE, "completion": "{a}"}, "prompt and completion go together"),
    (Source, {**SOURCE, "limit": 0}, "limit: 0 of skill 'some' is not at least 1"),
    (Source, {**SOURCE, "rank": 0}, "rank: 0 of skill 'some' is not at least 1"),
    (Source, {**SOURCE, "alpha": 0.0}, "alpha: 0.0 of skill 'some' is not above 0"),
    (DataConfig, {"max_seq_length": 15}, "max_seq_length: 15 is not at least 16"),
    (DataConfig, {"packing_window": 0}, "packing_window: 0 is not at least 1"),
    (DataConfig, {"feature_cache_mb": -1}, "feature_cache_mb: -1 is below 0"),
    (DataConfig, {"validation_fraction": 0.0}, "validation_fraction: 0.0 is not between 0 and 0.5"),
    (DataConfig, {"test_fraction": 0.5}, "test_fraction: 0.5 is not between 0 and 0.5"),
    (ModelConfig, {"rank": 0}, "rank: 0 is not at least 1"),
    (ModelConfig, {"alpha": -1.0}, "alpha: -1.0 is not above 0"),
    (ModelConfig, {"gather_threshold": "most"}, "gather_threshold: most is neither auto nor at least 0"),
    (ModelConfig, {"projections": []}, "projections: name at least one"),
    (ModelConfig, {"projections": ["q_proj", "lm_head"]}, "projections: 'lm_head' is not one of q_proj"),
    (ModelConfig, {"projections": ["q_proj", "q_proj"]}, "projections: one is named twice"),
    (ModelConfig, {"router_layer": -1}, "router_layer: -1 is below 0"),
    (ModelConfig, {"document_mean_weight": -0.1}, "document_mean_weight: -0.1 is not between 0 and 1"),
    (ModelConfig, {"document_mean_weight": 1.1}, "document_mean_weight: 1.1 is not between 0 and 1"),
    (ModelConfig, {"document_mean_decay": 0.0}, "document_mean_decay: 0.0 is not above 0 and at most 1"),
    (ModelConfig, {"document_mean_decay": 1.1}, "document_mean_decay: 1.1 is not above 0 and at most 1"),
    (GrowthConfig, {"threshold": 1.1}, "threshold: 1.1 is not a cosine"),
    (GrowthConfig, {"threshold": -1.1}, "threshold: -1.1 is not a cosine"),
    (GrowthConfig, {"threshold": 0.7, "adaptive_delta": -0.1}, "adaptive_delta: -0.1 is below 0"),
    (GrowthConfig, {"adaptive_delta": 0.1}, "adaptive_delta: it lowers growth.threshold, which is null"),
    (GrowthConfig, {"similarity": "median"}, "similarity: a median needs a growth.threshold"),
    (GrowthConfig, {"projection": "head.safetensors"}, "projection: a projection head needs a growth.threshold"),
    (GrowthConfig, {"false_new": 0.0}, "false_new: 0.0 is not between 0 and 0.5"),
    (GrowthConfig, {"false_known": 0.5}, "false_known: 0.5 is not between 0 and 0.5"),
    (GrowthConfig, {"whitening": -0.1}, "whitening: -0.1 is below 0"),
    *(
        (GrowthConfig, {name: 0}, f"{name}: 0 is not at least 1")
        for name in ("min_samples", "min_tokens", "embedding_samples", "batch_samples", "max_experts", "top_k")
    ),
    (GrowthConfig, {"embedding_samples": 31}, "embedding_samples: 31 is below min_samples, 32"),
    (GrowthConfig, {"bootstrap": 49}, "bootstrap: 49 resamples are too few"),
    (GrowthConfig, {"confidence": 1.0}, "confidence: 1.0 is not between 0.5 and 1"),
    (GrowthConfig, {"confidence": 0.4}, "confidence: 0.4 is not between 0.5 and 1"),
    *((GrowthConfig, {n: -1}, f"{n}: -1 is below 0") for n in ("cooldown_steps", "dense_steps", "anneal_steps")),
    (GrowthConfig, {"temperature": 0.0}, "temperature: must be above 0"),
    (GrowthConfig, {"final_temperature": 0.0}, "temperature: must be above 0"),
    *(
        (TrainingConfig, {name: 0}, f"{name}: 0 is not at least 1")
        for name in (
            "epochs",
            "batch_size",
            "grad_accumulation_steps",
            "steps_per_eval",
            "patience",
            "save_every",
            "keep_checkpoints",
            "max_steps",
            "rehearsal_tokens",
            "memory_tokens",
        )
    ),
    *(
        (TrainingConfig, {name: value}, f"{name}: {value} is not between 0 and 1")
        for name in ("learning_rate", "router_learning_rate")
        for value in (0.0, 1.0)
    ),
    *(
        (TrainingConfig, {name: value}, f"{name}: {value} is not between 0 and 1")
        for name in ("lr_warmup_fraction", "lr_min_fraction")
        for value in (-0.1, 1.1)
    ),
    *(
        (TrainingConfig, {name: -1}, f"{name}: -1 is below 0")
        for name in (
            "weight_decay",
            "max_grad_norm",
            "router_fit_steps",
            "load_balance_coef",
            "z_loss_coef",
            "rehearsal_coef",
            "min_improvement",
        )
    ),
    (LogConfig, {"steps_per_report": 0}, "steps_per_report: 0 is not at least 1"),
    (Config, {"skills": []}, "skills: the stream is empty"),
    (Config, {"skills": [SKILL, SKILL]}, "two skills or domains are called 'some'"),
    (Config, {"skills": [SKILL], "domains": [SKILL]}, "two skills or domains are called 'some'"),
    (Config, {"skills": [replace(SKILL, name="python")]}, "two skills or domains are called 'python'"),
    (Config, {"skills": [SKILL], "seed": -1}, "seed: -1 is not between"),
    (Config, {"skills": [SKILL], "seed": 2**31}, "seed: 2147483648 is not between"),
    (
        Config,
        {"skills": [SKILL], "training": TrainingConfig(early_stop_domain="other")},
        "training.early_stop_domain: 'other' is none of current, python, some",
    ),
]


@pytest.mark.parametrize(("section", "values", "words"), BAD)
def test_an_invalid_value_is_refused(section, values, words):
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (the words are compared below)
        section(**values)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize(
    ("section", "name"),
    [(s, entry.name) for s in SECTIONS for entry in fields(s) if "float" in str(entry.type)],
)
def test_no_number_may_be_infinite_or_nan(section, name, value):
    with pytest.raises(ValueError, match=f"{name}: {value} is not"):
        section(**(SOURCE if section is Source else {}), **{name: value})


def test_the_base_skill_is_optional():
    without_base_skill = Config(skills=[replace(SKILL, name="python")], growth=GrowthConfig(base_skill=None))
    assert without_base_skill.growth.base_skill is None


@pytest.mark.parametrize("path", sorted(yaml_files.CONFIG_FOLDERS[1].glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_parse(path):
    loaded = load_config(path)
    assert isinstance(loaded, Config)
    assert {"requests", "flask", "stripe"} <= {skill.name for skill in loaded.skills}


def test_the_quickstart_needs_no_network():
    loaded = load_config(yaml_files.CONFIG_FOLDERS[1] / "quickstart.yaml")
    assert loaded.model.base == "embedded"
    assert all(source.source.startswith("packaged/") for source in (*loaded.skills, *loaded.domains))
