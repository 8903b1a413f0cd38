"""Options: their defaults are those documented, and a value that cannot work is refused with its name."""

from __future__ import annotations

import ast
import inspect
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from itertools import pairwise

import pytest

from dylora_mlx import config as module
from dylora_mlx.cli import options as cli
from dylora_mlx.config import Config, Data, Growth, Log, Model, Source, Training
from dylora_mlx.config import yaml_files as config_files

SKILL = Source(name="some", source="some.jsonl")
SECTIONS = (Source, Data, Model, Growth, Training, Log, Config)
NAN, INF = float("nan"), float("inf")


def test_defaults():
    made = Config(skills=[SKILL])
    assert (made.data.validation_fraction, made.data.test_fraction) == (0.1, 0.1)
    assert (made.model.base, made.model.rank, made.model.alpha, made.model.tap) == ("embedded", 8, 16.0, "final")
    assert made.model.context == 0.5
    assert made.model.projections == ["q_proj", "v_proj"]
    assert made.growth.base_skill == Source(name="python", source="packaged/python")
    assert (made.growth.threshold, made.growth.min_samples, made.growth.min_tokens) == (0.75, 32, 1000)
    assert made.training.max_steps is None
    assert (made.log.wandb, made.seed, made.domains) == ("disabled", 0, [])
    assert (SKILL.preset, SKILL.split, SKILL.completion_only, SKILL.limit) == ("none", "train", True, None)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_option_is_documented_and_frozen(section):
    body = ast.parse(inspect.getsource(section)).body[0].body
    documented = {
        entry.target.id
        for entry, after in pairwise(body)
        if isinstance(entry, ast.AnnAssign) and isinstance(after, ast.Expr)
    }
    sections = {entry.name for entry in fields(section) if is_dataclass(getattr(module, entry.name.title(), None))}
    assert {entry.name for entry in fields(section)} - documented <= sections
    assert section.__doc__.endswith(".")
    made = {Source: SKILL, Config: Config(skills=[SKILL])}.get(section) or section()
    with pytest.raises(FrozenInstanceError):
        setattr(made, fields(section)[0].name, None)


GOOD = [
    (Source, {"name": "a", "source": "b", "limit": 1, "rank": 1, "alpha": 0.1, "prompt": "", "completion": ""}),
    (Source, {"name": "9_-." + "a" * 60, "source": "b"}),
    (Data, {"row_length": 16, "pack_window": 1, "feature_cache_mb": 0, "test_fraction": 0.49}),
    (Model, {"rank": 1, "alpha": 1e-3, "tap": 0, "projections": [*module.ATTENTION, *module.MLP]}),
    (Growth, {"base_skill": None, "threshold": -1, "whitening": 0, "cooldown_steps": 0, "warmup_steps": 0}),
    (Growth, {"threshold": 1, "min_samples": 1, "embedding_samples": 1, "confidence": 0.5, "bootstrap": 50}),
    (Training, {"epochs": 1, "max_steps": 1, "clip_norm": 0, "z_loss": 0, "warmup_fraction": 0, "final_fraction": 1}),
    (Log, {"every": 1}),
    (Config, {"skills": [SKILL], "seed": 2**31 - 1, "training": Training(early_stop_domain="some")}),
]


@pytest.mark.parametrize(("section", "values"), GOOD)
def test_values_at_the_edge_are_accepted(section, values):
    made = section(**values)
    assert all(getattr(made, name) == value for name, value in values.items())


