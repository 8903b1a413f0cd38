"""The checkable parts of the documentation (code blocks, the commands in them, inline code), and running or parsing a command.

Commands are run and parsed in this process.
"""

from __future__ import annotations

import contextlib
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

from dylora_mlx.cli import introspect
from dylora_mlx.cli.options import parse_add, parse_estimate, parse_plan, parse_train
from tests.exporting.mixtures import tool

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
reference = tool("write_reference")
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.M | re.S)
_SPAN = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")


class Block(NamedTuple):
    """A fenced code block of a page."""

    page: Path
    line: int
    """Number of its first line."""
    language: str
    """Empty if none is given."""
    text: str

    def __str__(self) -> str:
        return f"{relative_path(self.page)}:{self.line}"


class Command(NamedTuple):
    """One shell command."""

    words: list[str]
    piped: str | None = None
    """File that `cat` pipes into it."""

    def __str__(self) -> str:
        return shlex.join(self.words)


class Program(NamedTuple):
    """A Python program and its arguments."""

    name: str
    """A module with a `main`, or the path of a script in the repository."""
    argv: list[str]


def blocks(language: str, pages: list[Path] | None = None) -> list[Block]:
    """Return all blocks of a language, page by page."""
    matching = []
    for page in PAGES if pages is None else pages:
        text = page.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            if match[2] == language:
                matching.append(Block(page, text[: match.start()].count("\n") + 1, language, match[3]))
    return matching


def commands(text: str) -> list[Command]:
    """Return the commands of a block, in order. Raises ValueError for shell syntax that the tests do not support."""
    parsed: list[Command] = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split, piped, words = True, None, []
        for token in [*lexer, "&&"]:
            if token == "|":
                if words[0] != "cat" or len(words) != 2:
                    raise ValueError(f"{line}: only cat FILE may be piped into a command")
                piped, words = words[1], []
            elif token in ("&&", ";"):
                parsed += [Command(words, piped)] if words else []
                piped, words = None, []
            elif set(token) & set("&|;<>"):
                raise ValueError(f"{line}: {token} is not supported here")
            else:
                words.append(token)
    return parsed


def program(words: list[str]) -> Program | None:
    """Return the program that a command starts, if it belongs to this repository or to mlx-lm; else None."""
    first, *rest = words
    if first == "dylora":
        return Program("dylora_mlx.__main__", rest)
    if first.startswith("mlx_lm."):
        return Program(first, rest)
    if first in ("python", "python3") and rest[:2] == ["-m", "mlx_lm"]:
        return Program(f"mlx_lm.{rest[2]}", rest[3:])
    if first in ("python", "python3") and rest[:1] == ["-m"]:
        name = "dylora_mlx.__main__" if rest[1] == "dylora_mlx" else rest[1]
        return Program(name, rest[2:]) if name.startswith("dylora_mlx.") else None
    if first in ("python", "python3") and rest[0].startswith(("tools/", "tests/stress/")):
        return Program(rest[0], rest[1:])
    if "-m" in rest:  # a launcher (mlx.launch) before the command
        return program(["python", *rest[rest.index("-m") :]])
    return None


def relative_path(path: Path) -> str:
    """Return the path of a file relative to the repository."""
    return path.relative_to(ROOT).as_posix()


def spans(page: Path) -> list[str]:
    """Return the inline code spans of a page's running text; line breaks become blanks."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(span.split()) for span in _SPAN.findall(text)]


def call(program: Program) -> int:
    """Run a program in this process, as from a shell; return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program.name, *program.argv])
        try:
            if program.name.endswith(".py"):
                runpy.run_path(str(ROOT / program.name), run_name="__main__")
                return 0
            return import_module(program.name).main() or 0
        except SystemExit as exit_info:
            return exit_info.code if isinstance(exit_info.code, int) else int(exit_info.code is not None)


def parse(program: Program) -> None:
    """Parse a program's options without running it. Raises UserError or SystemExit if it does not accept them."""
    name, argv = program.name.removeprefix("dylora_mlx."), program.argv
    if name == "__main__":
        name, argv = (argv[0], argv[1:]) if argv else ("", [])
    parsers: dict[str, Callable] = {
        "train": parse_train,
        "plan": parse_plan,
        "estimate": parse_estimate,
        "add": parse_add,
    }
    if {"-h", "--help"} & set(argv):
        raise SystemExit(call(program))
    if name in parsers:
        parsers[name](argv)
        return
    with contextlib.suppress(introspect.Parsed), introspect.stopped(parse=True):
        raise SystemExit(call(program))


def options(program: Program) -> set[str]:
    """Return the options that a program accepts; empty if it has no parser."""
    try:
        with introspect.stopped(parse=False):
            call(program)
    except introspect.Parsed as parsed:
        return set(parsed.parser._option_string_actions)
    return set()
