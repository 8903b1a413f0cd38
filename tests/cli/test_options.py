"""The command line: configs by name and path, overrides, the run's folder, resuming, help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dylora_mlx import __main__, train
from dylora_mlx.cli.options import TrainOptions, parse_train
from dylora_mlx.cli.parser import run_command
from dylora_mlx.config import Config, ModelConfig, Source, yaml_files
from dylora_mlx.config.load import load_config, to_yaml
from dylora_mlx.errors import UserError

MINIMAL = "skills:\n  - {name: some, source: some.jsonl}\n"


def config_of(*argv: str) -> Config:
    made = parse_train(list(argv)).config
    assert made is not None
    return made


@pytest.fixture
def minimal(tmp_path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


def test_without_arguments_the_quickstart_runs():
    options = parse_train([])
    assert options.folder == Path("runs/quickstart")
    assert not options.resume
    assert options.config == load_config(yaml_files.CONFIG_FOLDERS[1] / "quickstart.yaml")
    assert [skill.name for skill in options.config.skills] == ["requests", "flask", "requests_more", "stripe", "sql"]


@pytest.mark.parametrize("form", [["--config", "seed-poc"], ["--config=seed-poc"]])
def test_a_shipped_config_by_name(form):
    options = parse_train(form)
    assert options.folder == Path("runs/seed-poc")
    assert options.config == load_config(yaml_files.CONFIG_FOLDERS[1] / "seed-poc.yaml")


@pytest.mark.parametrize("name", ["plain.yaml", "a=b.yaml", "with space.yaml", "a b/c=d e.yaml"])
@pytest.mark.parametrize("joined", [True, False])
def test_a_config_by_path(tmp_path, name, joined):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(MINIMAL)
    options = parse_train(([f"--config={path}"] if joined else ["--config", str(path)]) + ["--seed", "3"])
    assert options.config == Config(skills=[Source(name="some", source="some.jsonl")], seed=3)
    assert options.folder == Path("runs") / path.stem


def test_options_override_the_config_from_either_side(minimal):
    for argv in (["--config", str(minimal), "--model.rank", "4"], ["--model.rank=4", "--config", str(minimal)]):
        assert [skill.name for skill in config_of(*argv).skills] == ["some"]
    assert config_of("--config", str(minimal), "--model.rank", "4").model == ModelConfig(rank=4)


def test_overrides_of_every_kind(minimal):
    made = config_of(
        "--config", str(minimal), "--seed=7", "--model.router_layer", "3", "--model.projections", "[q_proj, up_proj]",
        "--training.learning_rate", "1e-4", "--training.max_steps", "5", "--training.grad_checkpoint", "true",
        "--growth.base_skill", "null", "--log.wandb", "offline", "--data.max_seq_length", "64",
    )  # fmt: skip
    assert (made.seed, made.model.router_layer, made.model.projections) == (7, 3, ["q_proj", "up_proj"])
    assert (made.training.learning_rate, made.training.max_steps, made.training.grad_checkpoint) == (1e-4, 5, True)
    assert (made.growth.base_skill, made.log.wandb, made.data.max_seq_length) == (None, "offline", 64)


def test_later_configs_override_earlier_ones(minimal):
    options = parse_train(["--config", "seed-poc", "--config", str(minimal)])
    assert options.config is not None
    assert ([skill.name for skill in options.config.skills], options.folder.name) == (["some"], "minimal")
    assert options.config.growth.threshold == 0.85
    options = parse_train(["--config", str(minimal), "--config", "quickstart"])
    assert options.config is not None
    assert (len(options.config.skills), options.folder.name) == (5, "quickstart")


def test_the_run_folder(minimal, tmp_path):
    assert parse_train(["--config", str(minimal)]).folder == Path("runs/minimal")
    assert parse_train(["--config", str(minimal), "--name", "second"]).folder == Path("runs/second")
    assert parse_train(["--runs", str(tmp_path), "--name=a b"]).folder == tmp_path / "a b"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\\b", "a\nb", "a\0b", "a" * 300, "é" * 120])
def test_names_that_are_no_folder(name):
    with pytest.raises(UserError, match="a plain folder name is needed"):
        parse_train(["--name", name])


def test_the_written_config_gives_the_same_run(minimal, tmp_path):
    options = parse_train(
        ["--config", str(minimal), "--seed", "5", "--model.router_layer", "2", "--name", "x", "--runs", "y"]
    )
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(options.config))
    assert load_config(path) == options.config
    assert not {"config", "name", "runs", "resume"} & {
        line.split(":")[0] for line in to_yaml(options.config).splitlines()
    }


@pytest.mark.parametrize("form", [["--resume", "runs/a=b c"], ["--resume=runs/a=b c"]])
def test_resume_takes_a_folder(form):
    assert parse_train(form) == TrainOptions(None, Path("runs/a=b c"), True)


@pytest.mark.parametrize(
    "argv",
    [
        ["--resume"],
        ["--resume", "--seed"],
        ["--resume", "runs/a", "--seed", "1"],
        ["--seed", "1", "--resume", "runs/a"],
        ["--resume=runs/a", "--name", "b"],
        ["--name", "b", "--resume=runs/a"],
        ["--config", "quickstart", "--resume", "runs/a"],
        ["--resume", "runs/a", "--resume", "runs/b"],
    ],
)
def test_resume_takes_nothing_else(argv):
    with pytest.raises(UserError, match="--resume takes one run folder and no other option"):
        parse_train(argv)


def test_a_broken_config_of_a_run_is_named(tmp_path):
    path = tmp_path / "config.yaml"
    for text in ("skills: [", "skills: []", "nosuch: 1", ""):
        path.write_text(text)
        with pytest.raises(UserError) as raised:
            load_config(path)
        assert str(raised.value).startswith((f"{path}: ", f"{path}, line 1: "))
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training: {epoch: 1}", "one.yaml, line 2: training.epoch: no such option; did you mean training.epochs?"),
        ("training:\n  patience: 3\n  epochs: -1", "one.yaml, line 4: training.epochs: -1 is not at least 1"),
        ("growth:\n  rank:\n    start: x", "one.yaml, line 4: "),
        ("train ing: {epochs: 1}", "one.yaml, line 2: train ing: no such option; did you mean training?"),
        ("training: {patience: 3}", "two.yaml, line 2: "),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_line(tmp_path, text, said):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(f"skills: [{{name: some, source: some.jsonl}}]\n{text}\n")
    two.write_text("training:\n  patience: no\n" if "two" in said else "training: {grad_accumulation_steps: 1}\n")
    with pytest.raises(UserError) as raised:
        parse_train(["--config", str(one), "--config", str(two)])
    assert str(raised.value).startswith(f"{tmp_path}/{said}")


def test_a_mistake_on_the_command_line_is_no_files(minimal):
    minimal.write_text(f"{MINIMAL}training: {{epochs: 2}}\n")
    with pytest.raises(UserError) as raised:
        parse_train(["--config", str(minimal), "--training.epochs", "-1"])
    assert str(raised.value) == "training.epochs: -1 is not at least 1"


def test_help_explains_the_options(capsys):
    with pytest.raises(SystemExit) as left:
        train.main(["--help"])
    shown = capsys.readouterr().out
    assert left.value.code == 0
    assert "Rank r of a new expert." in shown
    assert "Tokens in one packed row" in shown
    assert any(line.startswith("  python -m dylora_mlx.train --resume runs/quickstart ") for line in shown.splitlines())


def test_the_parsed_config_can_be_printed(capsys):
    with pytest.raises(SystemExit) as left:
        train.main(["--model.rank", "5", "--print_config"])
    assert left.value.code == 0
    assert "  rank: 5\n" in capsys.readouterr().out


def test_help_of_the_module_loads_nothing_heavy():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['train', '--help']\n"
        "try:\n"
        "    runpy.run_module('dylora_mlx.train', run_name='__main__')\n"
        "except SystemExit as left:\n"
        "    print(left.code, *(name for name in ('datasets', 'wandb') if name in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m dylora_mlx.train")
    assert done.stdout.splitlines()[-1] == "0"


def test_main_turns_a_users_mistake_into_one_line(capsys):
    def work(argv):
        raise UserError(f"wrong {argv[0]}\n  and more")

    assert run_command(work, ["x"]) == 2
    assert capsys.readouterr().err == "error: wrong x and more\n"


def test_an_interrupt_ends_quietly(capsys):
    def work(argv):
        raise KeyboardInterrupt

    assert run_command(work, []) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_defect_keeps_its_traceback():
    def work(argv):
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        run_command(work, [])


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["-h"], 0), (["--help"], 0)])
def test_the_dylora_command_lists_its_commands(monkeypatch, capsys, argv, code):
    monkeypatch.setattr(sys, "argv", ["dylora", *argv])
    assert __main__.main() == code
    shown = capsys.readouterr()
    assert shown.out.startswith("usage: dylora COMMAND")
    assert "train" in shown.out


def test_help_of_the_dylora_command_needs_no_mlx():
    code = (
        "import sys\n"
        "from dylora_mlx import __main__\n"
        "sys.argv = ['dylora', 'train', '--help']\n"
        "try:\n"
        "    __main__.main()\n"
        "except SystemExit as left:\n"
        "    print(left.code, *(name for name in ('mlx.core', 'numpy', 'rich') if name in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m dylora_mlx.train")
    assert done.stdout.splitlines()[-1] == "0"


def test_help_beside_a_mistake_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dylora", "train", "--config", "nosuch", "--help"])
    assert __main__.main() == 2
    assert capsys.readouterr().err.startswith("error: nosuch: no such config file")


def test_the_dylora_command_refuses_other_words(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dylora", "fly"])
    assert __main__.main() == 2
    assert capsys.readouterr().err.startswith("error: no command 'fly'")


def test_the_dylora_command_hands_the_rest_to_train(monkeypatch):
    given = []
    monkeypatch.setattr(train, "main", lambda argv: given.append(argv) or 7)
    monkeypatch.setattr(sys, "argv", ["dylora", "train", "--seed", "1"])
    assert __main__.main() == 7
    assert given == [["--seed", "1"]]
