"""Write docs/reference.md from the package: every option of a config, every command with its options, the forms of data.

    python tools/dev/write_reference.py            writes docs/reference.md
    python tools/dev/write_reference.py --check    says in one line if it is stale, and exits 1

Options come from the config's dataclasses, commands from their own parsers, not from help as it is laid out.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import lru_cache
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from dylora_mlx import __main__
from dylora_mlx.assets import packaged_skills
from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.config import Config, Source
from dylora_mlx.config.options import Option, Section, sections, type_name
from dylora_mlx.config.yaml_files import CONFIG_FOLDERS
from dylora_mlx.data import skills

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "reference.md"
HEAD = """# Reference

Written by `python tools/dev/write_reference.py` from the package itself; do not edit.

An option `section.name` stands in a YAML file as `section: {name: value}`, and on the command line with two dashes before it; the
command line wins. `python -m dylora_mlx.train --print_config` prints a whole config. [concepts.md](concepts.md) explains the
words.
"""
FORMS = """## Forms of data

How a record becomes a document, the first that fits: the source's `prompt` and `completion`; its `text`; the chat in its `messages`
column, or in one of that name; columns `prompt` and `completion`; a column `text`. Learned are completions, assistant turns and plain
text; with `mask_prompt: false` the rest too. In a template `{column}` stands for that column, a list being joined by line breaks.
"""
NOTES = {
    "train": "All options of a config, and these:",
    "plan": "All options of a config, and this:",
    "estimate": "All options of a config, and these; or a run folder, `--quiet` and `--json` alone:",
    "add": "All options of a source, and these:",
}


class Parsed(BaseException):
    """A command has come to its parser: nothing of it ran. parser: what reads its options."""

    def __init__(self, parser: argparse.ArgumentParser):
        super().__init__()
        self.parser = parser


@contextmanager
def stopped(parse: bool) -> Iterator[None]:
    """Commands end by `Parsed` when they parse. parse: after they have read their options; else before."""

    def stopping(read: Callable[..., Any]) -> Callable[..., Any]:
        def parse_args(self: argparse.ArgumentParser, *args: Any, **named: Any) -> Any:
            if parse:
                read(self, *args, **named)
            raise Parsed(self)

        return parse_args

    with patch.object(argparse.ArgumentParser, "parse_args", stopping(argparse.ArgumentParser.parse_args)):
        yield


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of a command of `dylora`."""
    try:
        with stopped(parse=False):
            import_module(f"dylora_mlx.{command.replace('-', '_')}").main([])
    except Parsed as found:
        return found.parser
    raise RuntimeError(f"dylora {command} did not come to a parser")


@lru_cache
def options() -> dict[str, Option]:
    """Every option of a config by its full name."""
    return {option.name: option for section in sections(Config) for option in section.options}


def table(names: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = [names, tuple("---" for _ in names), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines) + "\n"


def section(title: str, of: Section) -> str:
    """A section of the page, of these options."""
    rows = [
        (f"`{o.name}`", type_name(o.type), "must be given" if o.default is None else f"`{o.default}`", o.help)
        for o in of.options
    ]
    return f"## {title}\n\n{inspect.getdoc(of.type)}\n\n{table(('option', 'type', 'default', 'what it does'), rows)}"


def actions(command: str) -> list[tuple[str, ...]]:
    """The options of a command's own, not those of a config or source: name, what it takes, default, help."""
    shared = {"train": Config, "plan": Config, "estimate": Config, "add": Source}.get(command)
    elsewhere = {f"--{e.name}" for e in fields(shared)} - {"--name"} if shared else set()
    rows = []
    for action in parser_of(command)._actions:
        word = action.option_strings[0] if action.option_strings else ""
        if word.split(".")[0] in elsewhere or word in ("-h", "--print_config") or action.help == argparse.SUPPRESS:
            continue
        metavar = str(action.metavar or action.dest.replace("_", "-"))
        name = ", ".join(f"`{word}`" for word in action.option_strings) or f"`{metavar.upper()}`"
        many = " ..." if action.nargs in ("+", "*") else ""
        takes = ", ".join(map(str, action.choices)) if action.choices else "" if action.nargs == 0 else metavar
        given = action.default not in (None, [], argparse.SUPPRESS) and action.nargs != 0
        default = "must be given" if action.required else f"`{action.default}`" if given else ""
        rows.append((name, f"{takes}{many}", default, " ".join(str(action.help or "").split())))
    return rows


def commands() -> dict[str, str]:
    """What each command of `dylora` is for, as `dylora --help` says it."""
    found = dict(re.findall(r"^  ([a-z-]+) {2,}(.+)$", __main__.USAGE, re.M))
    if set(found) != set(__main__.COMMANDS):
        raise RuntimeError(f"dylora --help does not tell of {', '.join(set(__main__.COMMANDS) ^ set(found))}")
    return found


def command_sections() -> str:
    rows: list[tuple[str, ...]] = [(f"`dylora {name}`", what) for name, what in commands().items()]
    said = [f"## Commands\n\n{table(('command', 'what it does'), rows)}"]
    for name in commands():
        said.append(f"### dylora {name}\n")
        if name in NOTES:
            said.append(f"{NOTES[name]}\n")
        said.append(table(("option", "takes", "default", "what it does"), actions(name)))
    return "\n".join(said)


def data_section() -> str:
    presets = [(f"`{name}`", *(f"`{parts[p]!r}`" for p in parts)) for name, parts in skills.PRESETS.items()]
    shipped = sorted(path for folder in CONFIG_FOLDERS for path in folder.glob("*.yaml"))
    configs = [(f"`{path.stem}`", _opening(path)) for path in shipped]
    suffixes = ", ".join(f"`{suffix}`" for suffix in sorted(skills.TEXT_SUFFIXES))
    return "\n".join((
        FORMS,
        f"Presets set the templates of two data sets:\n\n{table(('preset', 'prompt', 'completion'), presets)}",
        f"A folder without `train.jsonl` is read as text files: {suffixes}.\n",
        f"Packaged skills: {', '.join(f'`packaged/{name}`' for name in sorted(packaged_skills()))}.\n",
        f"## Shipped configs\n\n`--config NAME` takes these by name:\n\n{table(('config', 'what it is'), configs)}",
    ))  # fmt: skip


def _opening(path: Path) -> str:
    """The comment that a config begins with."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return " ".join(line.lstrip("# ") for line in lines)


def reference() -> str:
    """The whole page."""
    parts = [section(of.prefix.rstrip(".") or "The whole config", of) for of in sections(Config)]
    parts.append(section("source: an entry of skills and of domains", sections(Source)[0]))
    return "\n".join((HEAD, *parts, data_section(), command_sections()))


def command(argv: list[str]) -> int:
    parser = Parser("python tools/dev/write_reference.py", __doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is stale")
    asked = parser.parse_args(argv)
    page = reference()
    if not asked.check:
        OUT.write_text(page, encoding="utf-8")
        return 0
    if OUT.is_file() and OUT.read_text(encoding="utf-8") == page:
        return 0
    print(f"{OUT.relative_to(ROOT)} is stale: run python tools/dev/write_reference.py", file=sys.stderr)
    return 1


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
