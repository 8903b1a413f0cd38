"""Write docs/reference.md from the package: every option of a config, every command with its options, the forms of data.

    python tools/write_reference.py            writes docs/reference.md
    python tools/write_reference.py --check    says in one line if it is stale, and exits 1

Options come from the config's dataclasses, commands from their own parsers, not from help as it is laid out.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import lru_cache
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints
from unittest.mock import patch

import jsonargparse
import yaml

from dylora_mlx import __main__ as words
from dylora_mlx.assets import packaged_skills
from dylora_mlx.cli import CONFIGS
from dylora_mlx.config import Config, Source
from dylora_mlx.data import skills

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "reference.md"
HEAD = """# Reference

Written by `python tools/write_reference.py` from the package itself; do not edit.

An option `section.name` stands in a YAML file as `section: {name: value}`, and on the command line with two dashes before it; the
command line wins. `python -m dylora_mlx.train --print_config` prints a whole config. [concepts.md](concepts.md) explains the
words.
"""
FORMS = """## Forms of data

How a record becomes a document, the first that fits: the source's `prompt` and `completion`; its `text`; the chat in its `messages`
column, or in one of that name; columns `prompt` and `completion`; a column `text`. Learned are completions, assistant turns and plain
text; with `completion_only: false` the rest too. In a template `{column}` stands for that column, a list being joined by line breaks.
"""
NOTES = {"train": "All options of a config, and these:", "add": "All options of a source, and these:"}


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

    with ExitStack() as stack:
        for kind in (argparse.ArgumentParser, jsonargparse.ArgumentParser):
            stack.enter_context(patch.object(kind, "parse_args", stopping(kind.parse_args)))
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
def sections(kind: type = Config, prefix: str = "") -> dict[str, type]:
    """The config's dataclasses by the prefix of their options; the entries of its lists are left out."""
    found = {prefix: kind}
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint) and isinstance(hint, type):
            found |= sections(hint, f"{prefix}{name}.")
    return found


@lru_cache
def options() -> dict[str, Field]:
    """Every option of a config by its full name."""
    return {
        f"{prefix}{entry.name}": entry
        for prefix, kind in sections().items()
        for entry in fields(kind)
        if not is_dataclass(get_type_hints(kind)[entry.name])
    }


@lru_cache
def docstrings(kind: type) -> dict[str, str]:
    """What a dataclass says under each of its fields."""
    made = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(made, ast.ClassDef)
    found = {}
    for entry, after in zip(made.body, made.body[1:], strict=False):
        if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name) and isinstance(after, ast.Expr):
            assert isinstance(after.value, ast.Constant)
            found[entry.target.id] = " ".join(str(after.value.value).split())
    return found


def type_of(kind: type, name: str) -> str:
    """A field's type in words: `int or null`, `one of a, b`."""

    def said(hint: Any) -> str:
        if get_origin(hint) is Literal:
            values = [str(value) for value in get_args(hint)]
            return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
        if get_origin(hint) is list:
            return f"list of {said(get_args(hint)[0])}"
        if get_args(hint):
            return " or ".join(said(part) for part in get_args(hint))
        return "null" if hint is type(None) else "source" if hint is Source else hint.__name__

    return said(get_type_hints(kind)[name])


def default_of(entry: Field) -> str:
    """A field's default as YAML has it; empty for one that must be given."""
    if entry.default is MISSING and entry.default_factory is MISSING:
        return "must be given"
    value = entry.default if entry.default_factory is MISSING else entry.default_factory()
    if isinstance(value, Source):
        value = {e.name: of for e in fields(Source) if (of := getattr(value, e.name)) != e.default}
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{yaml.safe_dump(value, default_flow_style=True, sort_keys=False).strip().removesuffix('...').strip()}`"


def table(names: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = [names, tuple("---" for _ in names), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines) + "\n"


def section(title: str, prefix: str, kind: type) -> str:
    said, hints = docstrings(kind), get_type_hints(kind)
    plain = [entry for entry in fields(kind) if not is_dataclass(hints[entry.name])]
    rows = [(f"`{prefix}{e.name}`", type_of(kind, e.name), default_of(e), said[e.name]) for e in plain]
    return f"## {title}\n\n{inspect.getdoc(kind)}\n\n{table(('option', 'type', 'default', 'what it does'), rows)}"


def actions(command: str) -> list[tuple[str, ...]]:
    """The options of a command's own, not those of a config or source: name, what it takes, default, help."""
    shared = {"train": Config, "add": Source}.get(command)
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
    found = dict(re.findall(r"^  ([a-z-]+) {2,}(.+)$", words.USAGE, re.M))
    if set(found) != set(words.COMMANDS):
        raise RuntimeError(f"dylora --help does not tell of {', '.join(set(words.COMMANDS) ^ set(found))}")
    return found


def command_sections() -> str:
    rows: list[tuple[str, ...]] = [(f"`dylora {name}`", what) for name, what in commands().items()]
    said = [f"## Commands\n\n{table(('command', 'what it does'), rows)}"]
    for name in commands():
        said.append(f"### dylora {name}\n")
        if name == "plan":  # reads the options of train, of which those of a config mean something here
            said.append("`dylora plan CONFIG`: a config's name or path, then any option of a config.\n")
            continue
        if name in NOTES:
            said.append(f"{NOTES[name]}\n")
        said.append(table(("option", "takes", "default", "what it does"), actions(name)))
    return "\n".join(said)


def data_section() -> str:
    presets = [(f"`{name}`", *(f"`{parts[p]!r}`" for p in parts)) for name, parts in skills.PRESETS.items()]
    shipped = sorted(path for folder in CONFIGS for path in folder.glob("*.yaml"))
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
    parts = [section(prefix.rstrip(".") or "The whole config", prefix, kind) for prefix, kind in sections().items()]
    parts.append(section("source: an entry of skills and of domains", "", Source))
    return "\n".join((HEAD, *parts, data_section(), command_sections()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is stale")
    asked = parser.parse_args(argv)
    page = reference()
    if not asked.check:
        OUT.write_text(page, encoding="utf-8")
        return 0
    if OUT.is_file() and OUT.read_text(encoding="utf-8") == page:
        return 0
    print(f"{OUT.relative_to(ROOT)} is stale: run python tools/write_reference.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
