"""Facts about a source, collected while it is read: its files, the origin of each split, copies among its records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

DRAWN = "drawn from train"
"""Origin of a split that the source does not bring itself."""
_ONE = {"links": "link", "with other endings": "with another ending"}
"""How a reason reads for one file."""
_SHOWN = 6
"""Reasons that a line names, at most."""


@dataclass(frozen=True)
class SourceInfo:
    """Facts about a source for a person to check before training on it. `to_dict` returns them as JSON values."""

    files: dict[str, int] = field(default_factory=dict)
    """Files that were read, by their ending in lower case (`.jsonl`, `.jsonl.gz`), the most frequent first. Empty for a hub
    data set."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Files and links of a folder that were left out, by reason (`in .venv`, `by .gitignore`, `links`), the most frequent first."""
    split_origins: dict[str, str] = field(default_factory=dict)
    """For train, validation and test, where the records come from: a file (`train.jsonl`), several (`data/*.jsonl, 3 files`),
    a hub data set's split (`owner/name, split dev`), or `drawn from train`."""
    records: dict[str, int] = field(default_factory=dict)
    """Records of train, validation and test, after `contains` and `limit`."""
    duplicates: int = 0
    """Records that are read as the same text or chat as an earlier one of the source, in whichever split, after `contains` and
    `limit`. Columns that are not learned do not count."""
    leaked: dict[str, int] = field(default_factory=dict)
    """For validation and test, how many of their records are also in train. A split with none is left out. A split that was
    drawn has none, because all copies of a record go into one split, unless the source has too few different records."""

    def reasons(self) -> str:
        """Return the counts of left-out files by reason, as text: `241 in .venv, 3 links`."""
        shown = list(self.left_out.items())[:_SHOWN]
        texts = [f"{number} {_ONE.get(reason, reason) if number == 1 else reason}" for reason, number in shown]
        others = sum(self.left_out.values()) - sum(number for _, number in shown)
        return ", ".join(texts + [f"{others} more"] * bool(others))

    def files_note(self, name: str) -> str | None:
        """Return a line that begins with the skill's name and lists the files read and left out, None if none was left out:
        `scripts: 31 files (.py 28, .md 3); left out: 241 in .venv, 3 links`."""
        if not self.left_out:
            return None
        number, endings = (
            sum(self.files.values()),
            (f"{ending} {count}".strip() for ending, count in self.files.items()),
        )
        return f"{name}: {number} file{'s' * (number != 1)} ({', '.join(endings)}); left out: {self.reasons()}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SourceInfo:
        """Rebuild from `to_dict`. Raises TypeError for an unknown field."""
        return cls(**values)
