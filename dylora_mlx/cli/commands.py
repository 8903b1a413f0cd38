"""The names of all commands with their one-line descriptions, and the module of each."""

from __future__ import annotations

COMMANDS = {
    "init": "write a commented config for files or folders, after a look at what is in them",
    "train": "learn a stream of skills (the same as python -m dylora_mlx.train)",
    "add": "teach one more skill to a finished run",
    "data": "show what would be learned: counts of each skill, and documents with what is learned in colour",
    "plan": "preview a config before training: similarities, decisions, parameters, memory and time",
    "estimate": "estimate time, memory and disk of a run, from counted FLOPs and ten seconds of timing",
    "explain": "show why a run created, reused, refined, merged or evicted its experts, and replay it with other options",
    "report": "draw a run as one HTML file, or several runs side by side",
    "generate": "continue a prompt, or chat, with a run's experts",
    "serve": "answer requests of OpenAI's API, with the mixture and every expert as models",
    "evaluate": "measure the losses of a run's domains, and pass@k on code problems",
    "doctor": "check this machine, and print a fix for each problem",
    "export": "export experts, the mixture, a blend or a full model for PyTorch, PEFT and llama.cpp",
    "fuse": "fold one expert or a blend into the base, for mlx-lm and LM Studio",
    "prune": "remove old checkpoints of a run, never the last complete one",
    "tidy": "remove experts that a finished run can do without",
    "pack": "write a run folder to one archive, or unpack one",
    "restore": "put experts that a budget removed back into the pool",
    "convert-base": "convert a GGUF file, or extract the text model of a Gemma 3 with vision, for use as a base",
    "import-expert": "add an adapter that was trained elsewhere to a run, as an expert",
    "import-run": "convert an X-LoRA folder to a run",
    "completion": "print the completion script of a shell: bash, zsh or fish",
}
"""Description of every command, in the order of `dylora --help`."""
RENAMED = {"text-base": "convert-base"}
"""Current name of every command that had another name before 0.1.0, by its old name."""
_MODULES = {"data": "show_data"}
"""Modules of commands that cannot have the command's own name: `data` is the package that reads sources."""


def module_of(command: str) -> str:
    """Return the full name of a command's module."""
    return f"dylora_mlx.{_MODULES.get(command, command.replace('-', '_'))}"


def usage() -> str:
    """Return the text of `dylora --help`."""
    lines = "".join(f"  {name:<15} {description}\n" for name, description in COMMANDS.items())
    return (
        f"usage: dylora COMMAND [OPTIONS]\n\ncommands:\n{lines}\n"
        "dylora COMMAND --help lists a command's options, dylora --version prints the version.\n"
    )
