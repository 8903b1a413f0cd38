"""Generate docs/reference.md from the package: all config options, all commands with their options, the data formats.

    python tools/dev/write_reference.py            writes docs/reference.md
    python tools/dev/write_reference.py --check    exits 1, with a one-line message, if the file is stale

Options are read from the config's dataclasses, and commands from their argument parsers, not from the formatted --help output.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterable
from dataclasses import fields
from functools import lru_cache
from importlib import import_module
from itertools import takewhile
from pathlib import Path

from dylora_mlx.assets import packaged_skills
from dylora_mlx.cli.commands import COMMANDS, module_of
from dylora_mlx.cli.introspect import parser_of
from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.config import Config, Source
from dylora_mlx.config.options import Option, Section, sections, type_name
from dylora_mlx.config.yaml_files import CONFIG_FOLDERS
from dylora_mlx.data import files, folders, readers, skills, split_files

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "reference.md"
HEAD = """# Reference

Written by `python tools/dev/write_reference.py` from the package itself; do not edit.

Set an option `section.name` in a YAML file as `section: {name: value}`, or on the command line with two dashes before its full name.
The command line takes precedence. `python -m dylora_mlx.train --print_config` prints a whole config. [concepts.md](concepts.md)
explains the terms.
"""
FORMS = """## Data formats

