"""Every rank has the same weights. An engine whose sums differ in their last bits from rank to rank would let them drift
apart; where they did, rank 0's are taken."""

from __future__ import annotations

import hashlib

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from dylora_mlx.distributed.group import world
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.training.step.optimizers import Optimizers


def sync_weights(model: RoutedDecoder, optimizers: Optimizers) -> bool:
    """Compare what the ranks are training, moments included; return whether it had to be made alike again. A compiled step
    holds the old moments then: make a new one."""
    group = world()
    if group.world_size == 1:
        return False
    trees = [model.trainable_parameters(), *optimizers.state]
    flat = [dict(tree_flatten(tree)) for tree in trees]
    values = [value for each in flat for value in each.values()]
    digest = hashlib.sha256(b"".join(np.array(value).tobytes() for value in values)).hexdigest()
    if len(set(group.all_gather_object(digest))) == 1:
        return False
    shared = group.all_reduce_tree([value if group.is_main_process else mx.zeros_like(value) for value in values])
    with group.watch_for_lost_ranks():
        mx.eval(shared)
    rest = iter(shared)
    weights, experts, router = (tree_unflatten([(name, next(rest)) for name in each]) for each in flat)
    model.update(weights)
    optimizers.experts.state, optimizers.router.state = experts, router
    return True
