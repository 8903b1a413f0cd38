"""Ranks of new experts, from the law of a loss over the rank: where to start, how far to double. Kept as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dylora_mlx.errors import UserError
from dylora_mlx.growth.rank.power_law import IntervalEstimate, PowerLaw
from dylora_mlx.system.files import is_number, write_json

FORMAT = 1
MAX_RANK = 1 << 16
"""Rank of a schedule at most: beyond any hidden size."""
"""Of the file that a schedule is kept in."""
_COUNTS, _SIZES = ("start", "max_rank"), ("epsilon", "scale")


@dataclass(frozen=True)
class RankSchedule:
    """Ranks of new experts: `start`, doubled to `max_rank` at most.

    At start the loss has fallen at least half of its way from the smallest rank to max_rank; beyond max_rank a doubling
    is certain to gain less than `epsilon` nats per token. What lies between is for each skill to show.
    scale: alpha / rank of the experts that were measured; law: a, b, c; gains: of doubling each rank; verdict: what the
    measurements can tell, in words. Raises ValueError for values that are no schedule.
    """

    start: int
    max_rank: int
    epsilon: float
    scale: float
    law: dict[str, IntervalEstimate]
    gains: dict[int, IntervalEstimate]
    verdict: str

    def __post_init__(self) -> None:
        doublings = math.log2(self.max_rank / self.start) if min(self.start, self.max_rank) >= 1 else -1.0
        if doublings < 0 or doublings != int(doublings):
            raise ValueError(f"ranks from {self.start} to {self.max_rank} are no doublings")
        if not (self.epsilon > 0 and self.scale > 0):
            raise ValueError(f"epsilon {self.epsilon} and scale {self.scale} must be above 0")
        if self.law.keys() != set("abc") or self.law["b"].value < 0 or self.law["c"].value <= 0:
            raise ValueError("the law must have a, b of at least 0 and c above 0")


def rank_schedule(law: PowerLaw, epsilon: float, scale: float) -> RankSchedule:
    """The schedule for doublings that must gain `epsilon` nats per token, among the doublings of the smallest swept rank.

    No rank beyond the largest swept one is proposed, and max_rank is the largest where nothing is certain.
    """
    ladder = [law.ranks[0]]
    while 2 * ladder[-1] <= law.ranks[-1]:
        ladder.append(2 * ladder[-1])
    gains = {rank: law.improvement(rank, 2 * rank) for rank in ladder}
    certain = (rank for rank, gain in gains.items() if gain.interval is not None and gain.interval[1] < epsilon)
    max_rank = next(certain, ladder[-1])
    half = law.improvement(ladder[0], max_rank).value / 2
    start = next(rank for rank in ladder if law.improvement(rank, max_rank).value <= half)
    return RankSchedule(
        start, max_rank, epsilon, scale, law.parameters(), gains, _verdict(law, gains[ladder[-1]], epsilon)
    )


def save_schedule(found: RankSchedule, path: Path, measured: dict[str, Any]) -> None:
    """Write a schedule as JSON, beside what it was measured on. Raises UserError when it cannot be written."""
    content = {"format": FORMAT} | {name: getattr(found, name) for name in (*_COUNTS, *_SIZES, "verdict")}
    content["law"] = {name: value._asdict() for name, value in found.law.items()}
    content["gains"] = {rank: value._asdict() for rank, value in found.gains.items()}
    content["measured"] = measured
    try:
        write_json(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def load_schedule(path: Path) -> RankSchedule:
    """Read a schedule. Raises UserError for a file that is none, that has another format, or whose values make no sense."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON, so no rank schedule; make one with tools/benchmarks/rank_law.py") from error
    given = content.get("format") if isinstance(content, dict) else None
    if given != FORMAT:
        raise UserError(
            f"{path}: no rank schedule of format {FORMAT} (it says {given}); make one with tools/benchmarks/rank_law.py"
        )
    try:
        start, max_rank = (_finite(content[name], int) for name in _COUNTS)
        epsilon, scale = (_finite(content[name]) for name in _SIZES)
        law = {str(name): _estimate(value) for name, value in content["law"].items()}
        gains = {int(rank): _estimate(value) for rank, value in content["gains"].items()}
        if max_rank > MAX_RANK:
            raise ValueError(f"rank {max_rank:.3g} is above {MAX_RANK}")
        return RankSchedule(start, max_rank, epsilon, scale, law, gains, str(content["verdict"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: no rank schedule ({error!r}); make one with tools/benchmarks/rank_law.py") from error


def _finite(value: Any, kind: type | tuple[type, ...] = (int, float)) -> Any:
    if not is_number(value) or not isinstance(value, kind):
        raise ValueError(f"{value!r:.80} is no {'rank' if kind is int else 'number'}")
    return value


def _estimate(value: dict[str, Any]) -> IntervalEstimate:
    if value["interval"] is None:
        return IntervalEstimate(_finite(value["value"]), None)
    low, high = map(_finite, value["interval"])
    if low > high:
        raise ValueError(f"{low} to {high} is no interval")
    return IntervalEstimate(_finite(value["value"]), (low, high))


def _verdict(law: PowerLaw, last: IntervalEstimate, epsilon: float) -> str:
    low, high = law.ranks[0], law.ranks[-1]
    total = law.improvement(low, high)
    fallen, more = f"from rank {low} to {high} the loss falls by {total}", f"doubling rank {high}"
    if total.interval is None or last.interval is None:
        return f"{fallen}: three ranks and one seed leave nothing to tell how sure that is; add ranks or seeds"
    missed = (
        "; the law misses the losses by more than seeds explain, the intervals allow for it" if law.lack_of_fit else ""
    )
    if total.interval[0] <= 0:
        return f"flat: {fallen}, perhaps not at all; this cannot tell a rank{missed}"
    if last.interval[1] >= epsilon:
        return f"{fallen}; {more} may still gain {last}: sweep higher ranks{missed}"
    return f"{fallen}; {more} gains {last}{missed}"
