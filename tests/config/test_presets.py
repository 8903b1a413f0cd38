"""Presets: the size of a base, and defaults that lie below config files and the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dylora_mlx import assets
from dylora_mlx.cli.options import parse_plan, parse_train
from dylora_mlx.config import TrainingConfig
from dylora_mlx.config.load import load_config, to_yaml
from dylora_mlx.config.presets import PRESETS, preset_for
from dylora_mlx.errors import UserError

GEMMA_270M = {"hidden_size": 640, "num_hidden_layers": 18, "intermediate_size": 2048, "vocab_size": 262144}
LLAMA_3B = {"hidden_size": 3072, "num_hidden_layers": 28, "intermediate_size": 8192, "vocab_size": 128256}
PLAIN = TrainingConfig().learning_rate
SMALL = PRESETS["small"].options["training.learning_rate"]


def folder(path: Path, args: dict) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(args))
    return str(path)


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("embedded", "tiny"),
        (str(assets.BASE), "tiny"),
        ("google/gemma-3-270m", "small"),
        ("mlx-community/Qwen3-0.6B-4bit", "small"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "small"),
        ("meta-llama/Llama-3.2-1B", "small"),
        ("Qwen/Qwen3-1.7B", "large"),
        ("google/gemma-3-4b-it", "large"),
        ("someone/model", "small"),
        ("nowhere/at/all", "small"),
    ],
)
def test_the_size_of_a_base(base, expected):
    assert preset_for(base) == expected
    assert preset_for(base, "large") == "large"


def test_the_size_of_a_local_base_is_counted(tmp_path):
    assert preset_for(folder(tmp_path / "a-7b", GEMMA_270M)) == "small", "the folder's name does not count"
    assert preset_for(folder(tmp_path / "b", LLAMA_3B)) == "large"
    assert preset_for(folder(tmp_path / "c", {"text_config": LLAMA_3B})) == "large"
    assert preset_for(folder(tmp_path / "model-3b", {"hidden_size": "many"})) == "large", "by its name, if damaged"
    gguf = tmp_path / "x.gguf"
    gguf.write_bytes(b"GGUF")
    assert preset_for(str(gguf)) == "tiny"


def rate(*words: str) -> float:
    return parse_train(["--config", "quickstart", *words]).config.training.learning_rate


def test_a_preset_lies_below_the_command_line_and_the_files(tmp_path):
    own = tmp_path / "own.yaml"
    assert rate() == PLAIN
    assert rate("--model.base", "google/gemma-3-270m") == SMALL != PLAIN
    assert rate("--model.base", "google/gemma-3-270m", "--training.learning_rate", "0.005") == 0.005
    assert rate("--model.base", "google/gemma-3-270m", "--model.preset", "tiny") == PLAIN
    own.write_text("model: {base: google/gemma-3-270m}\ntraining: {epochs: 3}\n")
    assert rate("--config", str(own)) == SMALL
    assert rate("--config", str(own), "--model.base", "embedded") == PLAIN
    own.write_text("model: {base: google/gemma-3-270m, preset: large}\n")
    assert rate("--config", str(own)) == PRESETS["large"].options["training.learning_rate"]
    own.write_text("model: {base: google/gemma-3-270m}\ntraining: {learning_rate: 0.01}\n")
    assert rate("--config", str(own)) == 0.01
    assert parse_plan(["--config", "quickstart", "--model.base", "google/gemma-3-270m"]).training.learning_rate == SMALL


def test_a_stored_config_keeps_its_values(tmp_path):
    """A run folder holds every option, so a later change of a preset does not reach an existing run."""
    config = parse_train(["--config", "quickstart", "--model.base", "google/gemma-3-270m"]).config
    stored = tmp_path / "config.yaml"
    stored.write_text(to_yaml(config).replace(f"learning_rate: {SMALL}", "learning_rate: 0.007", 1))
    assert load_config(stored).training.learning_rate == 0.007


def test_every_preset_names_options_that_exist():
    for preset in PRESETS.values():
        for name, value in preset.options.items():
            words = ["--config", "quickstart", f"--{name}", str(value)]
            assert parse_train(words).config is not None


@pytest.mark.parametrize("text", ["model: {base: 3}\n", "model: {preset: [small]}\n", "model: {preset: huge}\n"])
def test_wrong_values_are_named_by_the_check_of_options(tmp_path, text):
    own = tmp_path / "own.yaml"
    own.write_text(text)
    with pytest.raises(UserError, match=r"own\.yaml, line 1: model"):
        rate("--config", str(own))