SOURCE = {"name": "some", "source": "some.jsonl"}
BAD = [
    *((Source, {**SOURCE, "name": name}, "is not a name") for name in ("", "a b", "a/b", "-a", ".", "é", "a" * 65)),
    (Source, {**SOURCE, "source": " "}, "names no source"),
    (Source, {**SOURCE, "prompt": "{a}"}, "prompt and completion go together"),
    (Source, {**SOURCE, "completion": "{a}"}, "prompt and completion go together"),
    (Source, {**SOURCE, "limit": 0}, "limit: 0 of skill 'some' is not at least 1"),
    (Source, {**SOURCE, "rank": 0}, "rank: 0 of skill 'some' is not at least 1"),
    (Source, {**SOURCE, "alpha": 0.0}, "alpha: 0.0 of skill 'some' is not above 0"),
    (Data, {"row_length": 15}, "row_length: 15 is not at least 16"),
    (Data, {"pack_window": 0}, "pack_window: 0 is not at least 1"),
    (Data, {"feature_cache_mb": -1}, "feature_cache_mb: -1 is below 0"),
    (Data, {"validation_fraction": 0.0}, "validation_fraction: 0.0 is not between 0 and 0.5"),
    (Data, {"test_fraction": 0.5}, "test_fraction: 0.5 is not between 0 and 0.5"),
    (Model, {"rank": 0}, "rank: 0 is not at least 1"),
    (Model, {"alpha": -1.0}, "alpha: -1.0 is not above 0"),
    (Model, {"lookup_ratio": "most"}, "lookup_ratio: most is neither auto nor at least 0"),
    (Model, {"projections": []}, "projections: name at least one"),
    (Model, {"projections": ["q_proj", "lm_head"]}, "projections: 'lm_head' is not one of q_proj"),
    (Model, {"projections": ["q_proj", "q_proj"]}, "projections: one is named twice"),
    (Model, {"tap": -1}, "tap: -1 is below 0"),
    (Model, {"context": -0.1}, "context: -0.1 is not between 0 and 1"),
    (Model, {"context": 1.1}, "context: 1.1 is not between 0 and 1"),
    (Growth, {"threshold": 1.1}, "threshold: 1.1 is not a cosine"),
    (Growth, {"threshold": -1.1}, "threshold: -1.1 is not a cosine"),
    (Growth, {"adaptive_delta": -0.1}, "adaptive_delta: -0.1 is below 0"),
    (Growth, {"whitening": -0.1}, "whitening: -0.1 is below 0"),
    *(
        (Growth, {name: 0}, f"{name}: 0 is not at least 1")
        for name in ("min_samples", "min_tokens", "embedding_samples", "batch_samples", "max_experts", "final_top_k")
    ),
    (Growth, {"embedding_samples": 31}, "embedding_samples: 31 is below min_samples, 32"),
    (Growth, {"bootstrap": 49}, "bootstrap: 49 resamples are too few"),
    (Growth, {"confidence": 1.0}, "confidence: 1.0 is not between 0.5 and 1"),
    (Growth, {"confidence": 0.4}, "confidence: 0.4 is not between 0.5 and 1"),
    *((Growth, {n: -1}, f"{n}: -1 is below 0") for n in ("cooldown_steps", "warmup_steps", "top2_steps")),
    (Growth, {"temperature": 0.0}, "temperature: must be above 0"),
    (Growth, {"final_temperature": 0.0}, "temperature: must be above 0"),
    *(
        (Training, {name: 0}, f"{name}: 0 is not at least 1")
        for name in (
            "epochs",
            "batch_rows",
            "accumulation",
            "eval_every",
            "patience",
            "checkpoint_every",
            "keep_checkpoints",
            "max_steps",
            "rehearsal_tokens",
            "memory_tokens",
        )
    ),
    *(
        (Training, {name: value}, f"{name}: {value} is not between 0 and 1")
        for name in ("learning_rate", "router_learning_rate")
        for value in (0.0, 1.0)
    ),
    *(
        (Training, {name: value}, f"{name}: {value} is not between 0 and 1")
        for name in ("warmup_fraction", "final_fraction")
        for value in (-0.1, 1.1)
    ),
    *(
        (Training, {name: -1}, f"{name}: -1 is below 0")
        for name in (
            "weight_decay",
            "clip_norm",
            "router_fit_steps",
            "balance",
            "z_loss",
            "rehearsal",
            "min_improvement",
        )
    ),
    (Log, {"every": 0}, "every: 0 is not at least 1"),
    (Config, {"skills": []}, "skills: the stream is empty"),
    (Config, {"skills": [SKILL, SKILL]}, "two skills or domains are called 'some'"),
    (Config, {"skills": [SKILL], "domains": [SKILL]}, "two skills or domains are called 'some'"),
    (Config, {"skills": [replace(SKILL, name="python")]}, "two skills or domains are called 'python'"),
    (Config, {"skills": [SKILL], "seed": -1}, "seed: -1 is not between"),
    (Config, {"skills": [SKILL], "seed": 2**31}, "seed: 2147483648 is not between"),
    (
        Config,
        {"skills": [SKILL], "training": Training(early_stop_domain="other")},
        "training.early_stop_domain: 'other' is none of current, python, some",
    ),
]


@pytest.mark.parametrize(("section", "values", "words"), BAD)
def test_a_value_that_cannot_work_is_refused(section, values, words):
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (the words are compared below)
        section(**values)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize(
    ("section", "name"),
    [(s, entry.name) for s in SECTIONS for entry in fields(s) if "float" in str(entry.type)],
)
def test_no_number_may_be_infinite_or_none_at_all(section, name, value):
    with pytest.raises(ValueError, match=f"{name}: {value} is not"):
        section(**(SOURCE if section is Source else {}), **{name: value})


def test_the_base_may_hold_no_skill():
    made = Config(skills=[replace(SKILL, name="python")], growth=Growth(base_skill=None))
    assert made.growth.base_skill is None


@pytest.mark.parametrize("path", sorted(config_files.CONFIGS[1].glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_parse(path):
    made = cli.load_config(path)
    assert isinstance(made, Config)
    assert {"requests", "flask", "stripe"} <= {skill.name for skill in made.skills}


def test_the_quickstart_needs_no_network():
    made = cli.load_config(config_files.CONFIGS[1] / "quickstart.yaml")
    assert made.model.base == "embedded"
    assert all(source.source.startswith("packaged/") for source in (*made.skills, *made.domains))
