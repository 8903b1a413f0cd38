"""A step that several ranks share: what each must know of the whole, and how their shares come together."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_map

from dylora_mlx.distributed import group as ranks
from dylora_mlx.training.step.losses import Terms


class Whole(NamedTuple):
    """Of a step that several ranks share, float32 scalars: its learned tokens, its micro-batches with any text, and whether
    this rank was asked to leave."""

    tokens: mx.array
    filled: mx.array
    asked: mx.array


def added(found: Any, whole: Whole, compiled: bool) -> Any:
    """What all ranks found together, a tree of sums in one array on the wire, and how many of them were asked to leave."""
    group = ranks.group()
    if compiled:
        return group.added((found, whole.asked))
    mx.eval(found)  # so that waiting for others is not taken for work
    summed = group.added((found, whole.asked))
    with group.waiting():
        mx.eval(summed)
    return summed


def nothing(learned: dict[str, Any]) -> tuple[tuple[mx.array, mx.array, tuple[mx.array, mx.array]], dict[str, Any]]:
    """What a rank without a micro-batch finds: zeros, as a micro-batch without a token would. learned: what is
    differentiated."""
    zero, columns = mx.array(0.0), len(learned["gate"][1])
    value = zero, mx.zeros(len(Terms._fields)), (mx.zeros(columns), zero)
    return value, tree_map(mx.zeros_like, learned)
