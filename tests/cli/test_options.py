"""The command line: configs by name and path, overrides, the run folder, resuming, help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dylora_mlx import __main__, train
from dylora_mlx.cli.options import TrainOptions, parse_add, parse_train
from dylora_mlx.cli.parser import run_command
from dylora_mlx.config import Config, ModelConfig, Source, yaml_files
from dylora_mlx.config.load import config_from_files, load_config, to_yaml
from dylora_mlx.errors import UserError

MINIMAL = "skills:\n  - {name: some, source: some.jsonl}\n"


def config_of(*argv: str) -> Config:
    """Return the config that these arguments give."""
    config = parse_train(list(argv)).config
    assert config is not None
    return config


@pytest.fixture
def minimal(tmp_path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


def test_without_arguments_the_quickstart_runs():
    options = parse_train([])
    assert options.folder == Path("runs/quickstart")
    assert not options.resume
    assert options.config == config_from_files([yaml_files.CONFIG_FOLDERS[1] / "quickstart.yaml"], {})
    assert [skill.name for skill in options.config.skills] == ["requests", "flask", "requests_more", "stripe", "sql"]


@pytest.mark.parametrize("form", [["--config", "seed-poc"], ["--config=seed-poc"]])
def test_a_shipped_config_by_name(form):
    options = parse_train(form)
    assert options.folder == Path("runs/seed-poc")
    assert options.config == config_from_files([yaml_files.CONFIG_FOLDERS[1] / "seed-poc.yaml"], {})


@pytest.mark.parametrize("name", ["plain.yaml", "a=b.yaml", "with space.yaml", "a b/c=d e.yaml"])
@pytest.mark.parametrize("joined", [True, False])
def test_a_config_by_path(tmp_path, name, joined):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(MINIMAL)
    options = parse_train(([f"--config={path}"] if joined else ["--config", str(path)]) + ["--seed", "3"])
    assert options.config == Config(skills=[Source(name="some", source=str(path.parent / "some.jsonl"))], seed=3)
    assert options.folder == Path("runs") / path.stem


def test_options_override_the_config_from_either_side(minimal):
    for argv in (["--config", str(minimal), "--model.rank", "4"], ["--model.rank=4", "--config", str(minimal)]):
        assert [skill.name for skill in config_of(*argv).skills] == ["some"]
    assert config_of("--config", str(minimal), "--model.rank", "4").model == ModelConfig(rank=4)


def test_overrides_of_every_kind(minimal):
    config = config_of(
        "--config", str(minimal), "--seed=7", "--model.router_layer", "3", "--model.projections", "[q_proj, up_proj]",
        "--training.learning_rate", "1e-4", "--training.max_steps", "5", "--training.grad_checkpoint", "true",
        "--growth.base_skill", "null", "--log.wandb", "offline", "--data.max_seq_length", "64",
    )  # fmt: skip
    assert (config.seed, config.model.router_layer, config.model.projections) == (7, 3, ["q_proj", "up_proj"])
    assert (config.training.learning_rate, config.training.max_steps, config.training.grad_checkpoint) == (
        1e-4,
        5,
        True,
    )
    assert (config.growth.base_skill, config.log.wandb, config.data.max_seq_length) == (None, "offline", 64)


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
def test_run_names_that_are_no_folder_name_are_refused(name):
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
def test_resume_takes_no_other_option(argv):
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
    ("text", "message"),
    [
        ("training: {epoch: 1}", "one.yaml, line 2: training.epoch: no such option; did you mean training.epochs?"),
        ("training:\n  patience: 3\n  epochs: -1", "one.yaml, line 4: training.epochs: -1 is not at least 1"),
        ("growth:\n  rank:\n    start: x", "one.yaml, line 4: "),
        ("train ing: {epochs: 1}", "one.yaml, line 2: train ing: no such option; did you mean training?"),
        ("training: {patience: 3}", "two.yaml, line 2: "),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_line(tmp_path, text, message):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(f"skills: [{{name: some, source: some.jsonl}}]\n{text}\n")
    two.write_text("training:\n  patience: no\n" if "two" in message else "training: {grad_accumulation_steps: 1}\n")
    with pytest.raises(UserError) as raised:
        parse_train(["--config", str(one), "--config", str(two)])
    assert str(raised.value).startswith(f"{tmp_path}/{message}")


def test_a_mistake_on_the_command_line_names_no_file(minimal):
    minimal.write_text(f"{MINIMAL}training: {{epochs: 2}}\n")
    with pytest.raises(UserError) as raised:
        parse_train(["--config", str(minimal), "--training.epochs", "-1"])
    assert str(raised.value) == "training.epochs: -1 is not at least 1"


def test_help_explains_the_options(capsys):
    with pytest.raises(SystemExit) as exit_info:
        train.main(["--help"])
    output = capsys.readouterr().out
    assert exit_info.value.code == 0
    assert "Rank r of a new expert." in output
    assert "Tokens in one packed row" in output
    assert any(
        line.startswith("  python -m dylora_mlx.train --resume runs/quickstart ") for line in output.splitlines()
    )


def test_the_parsed_config_can_be_printed(capsys):
    with pytest.raises(SystemExit) as exit_info:
        train.main(["--model.rank", "5", "--print_config"])
    assert exit_info.value.code == 0
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
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert completed.stdout.startswith("usage: python -m dylora_mlx.train")
    assert completed.stdout.splitlines()[-1] == "0"


def test_a_user_error_is_one_line(capsys):
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
    captured = capsys.readouterr()
    assert captured.out.startswith("usage: dylora COMMAND")
    assert "train" in captured.out


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
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert completed.stdout.startswith("usage: python -m dylora_mlx.train")
    assert completed.stdout.splitlines()[-1] == "0"


@pytest.mark.parametrize(
    ("text", "patterns"),
    [
        ("*.py", ["*.py"]),
        ("docs/**", ["docs/**"]),
        ("!*.md", ["!*.md"]),
        ("a, b", ["a, b"]),
        ("['*.py', 'docs/**']", ["*.py", "docs/**"]),
        ("[src]", ["src"]),
        ("null", None),
    ],
)
def test_patterns_on_the_command_line(text, patterns):
    for option in ("include", "exclude"):
        _, source, _ = parse_add(["runs/my", "folder", "--name", "s", f"--{option}", text])
        assert getattr(source, option) == patterns


def test_patterns_on_the_command_line_that_are_none():
    for text in ("[*.py]", "[1]", "[]", "../x"):
        with pytest.raises(UserError, match="include"):
            parse_add(["runs/my", "folder", "--name", "s", "--include", text])


def test_help_with_a_mistake_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dylora", "train", "--config", "nosuch", "--help"])
    assert __main__.main() == 2
    assert capsys.readouterr().err.startswith("error: nosuch: no such config file")


def test_the_dylora_command_refuses_unknown_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dylora", "fly"])
    assert __main__.main() == 2
    assert capsys.readouterr().err.startswith("error: no command 'fly'")


def test_a_renamed_command_is_one_line_with_the_new_name(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dylora", "text-base", "folder", "--out", "made"])
    assert __main__.main() == 2
    assert capsys.readouterr().err == "error: text-base is now called convert-base (see dylora --help)\n"


def test_the_dylora_command_passes_the_rest_to_train(monkeypatch):
    calls = []
    monkeypatch.setattr(train, "main", lambda argv: calls.append(argv) or 7)
    monkeypatch.setattr(sys, "argv", ["dylora", "train", "--seed", "1"])
    assert __main__.main() == 7
    assert calls == [["--seed", "1"]]
