"""Print the script that completes commands, options and their values in a shell."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from dylora_mlx.cli.commands import COMMANDS, module_of
from dylora_mlx.cli.introspect import parser_of
from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.config import Config, Source
from dylora_mlx.config.options import sections
from dylora_mlx.errors import UserError

SHELLS = ["bash", "zsh", "fish"]
PATHS = {"config", "resume", "run", "runs", "source", "what"}
"""Arguments that are read as text although their values are mostly paths."""
EXAMPLES = """\
  dylora completion bash > ~/.local/share/bash-completion/completions/dylora
  dylora completion zsh > ~/.zfunc/_dylora           with fpath+=~/.zfunc before compinit in ~/.zshrc
  dylora completion fish > ~/.config/fish/completions/dylora.fish
"""


def command(argv: list[str]) -> int:
    parser = Parser("dylora completion", __doc__, EXAMPLES)
    parser.add_argument("shell", choices=SHELLS, help="shell to print the script for")
    options = parser.parse_args(argv)
    try:
        import shtab
    except ImportError as error:
        raise UserError("completion needs the package shtab: pip install 'dylora-mlx[completion]'") from error
    print(shtab.complete(root_parser(shtab.FILE), options.shell))
    return 0


def root_parser(file_completer: Any) -> argparse.ArgumentParser:
    """Return one parser with every command as a subcommand, for completion alone.

    Args:
        file_completer: what an argument is marked with whose values are paths.
    """
    root = argparse.ArgumentParser("dylora", description="Teach a small language model one skill after another.")
    root.add_argument("--version", action="store_true", help="print the version")
    commands = root.add_subparsers()
    values = option_values()
    for name, description in COMMANDS.items():
        parser = parser_of(import_module(module_of(name)).main)
        for action in parser._actions:
            # Config options take any text, which is checked later; here their words are wanted.
            option = action.option_strings[-1].removeprefix("--") if action.option_strings else action.dest
            if action.choices is None and option in values:
                action.choices = values[option]
            elif action.choices is None and (action.type is Path or option in PATHS):
                action.complete = file_completer  # type: ignore[attr-defined]
        commands.add_parser(name, help=description, parents=[parser], add_help=False, conflict_handler="resolve")
    return root


def option_values() -> dict[str, list[str]]:
    """Return the words that an option takes, by its full name, for those that take no other values."""
    values: dict[str, list[str]] = {}
    for kind in (Config, Source):
        for option in (option for section in sections(kind) for option in section.options):
            kinds = get_args(option.type) if get_origin(option.type) is not Literal else (option.type,)
            kinds = [each for each in (kinds or (option.type,)) if each is not type(None)]
            if all(each is bool or get_origin(each) is Literal for each in kinds):
                words = [word for each in kinds for word in (get_args(each) or ("true", "false"))]
                values[option.name] = [str(word) for word in words]
    return values


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
