"""Keep the weights of all ranks identical in data-parallel training.

A communication backend whose all_reduce results differ in the last bits from rank to rank would let the replicas drift
apart. Rank 0's weights replace the others where that happened.
"""

from __future__ import annotations

import hashlib

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from dylora_mlx.distributed.group import world
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.training.step.optimizers import Optimizers


def sync_weights(model: RoutedDecoder, optimizers: Optimizers) -> bool:
    """Compare a hash of the trainable weights and optimizer moments across ranks; broadcast rank 0's on a mismatch.

    Returns whether anything was replaced. If so, build a new compiled step: the old one holds the old moments.
    """
    group = world()
    if group.world_size == 1:
        return False
    trees = [model.trainable_parameters(), *optimizers.state]
    flat_trees = [dict(tree_flatten(tree)) for tree in trees]
    # Every rank must flatten in the same order: the hash and the flat all_reduce below rely on it.
    values = [value for arrays in flat_trees for value in arrays.values()]
    digest = hashlib.sha256(b"".join(np.array(value).tobytes() for value in values)).hexdigest()
    if len(set(group.all_gather_object(digest))) == 1:
        return False
    # A broadcast as a sum: every rank but 0 contributes zeros.
    shared = group.all_reduce_tree([value if group.is_main_process else mx.zeros_like(value) for value in values])
    with group.watch_for_lost_ranks():
        mx.eval(shared)
    remaining = iter(shared)
    weights, experts, router = (tree_unflatten([(name, next(remaining)) for name in arrays]) for arrays in flat_trees)
    model.update(weights)
    optimizers.experts.state, optimizers.router.state = experts, router
    return True
