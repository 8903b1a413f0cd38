"""Whether a checkpoint that has the right hashes holds what a run writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dylora_mlx.errors import UserError
from dylora_mlx.system.files import is_number

COUNTS = ("step", "skill", "skill_step", "flops", "records", "ledger", "removals", "skipped", "skipped_in_row")
"""Parts of the state that count something."""


def check(trainer: dict[str, Any]) -> None:
    """Raises TypeError, ValueError for values of other types than a run writes: what reads them asks no more."""
    for name in COUNTS:
        if type(trainer.get(name, 0)) is not int or trainer.get(name, 0) < 0:
            raise TypeError(f"{name} is {trainer[name]!r:.40}")
    tables = [*trainer["matrix"], trainer["digests"], trainer["parts"], *trainer["parts"].values()]
    if not all(isinstance(table, dict) for table in tables):
        raise TypeError("a table that is none")
    if not all(is_number(loss) for row in trainer["matrix"] for loss in row.values()):
        raise TypeError("a loss that is no number")
    if not _number_or_none(trainer.get("lookup_ratio")):
        raise TypeError(f"lookup_ratio is {trainer['lookup_ratio']!r:.40}")
    best = trainer["best"]
    if not all(type(best[name]) is int for name in ("step", "waited")) or not _number_or_none(best["loss"]):
        raise TypeError(f"best is {best!r:.60}")
    seen = trainer.get("seen", {})  # none in a checkpoint of before there were alarms
    counts = [*seen.get("unserved", {}).values(), seen.get("collapsed", 0)]
    if not all(type(count) is int for count in counts) or not all(map(is_number, seen.get("losses", []))):
        raise TypeError("what the alarms saw is no list of losses and counts")
    if trainer["matrix"] and len(trainer["matrix"]) != trainer["skill"] + 1:
        raise ValueError(f"losses after {len(trainer['matrix']) - 1} skills, but {trainer['skill']} were learned")


def _number_or_none(value: object) -> bool:
    return value is None or is_number(value)


@contextmanager
def whole(what: str) -> Iterator[None]:
    """Raises UserError for content that has the right hashes, but is not what a checkpoint holds."""
    try:
        yield
    except UserError:
        raise
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        AssertionError,
        OverflowError,
        RuntimeError,
    ) as error:
        raise UserError(f"{what} of this checkpoint is damaged ({error!r:.100}); use an earlier one") from error
