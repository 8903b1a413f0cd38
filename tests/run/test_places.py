"""A run works from any folder: its paths are absolute, and a file of the same name elsewhere is not taken for its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

import dylora_mlx
from dylora_mlx import add, evaluate, export, generate, train
from dylora_mlx.config import Config, DataConfig, GrowthConfig, ModelConfig, Source, TrainingConfig
from tests.run import homes


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a project and its finished run, trained from a third folder."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "elsewhere").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "elsewhere")
        homes.trained(homes.project(folder / "home"))
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    """The current folder: another one, in which files of the run's names hold other texts."""
    (tmp_path / "here/data").mkdir(parents=True)
    for name in ("letters", "digits", "signs"):
        text = json.dumps({"text": "#" * 40}) + "\n"
        (tmp_path / f"here/data/{name}.jsonl").write_text(text * 50)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_a_run_keeps_absolute_paths(made):
    config = yaml.safe_load((made / "run/config.yaml").read_text())
    assert [source["source"] for source in config["skills"] + config["domains"]] == [
        f"{made}/home/data/{name}.jsonl" for name in ("letters", "digits", "signs")
    ]
    assert config["model"]["base"] == f"{made}/home/base"
    assert json.loads((made / "run/run.json").read_text())["base"] == f"{made}/home/base"


def test_evaluate_from_another_folder(made, place):
    assert evaluate.main([str(made / "run"), "--json", "losses.json"]) == 0
    losses, expected = (
        json.loads(Path("losses.json").read_text()),
        json.loads((made / "run/results.json").read_text())["test"],
    )
    assert losses.keys() == expected.keys() == {"letters", "digits", "other"}
    for name, loss in losses.items():
        assert loss["base"] == pytest.approx(expected[name]["base"], abs=1e-4)
        assert loss["mixture"] == pytest.approx(expected[name]["mixture"], abs=1e-4)


def test_a_path_beside_evaluate_means_the_current_folder(made, place):
    assert evaluate.main([str(made / "run"), "--data", "new=data/letters.jsonl", "--json", "losses.json"]) == 0
    losses = json.loads(Path("losses.json").read_text())
    assert losses["new"]["base"] != pytest.approx(losses["letters"]["base"], abs=0.05)


def test_a_name_of_the_run_may_be_given_to_another_source(made, place):
    """Which was asked for, so its records are not compared with the run's."""
    argv = [str(made / "run"), "--data", "letters=data/letters.jsonl", "--data", "new=data/letters.jsonl"]
    assert evaluate.main([*argv, "--json", "losses.json"]) == 0
    losses = json.loads(Path("losses.json").read_text())
    assert losses["letters"] == losses["new"]


@pytest.mark.parametrize("folder", ["here", ".."])
def test_resume_from_another_folder(made, place, monkeypatch, folder):
    interrupted = homes.interrupt(made / "run", place.parent / "interrupted")
    if folder == "..":
        monkeypatch.chdir("..")
    name = "../interrupted" if folder == "here" else "interrupted"
    assert train.main(["--resume", name, "--quiet"]) == 0
    assert homes.same_bits(interrupted, made / "run")


def test_add_from_another_folder(made, place):
    shutil.copytree(made / "run", place / "run")
    lines = (made / "home/data/signs.jsonl").read_text().splitlines()
    Path("data/mine.jsonl").write_text("\n".join(lines[1:]) + "\n")
    assert add.main(["run", "data/mine.jsonl", "--name", "mine", "--quiet"]) == 0
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config["skills"][-1]["source"] == f"{place}/data/mine.jsonl"
    assert (place / "run/data/mine.npz").is_file()
    before, after = homes.arrays(made / "run"), homes.arrays(Path("run"))
    assert all((after[name] == value).all() for name, value in before.items() if "expert_" in name)


def test_generate_and_export_from_another_folder(made, place, capsys):
    assert generate.main([str(made / "run"), "--prompt", "abab", "--max-tokens", "2"]) == 0
    assert export.main([str(made / "run"), "--out", "peft"]) == 0
    card = json.loads(Path("peft/expert_1/adapter_config.json").read_text())
    assert card["base_model_name_or_path"] == f"{made}/home/base"


def test_a_config_made_in_python(made, place, monkeypatch):
    """Its paths mean the current folder, and the run can be used from any."""
    monkeypatch.chdir(made / "home")
    config = Config(
        [Source(name="letters", source="data/letters.jsonl")], data=DataConfig(max_seq_length=64), model=ModelConfig(base="base"),
        growth=GrowthConfig(base_skill=None, policy="threshold"), training=TrainingConfig(max_steps=1),
    )  # fmt: skip
    run = dylora_mlx.learn(config, "one", runs_folder=place, quiet=True)
    assert run.config.skills[0].source == f"{made}/home/data/letters.jsonl"
    monkeypatch.chdir("/")
    assert run.losses().keys() == {"letters"}
    again = run.add_skill(f"{made}/home/data/digits.jsonl", "digits", quiet=True)
    assert [skill.name for skill in again.config.skills] == ["letters", "digits"]


def test_add_skill_means_the_current_folder(made, place):
    shutil.copytree(made / "run", place / "run")
    shutil.copy(made / "home/data/signs.jsonl", "mine.jsonl")
    run = dylora_mlx.load("run").add_skill("mine.jsonl", "mine", quiet=True)
    assert run.config.skills[-1].source == f"{place}/mine.jsonl"


def test_a_moved_run_works(made, place, monkeypatch):
    """Data and base stay where they are."""
    shutil.copytree(made / "run", place / "moved")
    monkeypatch.chdir(place.parent)
    assert dylora_mlx.load("here/moved").losses() == dylora_mlx.load(made / "run").losses()
