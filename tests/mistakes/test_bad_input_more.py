"""Unavailable bases on the hub, config sections of the wrong type, abbreviated options, and null options in a run's config.yaml."""

from __future__ import annotations

from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from dylora_mlx import train
from dylora_mlx.cli.options import parse_train
from dylora_mlx.config.load import load_config, to_yaml
from dylora_mlx.run import loop

RESPONSE = SimpleNamespace(headers={}, request=None, status_code=401)
SKILL = "skills: [{name: sql, source: packaged/sql}]\n"


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """A function that runs train, checks the form of its error, and returns the error line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "train_stream", lambda run: pytest.fail("nothing was refused"))

    def run(*argv: str) -> str:
        before = set(tmp_path.rglob("*"))
        assert train.main(list(argv)) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert (error.count("\n"), error[-1]) == (1, "\n")
        assert set(tmp_path.rglob("*")) == before
        return error

    return run


HUB = [
    (GatedRepoError("401\nlog in", response=RESPONSE), ["is gated", "accept its licence", "hf auth login"]),
    (RepositoryNotFoundError("404\nno", response=RESPONSE), ["no such model on the hub", "check the name"]),
    (ConnectionError("no route\nto host"), ["cannot be downloaded (no route)", "check the connection"]),
    (TimeoutError(), ["cannot be downloaded (TimeoutError)", "local path in model.base"]),
]


@pytest.mark.parametrize(("failure", "words"), HUB, ids=["gated", "unknown", "unreachable", "silent"])
def test_hub_base(refused, monkeypatch, failure, words):
    requested = []

    def fail(name, **options):
        requested.append(name)
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    error = refused("--model.base", "google/gemma-3-270m")
    assert requested == ["google/gemma-3-270m"]
    assert all(word in error for word in ("google/gemma-3-270m: ", *words)), error


SHAPES = [
    (SKILL + "training: 3\n", "training: '3' should be options"),
    (SKILL + "training:\n", "training: 'None' should be options"),
    (SKILL + "model: [rank]\n", "model: '['rank']' should be options"),
    (SKILL + "model: gemma\n", "model: 'gemma' should be options"),
    ("skills: 3\n", "skills: should be a list"),
    ("skills: sql\n", "skills: should be a list"),
    ("skills: {name: sql, source: packaged/sql}\n", "skills: should be a list"),
]


@pytest.mark.parametrize(("text", "message"), SHAPES)
def test_section_of_the_wrong_shape(refused, tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    assert f"mine.yaml: {message}" in refused("--config", "mine.yaml")


@pytest.mark.parametrize("argv", [["--resum", "runs/a"], ["--training.epoch", "3"], ["--conf", "seed-poc"]])
def test_options_cannot_be_abbreviated(refused, argv):
    error = refused(*argv)
    assert "unrecognized arguments" in error
    assert argv[0] in error


@pytest.mark.parametrize("argv", [["--resume="], ["--resume", ""]])
def test_resume_of_an_empty_name(refused, argv):
    assert "--resume takes one run folder" in refused(*argv)


def test_saved_config_keeps_what_is_null(tmp_path):
    """A run without a base skill must not get the default one when it is resumed."""
    options = parse_train(["--growth.base_skill", "null", "--training.learning_rate", "1e-5"])
    assert options.config is not None
    assert options.config.growth.base_skill is None
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(options.config))
    assert load_config(saved) == options.config
