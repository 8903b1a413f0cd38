"""Every rank has the same weights. An engine whose sums differ in their last bits from rank to rank would let them drift
apart; where they did, rank 0's are taken."""

from __future__ import annotations

import hashlib

import mlx.core as mx
import numpy as np

from dylora_mlx import ranks
from dylora_mlx.training import guards
from dylora_mlx.training.guards import Kept
from dylora_mlx.training.run import Run


def mend(run: Run) -> bool:
    """Compare what the ranks are training, moments included; return whether it had to be made alike again."""
    group = ranks.group()
    if group.size == 1:
        return False
    kept = guards.keep(run)
    named = [*kept.weights, *(pair for moments in kept.optimizers for pair in moments.items())]
    digest = hashlib.sha256(b"".join(np.array(value).tobytes() for _, value in named)).hexdigest()
    if len(set(group.everyone(digest))) == 1:
        return False
    shared = group.added([value if group.leads else mx.zeros_like(value) for _, value in named])
    with group.waiting():
        mx.eval(shared)
    values = iter(shared)
    weights = [(name, next(values)) for name, _ in kept.weights]
    guards.put_back(run, Kept(weights, [{name: next(values) for name in moments} for moments in kept.optimizers]))
    return True
