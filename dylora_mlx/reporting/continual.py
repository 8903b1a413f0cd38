"""Continual-learning metrics of a loss matrix."""

from __future__ import annotations

from typing import NamedTuple


class ContinualMetrics(NamedTuple):
    """Continual-learning metrics over losses; lower is better (Lopez-Paz and Ranzato 2017, Chaudhry et al. 2018).

    A metric is None if the stream is too short for it.
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
            the base's loss and those from the row before its own onwards.
        skills: skills in the order of learning; may be the first part of a stream.
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
