"""Where documents come from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from dylora_mlx.config.checks import require, require_finite

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class Source:
    """Where the documents of one skill or of one evaluation domain come from, and how they are read."""

    name: str
    """Name of the skill: letters, digits, '_', '-' and '.'."""
    source: str
    """packaged/NAME, a .jsonl file, a folder of split files or of text files, or a hub data set as OWNER/NAME."""
    preset: Literal["none", "mbpp", "code_alpaca"] = "none"
    """Ready field mapping: sets prompt and completion for these data sets."""
    text: str | None = None
    """Template of a plain document over the record's columns, such as '{content}'."""
    prompt: str | None = None
    """Template of the prompt, such as '{instruction}'; needs completion."""
    completion: str | None = None
    """Template of the completion, such as '{output}'."""
    messages: str | None = None
    """Column that holds chat messages, a list of {role, content}."""
    contains: str | None = None
    """Keep only records in which some column contains this text, upper or lower case."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str = "train"
    """Split to train on. Validation and test use the splits of those names where the source has them."""
    limit: int | None = None
    """Use at most this many records of each split, drawn by the seed."""
    mask_prompt: bool = True
    """Learn only completions and assistant turns; plain text is always learned whole."""
    rank: int | None = None
    """Rank of this skill's expert, instead of model.rank."""
    alpha: float | None = None
    """Alpha of this skill's expert, instead of model.alpha."""

    def __post_init__(self) -> None:
        require_finite(self)
        require(_NAME.fullmatch(self.name) is not None, f"name: '{self.name}' is not a name (letters, digits, _ - .)")
        require(bool(self.source.strip()), f"source: skill '{self.name}' names no source")
        require(
            (self.prompt is None) == (self.completion is None),
            f"skill '{self.name}': prompt and completion go together, give both or neither",
        )
        require(self.limit is None or self.limit >= 1, f"limit: {self.limit} of skill '{self.name}' is not at least 1")
        require(self.rank is None or self.rank >= 1, f"rank: {self.rank} of skill '{self.name}' is not at least 1")
        require(self.alpha is None or self.alpha > 0, f"alpha: {self.alpha} of skill '{self.name}' is not above 0")
