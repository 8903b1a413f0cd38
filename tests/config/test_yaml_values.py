"""Values and keys of YAML configs: numbers are decimal, words stay words, and nothing is lost silently."""

from __future__ import annotations

import datetime
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

from dylora_mlx.cli.options import parse_add, parse_train
from dylora_mlx.config import Config
from dylora_mlx.config.load import load_config, to_yaml
from dylora_mlx.errors import UserError
from dylora_mlx.reporting import records
from dylora_mlx.system import yaml_loader
from dylora_mlx.system.files import parse_yaml
from dylora_mlx.system.yaml_loader import PlainText, RepeatedKeyError, SafeLoader

SKILL = "skills: [{name: a, source: packaged/sql}]\n"
HOME = Path(__file__).parents[1]


def config_of(*argv: str) -> Config:
    config = parse_train(list(argv)).config
    assert config is not None
    return config


def from_file(tmp_path: Path, option: str, value: str) -> Config:
    """The config of a file that gives one option."""
    section, name = option.split(".")
    path = tmp_path / "my.yaml"
    path.write_text(f"{SKILL}{section}: {{{name}: {value}}}\n")
    return config_of("--config", str(path))


def from_entry(tmp_path: Path, option: str, value: str) -> Any:
    """An option of a skill, given in the skill's entry."""
    path = tmp_path / "my.yaml"
    path.write_text(f"skills:\n  - name: a\n    source: packaged/sql\n    {option}: {value}\n")
    return getattr(config_of("--config", str(path)).skills[0], option)


def refusal(function, *arguments) -> str:
    with pytest.raises(UserError) as raised:
        function(*arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


WHOLE = [("010", 10), ("08", 8), ("0010", 10), ("+10", 10), ("+010", 10), ("1_000", 1000), ("10", 10)]
FRACTIONS = [
    ("1e-5", 1e-5), ("1E-5", 1e-5), ("1e-05", 1e-5), ("1.5e-4", 1.5e-4), ("1.5e-04", 1.5e-4), (".5e-3", 5e-4), ("00.5", 0.5),
    (".5", 0.5), ("+.5", 0.5), ("5.0e-01", 0.5), ("1_0e-5", 1e-4), ("0.000_5", 5e-4),
]  # fmt: skip
YES = [(form, word in ("yes", "on", "true")) for word in ("yes", "no", "on", "off", "true", "false")
       for form in (word, word.capitalize(), word.upper())]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), WHOLE)
def test_whole_numbers_are_decimal(tmp_path, text, value):
    made = [from_file(tmp_path, "training.epochs", text).training.epochs, from_entry(tmp_path, "limit", text)]
    made.append(config_of("--training.epochs", text).training.epochs)
    made.append(config_of(f"--training.epochs={text}").training.epochs)
    made.append(parse_add(["run", "packaged/sql", "--name", "a", "--limit", text])[1].limit)
    assert made == [value] * 5
    assert {type(found) for found in made} == {int}
    assert config_of("--model.router_layer", text).model.router_layer == value
    assert from_file(tmp_path, "model.alpha", text).model.alpha == value


@pytest.mark.parametrize(("text", "value"), FRACTIONS)
def test_numbers_with_a_fraction_stay_numbers(tmp_path, text, value):
    assert from_file(tmp_path, "training.learning_rate", text).training.learning_rate == value
    assert config_of("--training.learning_rate", text).training.learning_rate == value
    assert from_entry(tmp_path, "alpha", text) == value


@pytest.mark.parametrize(("text", "value"), YES)
def test_a_boolean_has_the_words_of_yaml(tmp_path, text, value):
    assert from_file(tmp_path, "training.grad_checkpoint", text).training.grad_checkpoint is value
    assert config_of("--training.grad_checkpoint", text).training.grad_checkpoint is value
    assert from_entry(tmp_path, "mask_prompt", text) is value


WORDS = ("yes", "No", "on", "OFF", "010", "08", "1:30", "1:30:00", "1:30.5", "0x10", "0o10", "1_000", "+1", "1e3", "1.5e3", "2024-01-31",
         "2024-01-31 12:00:00", "=", "<<", "y", "3.10.1")  # fmt: skip


