"""The `dylora` command: one word, then the options of that command."""

from __future__ import annotations

import sys

USAGE = """usage: dylora COMMAND [OPTIONS]

commands:
  train      learn a stream of skills (the same as python -m dylora_mlx.train)

dylora COMMAND --help tells a command's options.
"""
HELP = {"-h", "--help"}


def main() -> int:
    words = sys.argv[1:]
    if not words or words[0] in HELP:
        print(USAGE, end="")
        return 0 if words else 2
    if words[0] == "train":
        if HELP & set(words[1:]):
            return _help(words[1:])
        from dylora_mlx.train import main as train

        return train(words[1:])
    print(f"error: no command '{words[0]}', there is train (see dylora --help)", file=sys.stderr)
    return 2


def _help(argv: list[str]) -> int:
    """Print the options; MLX, which they do not need, is not imported."""
    from dylora_mlx import cli

    def parse(argv: list[str]) -> int:
        cli.parse(argv)
        return 0

    return cli.guarded(parse, argv)


if __name__ == "__main__":
    sys.exit(main())
