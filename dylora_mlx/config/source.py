"""The source of a skill's documents and how its records are read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from dylora_mlx.config.checks import require, require_finite

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def _is_pattern(text: str) -> bool:
    """Return whether a text is a pattern of paths inside a folder: not only blanks or slashes, and no way out of the folder."""
    return bool(text.strip("!/\\ ")) and not text.startswith("~") and ".." not in text.split("/")


@dataclass(frozen=True)
class Source:
    """The documents of one skill or one evaluation domain, and how they are read."""

    name: str
    """Name of the skill: a letter or digit, then up to 63 letters, digits, '_', '-' or '.'."""
    source: str
    """packaged/NAME, a file of records or of text, a pattern of files such as data/*.jsonl, a folder of split files or of
    text files, or a hub data set as OWNER/NAME."""
    preset: Literal["none", "mbpp", "code_alpaca", "alpaca", "sharegpt"] = "none"
    """Predefined mapping for two data sets and for the forms Alpaca (instruction, input, output) and ShareGPT (conversations
    of from and value). none: use the templates below or the records' own columns."""
    text: str | None = None
    """Template of a plain document over the record's columns, such as '{content}'."""
    prompt: str | None = None
    """Template of the prompt, such as '{instruction}'. Requires completion."""
    completion: str | None = None
    """Template of the completion, such as '{output}'. Requires prompt."""
    messages: str | None = None
    """Column that holds the chat messages, a list of {role, content}."""
    contains: str | None = None
    """Keep only records in which some column contains this text, ignoring case."""
    include: list[str] | None = None
    """Patterns of the files of a folder to read, such as '*.py' or 'docs/**', written as in a .gitignore. A folder that is left
    out otherwise, such as build, is read if a pattern names it. null: all files."""
    exclude: list[str] | None = None
    """Patterns of the files of a folder to leave out, such as 'tests/' or '*_pb2.py'. null: none."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str = "train"
    """Split to train on. Validation (or valid, val, dev, eval) and test use the splits of those names if the source has
    them."""
    limit: int | None = None
    """Maximum number of records per split, at least 1, drawn with the run's seed. null: all records."""
    mask_prompt: bool = True
    """Mask the prompt in the loss: learn only completions and assistant turns. Plain text is always learned in full."""
    rank: int | None = None
    """LoRA rank of this skill's expert, at least 1. null: model.rank."""
    alpha: float | None = None
    """LoRA alpha of this skill's expert, above 0. null: model.alpha."""

    def __post_init__(self) -> None:
        require_finite(self)
        require(_NAME.fullmatch(self.name) is not None, f"name: '{self.name}' is not a name (letters, digits, _ - .)")
        require(bool(self.source.strip()), f"source: skill '{self.name}' names no source")
        require(
            (self.prompt is None) == (self.completion is None),
            f"skill '{self.name}': prompt and completion go together, give both or neither",
        )
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            require(
                patterns is None or (len(patterns) > 0 and all(_is_pattern(pattern) for pattern in patterns)),
                f"{name}: {patterns} of skill '{self.name}' is not a list of patterns of files in a folder, such as '*.py'",
            )
        require(self.limit is None or self.limit >= 1, f"limit: {self.limit} of skill '{self.name}' is not at least 1")
        require(self.rank is None or self.rank >= 1, f"rank: {self.rank} of skill '{self.name}' is not at least 1")
        require(self.alpha is None or self.alpha > 0, f"alpha: {self.alpha} of skill '{self.name}' is not above 0")
