"""Property tests of config files: a run resumes from the config it wrote, so every option must round-trip."""

from __future__ import annotations

import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from dylora_mlx.config import (
    ATTENTION,
    MLP,
    BanditConfig,
    BudgetConfig,
    Config,
    DataConfig,
    EvalConfig,
    GrowthConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ProbeConfig,
    RankConfig,
    Source,
    TrainingConfig,
)
from dylora_mlx.config.load import load_config, to_yaml
from dylora_mlx.config.optimizers import AdafactorConfig

ODD = (
    "Null!", "~", "yes", "no", "true", "1", "1.0", "1e3", ".nan", ".inf", "0x1F", "0o7", "1_000", "2001-01-01", "12:30", "- a",
    "a: b", "[1]", "{a: 1}", "{instruction}", "# c", "a # b", "&a", "*a", "!!int 3", "%", "@", "`", "|", ">", "---", "...", "?",
    "'", '"', "a\nb", " a ", "\t", "caf\u00e9", "\U0001f600", "\u2028", "\x7f", "final", "none", "\\n",
)  # fmt: skip
texts = st.one_of(st.sampled_from(ODD), st.text(st.characters(codec="utf-8", exclude_characters="\0\x85"), max_size=8))
maybe = lambda inner: st.one_of(st.none(), inner)  # noqa: E731
counts, shares = st.integers(1, 10_000), st.floats(0.01, 0.49)
amounts = st.one_of(st.floats(0, 1e6), st.integers(0, 1000).map(float), st.sampled_from([1e-300, 1e22, 1e300, 5e-324]))
positive = st.one_of(st.floats(1e-6, 1e6), st.sampled_from([1e-300, 1e22, 1e300, 1.0]))
projections = st.lists(st.sampled_from(ATTENTION + MLP), min_size=1, unique=True)
templates = st.one_of(
    st.just({}), st.fixed_dictionaries({"text": texts}), st.fixed_dictionaries({"prompt": texts, "completion": texts}),
    st.fixed_dictionaries({"messages": texts}),
)  # fmt: skip


def sources(name: str) -> st.SearchStrategy[Source]:
    """Draw sources with this name."""
    return st.builds(
        lambda form, **rest: Source(name=name, **rest, **form), templates,
        source=texts.filter(str.strip), preset=st.sampled_from(["none", "mbpp", "code_alpaca"]), contains=maybe(texts),
        subset=maybe(texts), split=texts, limit=maybe(counts), mask_prompt=st.booleans(), rank=maybe(counts), alpha=maybe(positive),
    )  # fmt: skip


@st.composite
def configs(draw) -> Config:
    """Draw configs. Every option is drawn unless it depends on others."""
    names = draw(
        st.lists(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,8}", fullmatch=True), min_size=1, max_size=3, unique=True)
    )
    names = [f"{name}-{number}" for number, name in enumerate(names)]
    drawn_projections = draw(projections)
    growth = draw(st.builds(
        GrowthConfig, policy=st.sampled_from(["threshold", "probe", "bandit"]), threshold=st.floats(-1, 1), epsilon=amounts,
        base_skill=maybe(sources("known")), whitening=amounts, projection=maybe(texts), confidence=st.floats(0.5, 0.99),
        freeze_first=st.just(drawn_projections), max_experts=counts, temperature=positive, split=st.booleans(), replay_fraction=shares,
        probe=st.builds(ProbeConfig, steps=counts, rows=counts, epsilon=amounts),
        bandit=st.builds(BanditConfig, history=st.lists(texts, max_size=2), cost=amounts, tolerance=amounts),
        rank=st.builds(RankConfig, epsilon=amounts, steps=counts, max=counts, schedule=maybe(texts)),
        budget=st.builds(BudgetConfig, adapters=maybe(counts), trainable=maybe(counts), low_usage=positive),
    ))  # fmt: skip
    step_decay = draw(st.booleans())
    training = draw(st.builds(
        TrainingConfig, optimizer=st.just("adafactor"), optimizer_config=st.builds(OptimizerConfig, adafactor=st.builds(
            AdafactorConfig, beta_1=maybe(shares), clip_threshold=positive)), loraplus_lr_ratio=positive,
        lr_schedule=st.just("step_decay") if step_decay else st.sampled_from(["cosine_decay", "linear", "constant"]),
        lr_step_size=counts if step_decay else st.none(),
        epochs=counts, max_steps=maybe(counts), learning_rate=st.floats(1e-8, 0.9), weight_decay=amounts,
        capacity_factor=amounts, early_stop_domain=st.sampled_from(["current", *names]), min_improvement=amounts,
        grad_checkpoint=st.booleans(),
    ))  # fmt: skip
    model = draw(st.builds(
        ModelConfig, base=texts.filter(str.strip), dtype=st.sampled_from(["auto", "float32", "bfloat16"]), rank=counts, alpha=positive,
        projections=st.just(drawn_projections), router_layer=st.one_of(st.just("final"), st.integers(0, 40)),
    ))  # fmt: skip
    data = draw(
        st.builds(
            DataConfig,
            max_seq_length=st.integers(16, 9999),
            validation_fraction=shares,
            test_fraction=shares,
            chat_template=maybe(texts.filter(str.strip)),
        )
    )
    log = draw(
        st.builds(
            LogConfig, steps_per_report=counts, wandb=st.sampled_from(["disabled", "offline"]), project_name=texts
        )
    )
    drawn_sources = [draw(sources(name)) for name in names]
    num_skills = draw(st.integers(1, len(drawn_sources)))
    return Config(
        drawn_sources[:num_skills],
        drawn_sources[num_skills:],
        draw(st.integers(0, 2**31 - 1)),
        data,
        model,
        growth,
        training,
        log,
        EvalConfig(draw(maybe(counts)), draw(maybe(counts)), draw(st.booleans())),
    )


def again(config: Config) -> Config:
    """Write a config as a run folder does, and load it."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "config.yaml"
        path.write_text(to_yaml(config), encoding="utf-8")
        return load_config(path)


def differences(one: Any, other: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the options that differ in value or type, by dotted name."""
    differing: dict[str, tuple[Any, Any]] = {}
    for entry in fields(one):
        ours, theirs = getattr(one, entry.name), getattr(other, entry.name)
        if type(ours) is type(theirs) and hasattr(ours, "__dataclass_fields__"):
            differing |= differences(ours, theirs, f"{prefix}{entry.name}.")
        elif type(ours) is not type(theirs) or ours != theirs:
            differing[prefix + entry.name] = (ours, theirs)
    return differing


@settings(deadline=None, derandomize=True, max_examples=10)
@given(configs())
def test_a_config_comes_back_as_it_was(config):
    assert differences(config, again(config)) == {}


@pytest.mark.parametrize("text", ODD)
def test_text_that_looks_like_yaml_stays_text(text):
    source = Source(name="a", source="a.jsonl", contains=text, text=text, subset=text, split=text)
    assert again(Config([source], log=LogConfig(project_name=text))).skills == [source]
