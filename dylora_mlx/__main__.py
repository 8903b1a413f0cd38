"""The `dylora` command-line entry point: `dylora COMMAND [OPTIONS]` runs the module of the command."""

from __future__ import annotations

import sys
from importlib import import_module

USAGE = """usage: dylora COMMAND [OPTIONS]

commands:
  train           learn a stream of skills (the same as python -m dylora_mlx.train)
  add             teach one more skill to a finished run
  data            show what would be learned: counts of each skill, and documents with what is learned in colour
  plan            preview a config before training: similarities, decisions, parameters, memory and time
  estimate        estimate time, memory and disk of a run, from counted FLOPs and ten seconds of timing
  explain         show why a run created, reused, refined, merged or evicted its experts, and replay it with other options
  report          draw a run as one HTML file, or several runs side by side
  generate        continue a prompt, or chat, with a run's experts
  serve           answer requests of OpenAI's API, with the mixture and every expert as models
  evaluate        measure the losses of a run's domains, and pass@k on code problems
  doctor          check this machine, and print a fix for each problem
  export          export experts, the mixture, a blend or a full model for PyTorch, PEFT and llama.cpp
  fuse            fold one expert or a blend into the base, for mlx-lm and LM Studio
  prune           remove old checkpoints of a run, never the last complete one
  pack            write a run folder to one archive, or unpack one
  restore         put experts that a budget removed back into the pool
  convert-base    convert a GGUF file, or extract the text model of a Gemma 3 with vision, for use as a base
  import-expert   add an adapter that was trained elsewhere to a run, as an expert
  import-run      convert an X-LoRA folder to a run

dylora COMMAND --help lists a command's options.
"""
COMMANDS = (
    "train",
    "add",
    "data",
    "plan",
    "estimate",
    "explain",
    "report",
    "generate",
    "serve",
    "evaluate",
    "doctor",
    "export",
    "fuse",
    "prune",
    "pack",
    "restore",
    "convert-base",
    "import-expert",
    "import-run",
)
RENAMED = {"text-base": "convert-base"}
"""Current name of every command that had another name before 0.1.0, by its old name."""
HELP = {"-h", "--help"}
MODULES = {"data": "show_data"}
"""Modules of commands that cannot have the command's own name: `data` is the package that reads sources."""


def module_of(command: str) -> str:
    """Return the full name of a command's module."""
    return f"dylora_mlx.{MODULES.get(command, command.replace('-', '_'))}"


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in HELP:
        print(USAGE, end="")
        return 0 if arguments else 2
    command, options = arguments[0], arguments[1:]
    if command in RENAMED:
        print(f"error: {command} is now called {RENAMED[command]} (see dylora --help)", file=sys.stderr)
        return 2
    if command not in COMMANDS:
        print(f"error: no command '{command}', there are {', '.join(COMMANDS)} (see dylora --help)", file=sys.stderr)
        return 2
    return import_module(module_of(command)).main(options)


if __name__ == "__main__":
    sys.exit(main())
