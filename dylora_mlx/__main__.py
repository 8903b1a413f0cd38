"""The `dylora` command-line entry point: `dylora COMMAND [OPTIONS]` runs the module of the command."""

from __future__ import annotations

import sys
from importlib import import_module

from dylora_mlx import __version__
from dylora_mlx.cli.commands import COMMANDS, RENAMED, module_of, usage

HELP = {"-h", "--help"}


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in HELP:
        print(usage(), end="")
        return 0 if arguments else 2
    command, options = arguments[0], arguments[1:]
    if command == "--version":
        print(f"dylora {__version__}")
        return 0
    if command in RENAMED:
        print(f"error: {command} is now called {RENAMED[command]} (see dylora --help)", file=sys.stderr)
        return 2
    if command not in COMMANDS:
        print(f"error: no command '{command}', there are {', '.join(COMMANDS)} (see dylora --help)", file=sys.stderr)
        return 2
    return import_module(module_of(command)).main(options)


if __name__ == "__main__":
    sys.exit(main())
