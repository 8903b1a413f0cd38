"""What the documentation holds that can be checked: its code blocks, the commands in them, and what stands in backticks. And how
a command is run or parsed in this process."""

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

from dylora_mlx.cli.options import parse_add, parse_estimate, parse_plan, parse_train
from tests.exporting.mixtures import tool

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
reference = tool("write_reference")
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.M | re.S)
_SPAN = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")


class Block(NamedTuple):
    """A fenced block of a page: the line it begins in, its language (empty for none) and its text."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{named(self.page)}:{self.line}"


class Command(NamedTuple):
    """The words of one command, and the file that is piped into it."""

    words: list[str]
    piped: str | None = None

    def __str__(self) -> str:
        return shlex.join(self.words)


class Program(NamedTuple):
    """A module with a main, or a script below the repository's root; and its arguments."""

    name: str
    argv: list[str]


def blocks(language: str, pages: list[Path] | None = None) -> list[Block]:
    """All blocks of a language, page by page."""
    found = []
    for page in PAGES if pages is None else pages:
        text = page.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            if match[2] == language:
                found.append(Block(page, text[: match.start()].count("\n") + 1, language, match[3]))
    return found


def commands(text: str) -> list[Command]:
    """The commands of a block, in order. Raises ValueError for what a test cannot follow."""
    found: list[Command] = []
    for line in text.replace("\\\n", " ").splitlines():
        reader = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        reader.whitespace_split, piped, words = True, None, []
        for token in [*reader, "&&"]:
            if token == "|":
                if words[0] != "cat" or len(words) != 2:
                    raise ValueError(f"{line}: only cat FILE can be piped into a command here")
                piped, words = words[1], []
            elif token in ("&&", ";"):
                found += [Command(words, piped)] if words else []
                piped, words = None, []
            elif set(token) & set("&|;<>"):
                raise ValueError(f"{line}: {token} cannot be followed here")
            else:
                words.append(token)
    return found


def program(words: list[str]) -> Program | None:
    """What a command starts, if that is Python of ours or of mlx-lm."""
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
    if "-m" in rest:  # a launcher before our command
        return program(["python", *rest[rest.index("-m") :]])
    return None


def named(path: Path) -> str:
    """A file as the repository knows it."""
    return path.relative_to(ROOT).as_posix()


def spans(page: Path) -> list[str]:
    """What stands in backticks in a page's running text, line breaks as blanks."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(found.split()) for found in _SPAN.findall(text)]


def call(program: Program) -> int:
    """Run a program in this process, as if from a shell; return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program.name, *program.argv])
        try:
            if program.name.endswith(".py"):
                runpy.run_path(str(ROOT / program.name), run_name="__main__")
                return 0
            return import_module(program.name).main() or 0
        except SystemExit as left:
            return left.code if isinstance(left.code, int) else int(left.code is not None)


def parse(program: Program) -> None:
    """Read a program's options and nothing else. Raises UserError or SystemExit for what it does not take."""
    name, argv = program.name.removeprefix("dylora_mlx."), program.argv
    if name == "__main__":
        name, argv = (argv[0], argv[1:]) if argv else ("", [])
    readers: dict[str, Callable] = {
        "train": parse_train,
        "plan": parse_plan,
        "estimate": parse_estimate,
        "add": parse_add,
    }
    if {"-h", "--help"} & set(argv):
        raise SystemExit(call(program))
    if name in readers:
        readers[name](argv)
        return
    with contextlib.suppress(reference.Parsed), reference.stopped(parse=True):
        raise SystemExit(call(program))


def options(program: Program) -> set[str]:
    """The options that a program's parser takes; none if it has no parser."""
    try:
        with reference.stopped(parse=False):
            call(program)
    except reference.Parsed as parsed:
        return set(parsed.parser._option_string_actions)
    return set()
