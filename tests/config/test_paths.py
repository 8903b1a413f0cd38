"""Local paths in options: found from the config file's folder, then from the current one, and kept absolute."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from dylora_mlx.cli.options import parse_estimate, parse_plan, parse_train
from dylora_mlx.config import (
    CHAT_TEMPLATES,
    BanditConfig,
    Config,
    DataConfig,
    GrowthConfig,
    ModelConfig,
    RankConfig,
    Source,
    paths,
)
from dylora_mlx.config.load import load_config, to_yaml
from dylora_mlx.data.rendering import BUILTIN_TEMPLATES
from dylora_mlx.errors import UserError

CONFIG = """
skills:
  - {name: notes, source: data/notes.jsonl}
  - {name: shards, source: "data/*.jsonl"}
  - {name: code, source: .}
  - {name: sql, source: packaged/sql}
  - {name: hub, source: OWNER/NAME}
domains: [{name: other, source: ../other.jsonl}]
data: {chat_template: chat.jinja}
model: {base: base}
growth:
  base_skill: {name: python, source: data/notes.jsonl}
  projection: head.safetensors
  threshold: 0.75
  rank: {schedule: ranks.json}
  bandit: {history: [runs, runs/a]}
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A project folder with everything that CONFIG names, beside an empty current folder."""
    project = tmp_path / "project"
    for name in (
        "data/notes.jsonl",
        "chat.jinja",
        "head.safetensors",
        "ranks.json",
        "base/config.json",
        "../other.jsonl",
    ):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).touch()
    (project / "runs/a").mkdir(parents=True)
    (project / "my.yaml").write_text(CONFIG)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return project


def config_of(*argv: str) -> Config:
    config = parse_train(list(argv)).config
    assert config is not None
    return config


def test_paths_of_a_file_are_found_in_its_folder(place):
    config = config_of("--config", "../project/my.yaml")
    assert [skill.source for skill in config.skills] == [
        f"{place}/data/notes.jsonl", f"{place}/data/*.jsonl", str(place), "packaged/sql", "OWNER/NAME",
    ]  # fmt: skip
    assert config.domains[0].source == str(place.parent / "other.jsonl")
    assert (config.data.chat_template, config.model.base) == (f"{place}/chat.jinja", f"{place}/base")
    growth = config.growth
    assert growth.base_skill is not None
    assert growth.base_skill.source == f"{place}/data/notes.jsonl"
    assert (growth.projection, growth.rank.schedule) == (f"{place}/head.safetensors", f"{place}/ranks.json")
    assert growth.bandit.history == [f"{place}/runs", f"{place}/runs/a"]


@pytest.mark.parametrize("parse", [parse_plan, lambda argv: parse_estimate(argv).config])
def test_plan_and_estimate_find_the_same(place, parse):
    assert parse(["../project/my.yaml"]) == config_of("--config", "../project/my.yaml")


def test_the_current_folder_is_the_second_choice(place, monkeypatch):
    (place / "data/notes.jsonl").unlink()
    Path("data").mkdir()
    Path("data/notes.jsonl").touch()
    config = config_of("--config", "../project/my.yaml")
    assert [skill.source for skill in config.skills[:2]] == [
        str(Path("data/notes.jsonl").absolute()), str(Path("data/*.jsonl").absolute()),
    ]  # fmt: skip
    (place / "data/notes.jsonl").touch()
    assert config_of("--config", "../project/my.yaml").skills[0].source == f"{place}/data/notes.jsonl"


@pytest.mark.parametrize(
    "text", ["nosuch.jsonl", "data/nosuch.jsonl", "nosuch", "./no/such", "no/such/*.txt", "../nosuch.csv"]
)
def test_what_is_in_neither_is_named_where_it_was_expected(place, text):
    (place / "my.yaml").write_text(f"skills: [{{name: a, source: '{text}'}}]\n")
    source = config_of("--config", "../project/my.yaml").skills[0].source
    assert source == os.path.normpath(place / text)


@pytest.mark.parametrize("text", ["OWNER/NAME", "OWNER/v1.5", "packaged/nosuch"])
def test_names_on_the_hub_and_in_the_package_stay(place, text):
    (place / "my.yaml").write_text(f"skills: [{{name: a, source: {text}}}]\nmodel: {{base: {text}}}\n")
    config = config_of("--config", "../project/my.yaml")
    assert (config.skills[0].source, config.model.base) == (text, text)


def test_a_folder_that_looks_like_a_hub_id_counts_first(place):
    (place / "OWNER/NAME").mkdir(parents=True)
    assert config_of("--config", "../project/my.yaml").skills[4].source == f"{place}/OWNER/NAME"


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_names_of_chat_templates_stay_even_where_a_folder_is_called_so(place, name):
    (place / name).mkdir()
    config = config_of("--config", "../project/my.yaml", "--data.chat_template", name, "--model.base", "embedded")
    assert (config.data.chat_template, config.model.base) == (name, "embedded")
    (place / "my.yaml").write_text(CONFIG.replace("chat.jinja", name))
    assert config_of("--config", "../project/my.yaml").data.chat_template == name


def test_the_text_of_a_chat_template_stays(place):
    text = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert config_of("--config", "../project/my.yaml", "--data.chat_template", text).data.chat_template == text


def test_the_names_of_templates_are_those_that_there_are():
    assert CHAT_TEMPLATES == BUILTIN_TEMPLATES


def test_options_of_the_command_line_mean_the_current_folder(place):
    for name in ("base", "chat.jinja", "head.safetensors", "ranks.json"):
        Path(name).mkdir()
    here = Path.cwd()
    config = config_of(
        "--config", "../project/my.yaml", "--model.base", "base", "--data.chat_template", "chat.jinja",
        "--growth.projection", "head.safetensors",
        "--growth.threshold", "0.75", "--growth.rank.schedule", "ranks.json", "--growth.bandit.history", "[a]",
        "--growth.base_skill", "{name: x, source: base}", "--skills", "[{name: y, source: nosuch.jsonl}]",
    )  # fmt: skip
    assert (config.model.base, config.data.chat_template) == (f"{here}/base", f"{here}/chat.jinja")
    assert (config.growth.projection, config.growth.rank.schedule) == (f"{here}/head.safetensors", f"{here}/ranks.json")
    assert config.growth.bandit.history == [f"{here}/a"]
    assert config.growth.base_skill is not None
    assert (config.growth.base_skill.source, config.skills[0].source) == (f"{here}/base", f"{here}/nosuch.jsonl")


def test_each_file_has_its_own_folder(place, tmp_path):
    (tmp_path / "second").mkdir()
    (tmp_path / "second/data.txt").touch()
    (tmp_path / "second/more.yaml").write_text("growth: {base_skill: {name: x, source: data.txt}}\n")
    config = config_of("--config", "../project/my.yaml", "--config", "../second/more.yaml")
    assert config.growth.base_skill is not None
    assert config.growth.base_skill.source == f"{tmp_path}/second/data.txt"
    assert config.skills[0].source == f"{place}/data/notes.jsonl"


@pytest.mark.parametrize(("text", "expected"), [
    ("notes.jsonl", "PLACE/notes.jsonl"), ("../project/data", "HOME/project/data"), ("nosuch.jsonl", "PLACE/nosuch.jsonl"),
    ("packaged/sql", "packaged/sql"), ("OWNER/NAME", "OWNER/NAME"), ("*.jsonl", "PLACE/*.jsonl"),
])  # fmt: skip
def test_a_source_of_the_command_line_means_the_current_folder(place, text, expected):
    Path("notes.jsonl").touch()
    expected = expected.replace("PLACE", str(Path.cwd())).replace("HOME", str(place.parent))
    assert paths.resolve_source(Source(name="a", source=text, limit=3)) == Source(name="a", source=expected, limit=3)


def test_the_home_folder(place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    (place / "my.yaml").write_text(
        "skills: [{name: a, source: ~/data/notes.jsonl}, {name: b, source: '~/data/*.jsonl'}]\n"
    )
    config = config_of("--config", "../project/my.yaml", "--model.base", "~/base")
    assert [skill.source for skill in config.skills] == [f"{place}/data/notes.jsonl", f"{place}/data/*.jsonl"]
    assert config.model.base == f"{place}/base"
    (place / "my.yaml").write_text("skills: [{name: a, source: ~nosuchuser/notes.jsonl}]\n")
    assert config_of("--config", "../project/my.yaml").skills[0].source == "~nosuchuser/notes.jsonl"


def test_a_folder_with_signs_of_patterns(place):
    odd = place.parent / "a[b]*"
    place.rename(odd)
    config = config_of("--config", str(odd / "my.yaml"))
    assert config.skills[0].source == f"{odd}/data/notes.jsonl"
    assert config.skills[1].source == f"{place.parent}/a[[]b][*]/data/*.jsonl"


def test_a_parent_of_a_link_is_not_cut_short(place):
    (place / "real/inner").mkdir(parents=True)
    (place / "real/data.jsonl").touch()
    (place / "link").symlink_to(place / "real/inner")
    (place / "my.yaml").write_text(
        "skills: [{name: a, source: link/../data.jsonl}, {name: b, source: data/../chat.jinja}]\n"
    )
    sources = [skill.source for skill in config_of("--config", "../project/my.yaml").skills]
    assert sources == [f"{place}/link/../data.jsonl", f"{place}/chat.jinja"]


def test_a_run_folders_config_is_read_as_it_is(place):
    """Runs of version 0.1.0 have relative paths, which mean the current folder."""
    path = place / "config.yaml"
    path.write_text(CONFIG)
    config = load_config(path)
    assert (config.skills[0].source, config.model.base) == ("data/notes.jsonl", "base")
    path.write_text(to_yaml(config_of("--config", "../project/my.yaml")))
    assert load_config(path) == config_of("--config", "../project/my.yaml")


def test_a_config_made_in_python(place, monkeypatch):
    monkeypatch.chdir(place)
    growth = GrowthConfig(
        base_skill=None,
        projection="head.safetensors",
        threshold=0.75,
        rank=RankConfig(schedule="ranks.json"),
        bandit=BanditConfig(["runs"]),
    )
    config = Config(
        [Source(name="notes", source="data/notes.jsonl", limit=3)], [Source(name="sql", source="packaged/sql")],
        data=DataConfig(chat_template="chat.jinja"), model=ModelConfig(base="base"), growth=growth,
    )  # fmt: skip
    resolved = paths.resolve_config(config)
    assert resolved.skills == [Source(name="notes", source=f"{place}/data/notes.jsonl", limit=3)]
    assert resolved.domains == config.domains
    assert (resolved.model.base, resolved.data.chat_template) == (f"{place}/base", f"{place}/chat.jinja")
    assert resolved.growth == replace(
        growth, projection=f"{place}/head.safetensors", rank=RankConfig(schedule=f"{place}/ranks.json"),
        bandit=BanditConfig([f"{place}/runs"]),
    )  # fmt: skip
    monkeypatch.chdir("/")
    assert paths.resolve_config(resolved) == resolved


def test_machines_may_keep_files_in_different_folders(place):
    one = config_of("--config", "../project/my.yaml")
    moved = place.rename(place.parent / "moved")
    other = config_of("--config", str(moved / "my.yaml"))
    assert one != other
    assert paths.without_folders(replace(one, skills=[one.skills[0]])) == paths.without_folders(
        replace(other, skills=[other.skills[0]])
    )
    assert paths.without_folders(one)["model"]["base"] == "base"
    assert paths.without_folders(one)["skills"][3]["source"] == "packaged/sql"


@pytest.mark.parametrize("options", [
    "skills: [{name: a, source: 3}]", "skills: [{name: a, source: [b]}]", "skills: [3]", "model: {base: [a]}",
    "growth: {bandit: {history: a}}", "growth: {bandit: 3}", "growth: {base_skill: text}", "data: {chat_template: {a: b}}",
])  # fmt: skip
def test_values_of_a_wrong_type_are_refused_as_before(place, options):
    (place / "my.yaml").write_text(options)
    with pytest.raises(UserError) as raised:
        parse_train(["--config", str(place / "my.yaml")])
    assert str(raised.value).startswith(str(place / "my.yaml"))
    assert "\n" not in str(raised.value)
