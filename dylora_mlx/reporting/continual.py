"""Continual-learning metrics of a matrix of losses."""

from __future__ import annotations

from typing import NamedTuple


class ContinualMetrics(NamedTuple):
    """Continual-learning metrics over losses, lower is better (Lopez-Paz and Ranzato 2017, Chaudhry et al. 2018).

    final_mean: mean loss of the stream's skills at the end; bwt: mean change since each skill was learned; forgetting:
    mean rise over each skill's best earlier loss; fwt: mean change of a skill's loss before it was learned. None where a
    stream is too short to tell.
    """

    final_mean: float
    bwt: float | None
    forgetting: float | None
    fwt: float | None


def continual_metrics(matrix: list[dict[str, float]], skills: list[str]) -> ContinualMetrics:
    """Metrics of R, where matrix[0] holds the base's losses and matrix[k] those after skill k, by domain.

    The diagonal is matrix[k][skills[k - 1]]; `skills` may be the first part of a stream. A skill that nobody knew of at the
    beginning has the base's loss and those from the row before its own on.
    """
    count, last = len(skills), matrix[len(skills)]
    mean = sum(last[s] for s in skills) / count
    if count < 2:
        return ContinualMetrics(mean, None, None, None)
    earlier = [(k, s) for k, s in enumerate(skills[:-1], 1) if s in matrix[k]]
    later = [(k, s) for k, s in enumerate(skills[1:], 2) if s in matrix[k - 1]]
    if not earlier or not later:
        return ContinualMetrics(mean, None, None, None)
    bwt = sum(last[s] - matrix[k][s] for k, s in earlier) / len(earlier)
    forgetting = sum(last[s] - min(row[s] for row in matrix[:count] if s in row) for _, s in earlier) / len(earlier)
    fwt = sum(matrix[k - 1][s] - matrix[0][s] for k, s in later) / len(later)
    return ContinualMetrics(mean, bwt, forgetting, fwt)