@pytest.mark.parametrize("text", WORDS)
@pytest.mark.parametrize("option", ["contains", "split", "subset", "messages"])
def test_words_are_text_where_text_is_wanted(tmp_path, text, option):
    found = from_entry(tmp_path, option, text)
    assert (found, type(found)) == (text, str)


@pytest.mark.parametrize("text", ["no", "010", "2024-01-31"])
def test_words_are_names(tmp_path, text):
    path = tmp_path / "my.yaml"
    path.write_text(f"skills: [{{name: {text}, source: packaged/sql}}]\ntraining: {{early_stop_domain: {text}}}\n")
    config = config_of("--config", str(path), "--growth.base_skill", f"{{name: on, source: {text}}}")
    assert (config.skills[0].name, config.training.early_stop_domain) == (text, text)
    assert config.growth.base_skill is not None
    assert config.growth.base_skill.name == "on"
    assert Path(config.growth.base_skill.source).name == text  # a local path may be made absolute


WRONG = [
    ("training.epochs", "1:30", "'1:30' should be int"),
    ("training.epochs", "0x10", "'0x10' should be int; in decimal it is 16"),
    ("training.epochs", "0o10", "'0o10' should be int; in decimal it is 8"),
    ("training.epochs", "-0b11", "'-0b11' should be int; in decimal it is -3"),
    ("training.epochs", "'010'", "'010' should be int; leave out the quotes"),
    ("training.epochs", "'10'", "'10' should be int; leave out the quotes"),
    ("training.epochs", "1__0", "'1__0' should be int"),
    ("training.epochs", "yes", "'yes' should be int"),
    ("training.epochs", "1e3", "'1e3' should be int"),
    ("training.epochs", "\u0661\u0660", "'\u0661\u0660' should be int"),
    ("training.epochs", "0" * 5000, f"'{'0' * 77}...' should be int"),
    ("training.epochs", "2024-01-31", "'2024-01-31' should be int"),
    ("training.max_steps", "1:30", "'1:30' should be int or null"),
    ("training.learning_rate", "1:30.5", "'1:30.5' should be float"),
    ("training.learning_rate", "0x1", "'0x1' should be float; in decimal it is 1"),
    ("training.learning_rate", "'0.5'", "'0.5' should be float; leave out the quotes"),
    ("training.grad_checkpoint", "'yes'", "'yes' should be bool; leave out the quotes"),
    ("training.grad_checkpoint", "y", "'y' should be bool"),
    ("training.grad_checkpoint", "1", "'1' should be bool"),
    ("model.router_layer", "0x1", "'0x1' should be int or final; in decimal it is 1"),
    ("log.wandb", "off", "'off' should be one of disabled, offline, online"),
    ("log.wandb", "no", "'no' should be one of disabled, offline, online"),
    ("model.projections", "on", "'on' should be list of str or all-linear"),
]


@pytest.mark.parametrize(("option", "text", "message"), WRONG)
def test_another_value_is_refused_as_it_was_written(tmp_path, option, text, message):
    assert refusal(from_file, tmp_path, option, text) == f"{tmp_path}/my.yaml, line 2: {option}: {message}"
    assert refusal(config_of, f"--{option}={text}") == f"{option}: {message}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [("42", "42"), ("3.10", "3.1"), ("true", "true"), ("[a]", '["a"]'), ("{content}", '{"content": null}')],
)
def test_a_value_that_is_no_text_is_refused_with_the_remedy(tmp_path, text, shown):
    message = refusal(from_entry, tmp_path, "contains", text)
    assert message.endswith(f"skills.contains: '{shown}' should be str or null; put it in quotes if it is text")
    assert from_entry(tmp_path, "contains", f"'{text}'") == text


