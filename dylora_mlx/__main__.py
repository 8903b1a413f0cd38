"""The `dylora` command: one word, then the options of that command."""

from __future__ import annotations

import sys
from importlib import import_module

USAGE = """usage: dylora COMMAND [OPTIONS]

commands:
  train           learn a stream of skills (the same as python -m dylora_mlx.train)
  add             teach one more skill to a run that has finished
  plan            what a config would do: similarities, decisions, parameters, memory and time, before any training
  estimate        time, memory and disk of a run, from what it computes and ten seconds of timing
  explain         why a run created, reused, refined, merged or evicted its experts, and what if
  report          a run drawn in one HTML file, or several runs side by side
  generate        continue a prompt, or chat, with what a run has learned
  evaluate        losses of a run's domains, and pass@k of code problems
  doctor          what this machine has, what is wrong with it, and the line that mends it
  export          experts, the mixture, a blend or a full model for PyTorch and PEFT
  fuse            one expert or a blend folded into the base, for mlx-lm and LM Studio
  restore         experts that a budget removed, back into the pool
  text-base       the text model of a Gemma 3 with vision, to be a base
  import-expert   an adapter that was trained elsewhere, as an expert of a run
  import-run      an X-LoRA folder as a run

dylora COMMAND --help tells a command's options.
"""
COMMANDS = (
    "train",
    "add",
    "plan",
    "estimate",
    "explain",
    "report",
    "generate",
    "evaluate",
    "doctor",
    "export",
    "fuse",
    "restore",
    "text-base",
    "import-expert",
    "import-run",
)
HELP = {"-h", "--help"}


def main() -> int:
    words = sys.argv[1:]
    if not words or words[0] in HELP:
        print(USAGE, end="")
        return 0 if words else 2
    command, rest = words[0], words[1:]
    if command not in COMMANDS:
        print(f"error: no command '{command}', there are {', '.join(COMMANDS)} (see dylora --help)", file=sys.stderr)
        return 2
    return import_module(f"dylora_mlx.{command.replace('-', '_')}").main(rest)


if __name__ == "__main__":
    sys.exit(main())
