"""Continual-learning metrics of a loss matrix."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

PRIOR = 2
"""Weight of the largest change that was seen, in the variance of the sample. Where few skills change at all, a sample often
has none of them and a variance of zero; without this, an interval of 95% covers 44 to 85% there."""


class ForgettingEstimate(NamedTuple):
    """Mean forgetting of all learned skills, estimated from those that were evaluated, with its 95% interval."""

    mean: float
    low: float
    high: float


class ContinualMetrics(NamedTuple):
    """Continual-learning metrics over losses; lower is better (Lopez-Paz and Ranzato 2017, Chaudhry et al. 2018).

    A metric is None if the stream is too short for it, or the losses that it needs are not known.
    """

    final_mean: float
    """Mean loss of the stream's skills at the end."""
    bwt: float | None
    """Backward transfer: mean change of a skill's loss since it was learned."""
    forgetting: float | None
    """Mean rise over each skill's best earlier loss."""
    fwt: float | None
    """Forward transfer: mean change of a skill's loss, against the base, before it was learned."""


def continual_metrics(matrix: list[dict[str, float]], skills: list[str]) -> ContinualMetrics:
    """Compute the metrics of a loss matrix.

    Args:
        matrix: losses by domain; matrix[0] holds the base's, matrix[k] those after skill k. The diagonal is
            matrix[k][skills[k - 1]]. A skill that was unknown at the start, for instance a part of a split skill, has
            the base's loss and those from the row before its own onwards. A domain that was not evaluated after a skill
            is missing from its row, and keeps its latest loss.
        skills: skills in the order of learning; may be the first part of a stream.
    """
    count, last = len(skills), latest_losses(matrix[: len(skills) + 1])
    mean = sum(last[s] for s in skills) / count
    if count < 2:
        return ContinualMetrics(mean, None, None, None)
    earlier = [(k, s) for k, s in enumerate(skills[:-1], 1) if s in matrix[k]]
    later = [(k, s) for k, s in enumerate(skills[1:], 2) if s in matrix[k - 1]]
    bwt = [last[s] - matrix[k][s] for k, s in earlier]
    forgetting = [last[s] - min(row[s] for row in matrix[:count] if s in row) for _, s in earlier]
    fwt = [matrix[k - 1][s] - matrix[0][s] for k, s in later]
    return ContinualMetrics(mean, *(sum(each) / len(each) if each else None for each in (bwt, forgetting, fwt)))


def latest_losses(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the latest loss of every domain, from rows of a loss matrix in which domains may be missing."""
    return {name: loss for row in rows for name, loss in row.items()}


def estimate_forgetting(
    matrix: Sequence[Mapping[str, float]], skills: Sequence[str], sample: Collection[str]
) -> ForgettingEstimate:
    """Estimate the mean forgetting of all learned skills after an evaluation of some of them.

    Every skill has a value from its latest losses. For the sampled ones, its change by this evaluation is known; the mean
    change of the sample stands for all skills that were not evaluated: the difference estimator of survey sampling, with
    the finite population correction (Cochran 1977, "Sampling Techniques", sections 2.6 and 7.3). The interval is
    Student's, with a variance that allows for rare changes (PRIOR).

    Args:
        matrix: losses by domain, the last row those of this evaluation.
        skills: the learned skills, in the order of learning.
        sample: the skills in the last row that were drawn at random from all learned skills but those that were evaluated
            anyway.
    """
    now, before = _forgetting_by_skill(matrix, skills)
    measured, drawn = set(matrix[-1]).difference(sample), sorted(sample)
    certain = [name for name in now if name in measured]
    others = [name for name in now if name not in measured]
    changes = [now[name] - before[name] for name in drawn if name in now]
    size, count = len(now), len(changes)
    if not size:
        return ForgettingEstimate(0.0, 0.0, 0.0)
    change = sum(changes) / count if count else 0.0
    total = sum(now[name] for name in certain) + sum(before[name] for name in others) + len(others) * change
    if count == len(others):
        return ForgettingEstimate(total / size, total / size, total / size)
    if count < 2:
        return ForgettingEstimate(total / size, -math.inf, math.inf)
    largest = max(abs(now[name] - before[name]) for name in now)
    variance = (sum((each - change) ** 2 for each in changes) + PRIOR * largest**2) / (count - 1)
    error = len(others) * math.sqrt(variance * (1 - count / len(others)) / count) * student_quantile(count - 1)
    return ForgettingEstimate(total / size, (total - error) / size, (total + error) / size)


def _forgetting_by_skill(
    matrix: Sequence[Mapping[str, float]], skills: Sequence[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the forgetting of each learned skill but the newest after the last row of a matrix, and as it was before it.

    It is the latest loss minus the lowest one of the rows before, among which the latest may be: a skill that was not
    evaluated since it was learned has forgotten nothing, as far as is known.
    """
    lowest, latest = dict[str, float](), latest_losses(matrix[:-1])
    for row in matrix[:-1]:
        lowest |= {name: min(loss, lowest.get(name, math.inf)) for name, loss in row.items()}
    learned = [name for name in skills[:-1] if name in latest]
    now = {name: matrix[-1].get(name, latest[name]) - lowest[name] for name in learned}
    return now, {name: latest[name] - lowest[name] for name in learned}


def student_quantile(freedom: int) -> float:
    """Return the 97.5% quantile of Student's t (Abramowitz and Stegun 1964, 26.7.5), within 1% from 3 degrees of freedom on."""
    z, n = 1.959964, float(freedom)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n**power for power, term in enumerate(terms, 1))