TWICE = [
    ("training: {epochs: 1}\n" + SKILL + "training:\n  patience: 2\n", "lines 1 and 3", "training"),
    (SKILL + "seed: 1\n# a comment\nseed: 1\n", "lines 2 and 4", "seed"),
    (SKILL + SKILL, "lines 1 and 2", "skills"),
    (SKILL + "training:\n  epochs: 1\n  patience: 2\n  epochs: 3\n", "lines 3 and 5", "training.epochs"),
    (SKILL + "growth:\n  rank:\n    max: 4\n  top_k: 1\n  rank:\n    max: 8\n", "lines 3 and 6", "growth.rank"),
    (SKILL + "growth:\n  rank:\n    max: 4\n    max: 4\n", "lines 4 and 5", "growth.rank.max"),
    (SKILL + "training: {epochs: 1, epochs: 2}\n", "line 2", "training.epochs"),
    (SKILL + "training: {epochs: 1,\n  'epochs': 2}\n", "lines 2 and 3", "training.epochs"),
    ("skills:\n- name: a\n  source: b\n  limit: 4\n  limit: 5\n", "lines 4 and 5", "skills.limit"),
    ("skills:\n- {name: a, source: b}\n- name: c\n  name: d\n  source: e\n", "lines 3 and 4", "skills.name"),
    (
        SKILL + "growth:\n  base_skill:\n    name: a\n    source: b\n    name: c\n",
        "lines 4 and 6",
        "growth.base_skill.name",
    ),
    (SKILL + "nosuch: [[{x: [{y: 1, y: 2}]}]]\n", "line 2", "nosuch.x.y"),
    ('{"skills": [],\n "seed": 1,\n "seed": 2}\n', "lines 2 and 3", "seed"),
    (SKILL + "seed: 1\nseed: 2\nseed: 3\n", "lines 2 and 3", "seed"),
    ("a: &a {x: 1}\nb: &b {y: 1}\nc:\n  <<: *a\n  <<: *b\n", "lines 4 and 5", "c.<<"),
]


@pytest.mark.parametrize(("text", "lines", "name"), TWICE)
def test_a_key_that_is_there_twice_is_refused_with_both_lines(tmp_path, text, lines, name):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    for read in (lambda: config_of("--config", str(path)), lambda: load_config(path)):
        message = refusal(read)
        assert message.startswith(f"{path}, {lines}: {name} is given twice; ")
        assert message.endswith(("keep one", "put its options under one"))


