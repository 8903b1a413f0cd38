"""Rank schedule of new experts: initial and maximum LoRA rank, derived from the power law and stored as JSON."""

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
"""Format version of a schedule file."""
MAX_RANK = 1 << 16
"""Largest rank that a schedule file may contain; it is beyond any hidden size."""
_INT_FIELDS, _FLOAT_FIELDS = ("start", "max_rank"), ("epsilon", "scale")


@dataclass(frozen=True)
class RankSchedule:
    """LoRA ranks of new experts: `start`, which may double up to `max_rank`.

    Between the two ranks, the training of each skill decides how far to double. Raises ValueError for inconsistent
    values.
    """

    start: int
    """Rank at which the loss has fallen at least half of the way from the smallest rank to `max_rank`."""
    max_rank: int
    """Rank beyond which a doubling is certain to gain less than `epsilon`."""
    epsilon: float
    """Minimum gain of a doubling, nats per token."""
    scale: float
    """alpha / rank of the measured experts."""
    law: dict[str, IntervalEstimate]
    """Parameters a, b and c of the power law."""
    gains: dict[int, IntervalEstimate]
    """Gain from doubling each rank, nats per token."""
    verdict: str
    """Sentence that states how much the measurements can tell."""

    def __post_init__(self) -> None:
        doublings = math.log2(self.max_rank / self.start) if min(self.start, self.max_rank) >= 1 else -1.0
        if doublings < 0 or doublings != int(doublings):
            raise ValueError(f"ranks from {self.start} to {self.max_rank} are no doublings")
        if not (self.epsilon > 0 and self.scale > 0):
            raise ValueError(f"epsilon {self.epsilon} and scale {self.scale} must be above 0")
        if self.law.keys() != set("abc") or self.law["b"].value < 0 or self.law["c"].value <= 0:
            raise ValueError("the law must have a, b of at least 0 and c above 0")


def rank_schedule(law: PowerLaw, epsilon: float, scale: float) -> RankSchedule:
    """Derive the schedule for doublings that must gain at least `epsilon` nats per token.

    Candidates are the smallest measured rank and its doublings up to the largest measured rank. If no doubling is
    certain to gain less than `epsilon`, max_rank is the largest candidate. `scale` is alpha / rank of the measured
    experts.
    """
    candidates = [law.ranks[0]]
    while 2 * candidates[-1] <= law.ranks[-1]:
        candidates.append(2 * candidates[-1])
    gains = {rank: law.improvement(rank, 2 * rank) for rank in candidates}
    certain = (rank for rank, gain in gains.items() if gain.interval is not None and gain.interval[1] < epsilon)
    max_rank = next(certain, candidates[-1])
    half = law.improvement(candidates[0], max_rank).value / 2
    start = next(rank for rank in candidates if law.improvement(rank, max_rank).value <= half)
    return RankSchedule(
        start, max_rank, epsilon, scale, law.parameters(), gains, _verdict(law, gains[candidates[-1]], epsilon)
    )


def save_schedule(schedule: RankSchedule, path: Path, measured: dict[str, Any]) -> None:
    """Write a schedule as JSON, with the measurements it rests on. Raises UserError if the file cannot be written."""
    content = {"format": FORMAT} | {name: getattr(schedule, name) for name in (*_INT_FIELDS, *_FLOAT_FIELDS, "verdict")}
    content["law"] = {name: value._asdict() for name, value in schedule.law.items()}
    content["gains"] = {rank: value._asdict() for rank, value in schedule.gains.items()}
    content["measured"] = measured
    try:
        write_json(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def load_schedule(path: Path) -> RankSchedule:
    """Load a schedule. Raises UserError for a file that is no schedule, has another format or invalid values."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON, so no rank schedule; make one with tools/benchmarks/rank_law.py") from error
    file_format = content.get("format") if isinstance(content, dict) else None
    if file_format != FORMAT:
        raise UserError(
            f"{path}: no rank schedule of format {FORMAT} (it says {file_format}); make one with tools/benchmarks/rank_law.py"
        )
    try:
        start, max_rank = (_finite(content[name], int) for name in _INT_FIELDS)
        epsilon, scale = (_finite(content[name]) for name in _FLOAT_FIELDS)
        law = {str(name): _estimate(value) for name, value in content["law"].items()}
        gains = {int(rank): _estimate(value) for rank, value in content["gains"].items()}
        if max_rank > MAX_RANK:
            raise ValueError(f"rank {max_rank:.3g} is above {MAX_RANK}")
        return RankSchedule(start, max_rank, epsilon, scale, law, gains, str(content["verdict"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: no rank schedule ({error!r}); make one with tools/benchmarks/rank_law.py") from error


def _finite(value: Any, kind: type | tuple[type, ...] = (int, float)) -> Any:
    """Return a finite number of the given type. Raises ValueError for anything else."""
    if not is_number(value) or not isinstance(value, kind):
        raise ValueError(f"{value!r:.80} is no {'rank' if kind is int else 'number'}")
    return value


def _estimate(value: dict[str, Any]) -> IntervalEstimate:
    """Read an estimate from JSON. Raises KeyError, TypeError or ValueError if it is damaged."""
    if value["interval"] is None:
        return IntervalEstimate(_finite(value["value"]), None)
    low, high = map(_finite, value["interval"])
    if low > high:
        raise ValueError(f"{low} to {high} is no interval")
    return IntervalEstimate(_finite(value["value"]), (low, high))


def _verdict(law: PowerLaw, last: IntervalEstimate, epsilon: float) -> str:
    """Describe what the measurements tell; `last` is the gain from doubling the largest candidate rank."""
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
