"""`dylora completion` and `dylora --version`: what a shell offers, and that every command's help ends with examples that parse."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module

import pytest

import dylora_mlx
from dylora_mlx import __main__, completion
from dylora_mlx.cli import introspect
from dylora_mlx.cli.commands import COMMANDS, module_of
from dylora_mlx.config import Config
from dylora_mlx.config.options import sections
from tests.docs import documents

OFFER = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMPREPLY=()
_shtab_dylora dylora "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """A folder with the script of each shell, named after it."""
    pytest.importorskip("shtab")
    folder = tmp_path_factory.mktemp("completion")
    import shtab

    root = completion.root_parser(shtab.FILE)
    for shell in completion.SHELLS:
        (folder / shell).write_text(shtab.complete(root, shell))
    return folder


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["tra"], ["train"]),
        (["imp"], ["import-expert", "import-run"]),
        (["--ver"], ["--version"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["train", "--training.ep"], ["--training.epochs"]),
        (["train", "--model.preset", ""], ["auto", "tiny", "small", "large"]),
        (["plan", "--growth.split", ""], ["true", "false"]),
        (["data", "--preset", "m"], ["mbpp"]),
        (["export", "runs/quickstart", "--format", "x"], ["xlora"]),
        (["train", "--config", "my."], ["my.yaml"]),
        (["explain", "no"], ["notes"]),
    ],
)
def test_bash_offers_what_a_command_takes(scripts, tmp_path, words, offered):
    bash = shutil.which("bash")
    if bash is None or subprocess.run([bash, "-c", "(( BASH_VERSINFO[0] >= 4 ))"]).returncode:
        pytest.skip("needs bash 4 or newer")
    (tmp_path / "my.yaml").touch()
    (tmp_path / "notes").mkdir()
    argv = [bash, "-c", OFFER, "bash", str(scripts / "bash"), "dylora", *words]
    completed = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert completed.stdout.split() == offered


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_a_script_has_every_command_and_option(scripts, shell):
    script = (scripts / shell).read_text()
    options = [option.name for section in sections(Config) for option in section.options]
    assert not [name for name in COMMANDS if name not in script]
    assert not [name for name in options if name not in script]


def test_the_command_prints_the_script(scripts, capsys):
    assert completion.main(["fish"]) == 0
    assert capsys.readouterr().out == (scripts / "fish").read_text() + "\n"


def test_without_shtab_one_line_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert completion.main(["bash"]) == 2
    error = capsys.readouterr().err
    assert error == "error: completion needs the package shtab: pip install 'dylora-mlx[completion]'\n"


def test_a_command_that_parses_nothing_is_named():
    with pytest.raises(RuntimeError, match="test_completion did not call parse_args"):
        introspect.parser_of(lambda argv: 0)


def test_the_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dylora", "--version"])
    assert __main__.main() == 0
    assert capsys.readouterr().out == f"dylora {dylora_mlx.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_examples_that_parse(name, tmp_path, monkeypatch):
    """The last lines of a command's help are commands, each with an explanation after two blanks or more, or none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", None)
    shutil.copytree(documents.ROOT / "configs", "configs")
    (tmp_path / "my.yaml").write_text("skills: [{name: notes, source: notes.jsonl}]")
    heading, *lines = str(introspect.parser_of(import_module(module_of(name)).main).epilog).strip("\n").splitlines()
    assert heading == "examples:"
    assert lines
    for line in lines:
        assert re.match(r"  \S", line), line
        without_explanation = re.sub(r"(?<=\S) {2,}.*", "", line.strip())
        piped = re.split(r" [|>] ", without_explanation)
        words = shlex.split(piped[1] if piped[0].startswith("cat ") else piped[0])
        program = documents.program([word for word in words if not word.startswith("DYLORA_API_KEY=")])
        assert program is not None, line
        documents.parse(program)