def test_sections_that_are_there_twice_belong_together(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("training: {epochs: 1}\n" + SKILL + "training: {patience: 2}\n")
    assert refusal(load_config, path).endswith("training is given twice; put its options under one")
    path.write_text(SKILL + "seed: 1\nseed: 2\n")
    assert refusal(load_config, path).endswith("seed is given twice; keep one")


def test_on_the_command_line_and_in_a_change_too(tmp_path):
    text = "{name: a, source: b, name: c}"
    assert (
        refusal(config_of, "--growth.base_skill", text) == f"--growth.base_skill {text}: name is given twice; keep one"
    )
    path = tmp_path / "config.yaml"
    path.write_text(SKILL)
    assert refusal(load_config, path, [f"growth.base_skill={text}"]).endswith("name is given twice; keep one")
    assert load_config(path, ["training.epochs=010"]).training.epochs == 10


def test_keys_that_only_look_as_if_they_were_there_twice(tmp_path):
    """The same name in other mappings, a merged key that is overridden, an anchor that is used twice, and two files."""
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(
        "training: &first {epochs: 3}\n"
        "skills:\n"
        "- &a {name: a, source: b, limit: 4}\n"
        "- {<<: *a, name: c, limit: 5}\n"
        "- {<<: [*a], name: d}\n"
        "growth: {base_skill: {<<: *a, name: e}, rank: {max: 2}}\n"
        "model: {rank: 2}\n"
    )
    two.write_text("training: {epochs: 4}\n")
    config = config_of("--config", str(one), "--config", str(two), "--model.rank", "3")
    assert [(skill.name, skill.limit) for skill in config.skills] == [("a", 4), ("c", 5), ("d", 4)]
    assert (config.training.epochs, config.model.rank, config.growth.rank.max) == (4, 3, 2)


def test_a_merge_of_a_merge_is_not_a_repeated_key():
    """Construction flattens merges, so a mapping may have a key twice by then."""
    text = "x: {y: {z: &a {<<: &b {k: 1}, k: 2}}}\nc: {<<: *a, k: 3}\nd: {<<: *b}\n"
    assert parse_yaml(text) == {"x": {"y": {"z": {"k": 2}}}, "c": {"k": 3}, "d": {"k": 1}}


def test_a_key_in_a_deep_or_wide_text_is_found():
    with pytest.raises(RepeatedKeyError, match=r"^\.\.\..*a\.a\.a\.b is given twice; keep one$"):
        parse_yaml("{a: " * 150 + "{b: 1, b: 2}" + "}" * 150)
    with pytest.raises(RepeatedKeyError) as raised:
        parse_yaml("".join(f"k{number}: {number}\n" for number in range(30_000)) + "k7: 1\n")
    assert raised.value.lines == "lines 8 and 30001"
    with pytest.raises(RepeatedKeyError) as raised:
        parse_yaml(f"{'k' * 900}: 1\n{'k' * 900}: 1\n")
    assert len(str(raised.value)) < 250


def test_pyyaml_without_its_loader_in_c_reads_the_same(monkeypatch):
    """It lacks that loader where it was built without libyaml."""
    monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    spec = importlib.util.spec_from_file_location("yaml_loader_in_python", yaml_loader.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert issubclass(module.SafeLoader, yaml.SafeLoader)
    text = "a: [010, '010', yes, 1.5, 2001-01-01, ~, true, <<]\nb: |\n  x\nc: {<<: {d: 1}, d: 08}\n"
    expected = {"a": ["010", "010", "yes", 1.5, "2001-01-01", None, True, "<<"], "b": "x\n", "c": {"d": "08"}}
    for loader, plain in ((module.SafeLoader, module.PlainText), (SafeLoader, PlainText)):
        found = yaml.load(text, loader)
        assert found == expected
        assert [isinstance(item, plain) for item in found["a"][:3]] == [True, False, True]
        with pytest.raises(ValueError, match="d is given twice"):
            yaml.load("{d: 1, d: 2}", loader)


VALUES = [
    *WORDS, "null", "~", "true", "", " ", "-.5", "+.5", "00", "0b1", "-0x1f", "1__0", "9_9", "190:20:30", "08:15", ".inf", "+.inf", ".NaN",
    "-", "0.", "1.e5", "1e5", "a: b", "!!int 3", "&a", "-1", "+12", "0o7", "0777", "0888",
    0, -1, 10**30, 1.0, -0.5, 1e-5, 1.5e-300, 1e22, 5e-324, float("inf"), True, False, None, datetime.date(2001, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES)
def test_what_pyyaml_writes_is_read_as_it_was(value):
    """Run folders were written by PyYAML, whose words are those of YAML 1.1."""
    found = parse_yaml(yaml.safe_dump({"a": [value], value: 1}))
    if isinstance(value, datetime.date):  # no option is one; a word as any other
        value = str(value)
    assert found == {"a": [value], value: 1}
    assert isinstance(found["a"][0], type(value))


@pytest.mark.parametrize("path", sorted(HOME.glob("runs/**/config.yaml")), ids=lambda path: path.parent.name)
def test_configs_of_stored_runs_are_read_as_they_were(path, tmp_path):
    config = load_config(path)
    again = tmp_path / "config.yaml"
    again.write_text(to_yaml(config))
    assert load_config(again) == config
    assert parse_yaml(path.read_text()) == yaml.safe_load(path.read_text())


@pytest.mark.parametrize(
    ("text", "value"),
    [("!!int 010", 10), ("!!str 010", "010"), ("!!bool yes", True), ("!!float 1", 1.0), ("!!int '1_0'", 10)],
)
def test_a_type_that_is_stated(text, value):
    assert parse_yaml(text) == value


@pytest.mark.parametrize("text", ["!!int 0x10", "!!int 1:30", "!!float 1:30", "!!int x"])
def test_a_type_that_is_stated_wrongly(text):
    with pytest.raises(ValueError, match="a value that is none"):
        parse_yaml(text)


def test_a_report_of_a_run_does_not_need_its_config(tmp_path):
    """A run whose config was edited by hand, with a key twice, still has a report."""
    (tmp_path / "config.yaml").write_text("seed: 1\nseed: 2\n")
    assert records.read_records(tmp_path).options == {}