A record becomes a document by the first of these that applies: the source's `prompt` and `completion` templates; its `text`
template; the preset `alpaca`; the chat in the column that its `messages` names, or in a column `messages` or `conversations`
(ShareGPT's turns); columns `prompt` and `completion` or `response`; columns `instruction` and `output`, with or without `input` (Alpaca); a
column `text`. The loss covers completions, assistant turns and plain text; with `mask_prompt: false` it covers prompts and the other
turns too. In a template, `{column}` stands for that column; a list of texts is joined by line breaks, any other value that is not text is
shown as JSON.
"""
PRESETS_WITHOUT_OPTIONS = {
    "alpaca": "columns `instruction`, `input` (may be empty or missing) and `output`, each on lines of its own"
}
"""Descriptions of the presets that cannot be expressed as options of a source."""
NOTES = {
    "train": "All options of a config, and these:",
    "data": "With a config all options of a config; with a source those of a source, `seed`, `model.base` and `data.*`. And these:",
    "plan": "All options of a config, and this:",
    "estimate": "All options of a config, and these. With a run folder, only `--quiet` and `--json`:",
    "add": "All options of a source, and these:",
}


@lru_cache
def options() -> dict[str, Option]:
    """Return every option of a config by its full name."""
    return {option.name: option for section in sections(Config) for option in section.options}


def table(names: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table; vertical bars in cells are escaped."""
    lines = [names, tuple("---" for _ in names), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines) + "\n"


def section(title: str, config_section: Section) -> str:
    """Return a section of the page: the docstring of the dataclass and a table of its options."""
    rows = [
        (f"`{o.name}`", type_name(o.type), "must be given" if o.default is None else f"`{o.default}`", o.help)
        for o in config_section.options
    ]
    return f"## {title}\n\n{inspect.getdoc(config_section.type)}\n\n{table(('option', 'type', 'default', 'what it does'), rows)}"


def actions(command: str) -> list[tuple[str, ...]]:
    """Return a row (name, values, default, help) for each option of a command that is not an option of a config or source."""
    shared_classes = {
        "train": (Config,), "plan": (Config,), "estimate": (Config,), "add": (Source,), "data": (Config, Source),
    }.get(command, ())  # fmt: skip
    shared_options = {f"--{field.name}" for kind in shared_classes for field in fields(kind)} - {"--name"}
    rows = []
    for action in parser_of(import_module(module_of(command)).main)._actions:
        option = action.option_strings[0] if action.option_strings else ""
        if (
            option.split(".")[0] in shared_options
            or option in ("-h", "--print_config")
            or action.help == argparse.SUPPRESS
        ):
            continue
        metavar = str(action.metavar or action.dest.replace("_", "-"))
        name = ", ".join(f"`{option}`" for option in action.option_strings) or f"`{metavar.upper()}`"
        repeated = " ..." if action.nargs in ("+", "*") else ""
        values = ", ".join(map(str, action.choices)) if action.choices else "" if action.nargs == 0 else metavar
        has_default = action.default not in (None, [], argparse.SUPPRESS) and action.nargs != 0
        default = "must be given" if action.required else f"`{action.default}`" if has_default else ""
        rows.append((name, f"{values}{repeated}", default, " ".join(str(action.help or "").split())))
    return rows


def command_sections() -> str:
    """Return the part of the page about commands: an overview, then the options of each command."""
    rows: list[tuple[str, ...]] = [(f"`dylora {name}`", description) for name, description in COMMANDS.items()]
    parts = [f"## Commands\n\n{table(('command', 'what it does'), rows)}"]
    for name in COMMANDS:
        parts.append(f"### dylora {name}\n")
        if name in NOTES:
            parts.append(f"{NOTES[name]}\n")
        parts.append(table(("option", "takes", "default", "what it does"), actions(name)))
    return "\n".join(parts)


def data_section() -> str:
    """Return the part of the page about data formats, presets, packaged skills and shipped configs."""
    presets = [
        (
            f"`{name}`",
            ", ".join(f"`{option}: {value!r}`" for option, value in options.items()) or PRESETS_WITHOUT_OPTIONS[name],
        )
        for name, options in skills.PRESETS.items()
    ]
    shipped = sorted(path for folder in CONFIG_FOLDERS for path in folder.glob("*.yaml"))
    configs = [(f"`{path.stem}`", _opening(path)) for path in shipped]
    splits = "; ".join(
        f"{split}: {', '.join(f'`{name}`' for name in names)}" for split, names in split_files.NAMES.items()
    )
    return "\n".join((
        FORMS,
        f"Presets set options of a source:\n\n{table(('preset', 'is'), presets)}",
        f"Files of records end in {code(files.RECORD_SUFFIXES)}; all but {code(files.TABLE_SUFFIXES)} may be compressed "
        f"({code(files.COMPRESSIONS)}). Splits are recognised by their names: {splits}. Several files of one split are numbered, as in "
        "`train-00000-of-00002.parquet`.\n",
        f"A folder without split files is read as text files: {code(skills.TEXT_SUFFIXES)}. Left out are hidden files and folders, what "
        f"its `.gitignore` files name, links, virtual environments, and folders called {code(folders.SKIPPED_FOLDERS)}. A single file "
        f"of text is cut at blank lines into documents of at most {readers.TEXT_DOCUMENT:,} characters.\n",
        f"Packaged skills: {', '.join(f'`packaged/{name}`' for name in sorted(packaged_skills()))}.\n",
        f"## Shipped configs\n\n`--config NAME` loads one of these:\n\n{table(('config', 'what it is'), configs)}",
    ))  # fmt: skip


def code(names: Iterable[str]) -> str:
    """Return names in alphabetical order, each as code."""
    return ", ".join(f"`{name}`" for name in sorted(names))


def _opening(path: Path) -> str:
    """Return the comment at the top of a config file, as one line."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return " ".join(line.lstrip("# ") for line in lines)


def reference() -> str:
    """Return the whole page."""
    parts = [
        section(config_section.prefix.rstrip(".") or "The whole config", config_section)
        for config_section in sections(Config)
    ]
    parts.append(section("source: an entry of skills and of domains", sections(Source)[0]))
    return "\n".join((HEAD, *parts, data_section(), command_sections()))


def command(argv: list[str]) -> int:
    parser = Parser("python tools/dev/write_reference.py", __doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with code 1 if the page is stale")
    args = parser.parse_args(argv)
    page = reference()
    if not args.check:
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
