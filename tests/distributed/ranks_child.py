"""Checks that each rank runs for test_group.py: python -m tests.distributed.ranks_child NAMES.

A failure is an assertion traceback.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx.cli.parser import run_command
from dylora_mlx.distributed import group as groups
from dylora_mlx.distributed.group import Group
from dylora_mlx.errors import Failure, UserError
from dylora_mlx.system import signals
from dylora_mlx.system.signals import Interrupted

LENGTHS = [[[20, 9]], [[7, 3, 11]], [[24]]]


def exchange() -> None:
    """Run every collective and check its result on every rank."""
    group = groups.world()
    rank, size = group.rank, group.world_size
    assert group.all_reduce(np.array([rank + 1, 10], np.int64)).tolist() == [sum(range(1, size + 1)), 10 * size]
    tree = {"a": [mx.full((2, 3), float(rank)), mx.array(1.0)], "b": mx.array([0.5]).astype(mx.bfloat16)}
    reduced = group.all_reduce_tree(tree)
    assert reduced["b"].dtype == mx.bfloat16
    assert (reduced["a"][0].shape, reduced["a"][0][0, 0].item(), reduced["a"][1].item()) == (
        (2, 3),
        sum(range(size)),
        size,
    )
    counts = [3 * number for number in range(size)]
    rows = group.all_gather(np.full((counts[rank], 2), rank, np.float32), counts)
    assert [part.shape for part in rows] == [(count, 2) for count in counts]
    assert all((part == number).all() for number, part in enumerate(rows))
    gathered_objects = group.all_gather_object({"rank": rank, "long": "x" * 17 * rank, "exact": 0.1 + rank})
    assert [(gathered["rank"], len(gathered["long"]), gathered["exact"]) for gathered in gathered_objects] == [
        (number, 17 * number, 0.1 + number) for number in range(size)
    ]
    broadcast = group.broadcast_object([rank, None, "ä", float("inf")])
    assert broadcast == [0, None, "ä", float("inf")]
    data = bytes(range(256)) * 3 + b"odd"
    assert group.broadcast_bytes(data if group.is_main_process else b"") == data
    assert group.broadcast_bytes(b"") == b""
    assert (group.any_rank(rank == size - 1), group.any_rank(False)) == (True, False)
    assert [group.shard(range(7), first)[0] for first in range(size)] == [
        (rank - first) % size for first in range(size)
    ]
    assert group.wait_seconds > 0
    assert group.bytes_sent > 0


def missing(group: Group, kind: type[Exception]) -> None:
    """Raise an error on rank 1 only, inside raise_on_all_ranks."""
    with group.raise_on_all_ranks():
        if group.rank == 1:
            raise kind("the file is missing")


def errors() -> None:
    """All ranks raise an error of one rank, and a signal to one rank interrupts all."""
    group = groups.world()
    for kind in (UserError, Failure):
        with pytest.raises(kind, match=r"^rank 1: the file is missing$"):
            missing(group, kind)
    group.raise_if_stop_requested("nobody was asked")
    with signals.defer_signals():
        if group.rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        with pytest.raises(Interrupted, match=r"^asked$") as raised:
            group.raise_if_stop_requested("asked")
        assert raised.value.code == (130 if group.rank == 1 else 143)


def step() -> None:
    """A step shared by all ranks equals the step of one rank: losses, norms and the updated weights."""
    from dylora_mlx.config import TrainingConfig  # imported here, because the checks for a lost rank need no model
    from dylora_mlx.training.step.optimizers import make_optimizers
    from dylora_mlx.training.step.step import GlobalCounts, Step
    from tests.tiny import close, flat, micro, remembered, tiny_pool

    group, training = (
        groups.world(),
        TrainingConfig(
            load_balance_coef=0.1, z_loss_coef=0.1, max_grad_norm=0.1, optimizer="adafactor", lora_dropout=0.2
        ),
    )
    batches, memory = [micro(lengths, 30, seed) for seed, lengths in enumerate(LENGTHS)], remembered([0, 1])
    batches = [batch._replace(dropout_key=mx.random.key(number)) for number, batch in enumerate(batches)]
    outcomes, weights = [], []
    for is_shared in (False, True):
        pool = tiny_pool([2, 3])
        pool.freeze(1)
        optimizers = make_optimizers(training)
        optimizers.init(pool.model)
        training_step = Step(pool.model, optimizers, training, None, 2, compiled=False)
        tokens = sum(float(batch.weights.sum()) for batch in batches)
        global_counts = (
            GlobalCounts(mx.array(tokens), mx.array(3.0), mx.array(float(group.rank))) if is_shared else None
        )
        local_batches = group.shard(batches) if is_shared else batches
        outcomes.append(training_step(local_batches, memory, mx.array(1.0), None, global_counts))
        weights.append(flat(pool.model.trainable_parameters()))
    single, shared = outcomes
    assert shared.ranks_asked_to_stop is not None
    assert shared.ranks_asked_to_stop.item() == sum(range(group.world_size))
    for name in ("train_loss", "tokens", "grad_norm", "router_norm", "usage", "entropy"):
        assert close(getattr(shared, name), getattr(single, name), 1e-6), name
    assert close(mx.stack(list(shared.terms)), mx.stack(list(single.terms)), 1e-6)
    assert all(close(weights[1][name], value, 1e-5) for name, value in weights[0].items())
    digest = {name: value.tobytes().hex() for name, value in weights[1].items()}
    assert all(other == digest for other in group.all_gather_object(digest)), "every rank has the same bits"


def shares() -> None:
    """Base states, evaluations and losses by segment are bitwise those of one rank, for any router layer."""
    from dylora_mlx.data.stream import Split
    from dylora_mlx.model.routing.router import Routing
    from dylora_mlx.training.skill.base_pass import CHUNK, base_states
    from dylora_mlx.training.step.domains import make_domains
    from dylora_mlx.training.step.evaluate import Evaluator, evaluate_all, losses_by_segment
    from tests.tiny import pieces_of, tiny_pool

    lengths = {"long": (9, 20, 4, 24, 13, 6, 11, 23, 7, 16), "short": (5, 24)}
    splits = {name: Split(pieces_of(each), len(each)) for name, each in lengths.items()}
    group, single_rank = groups.world(), Group(None)
    for router_layer in ("final", 2):
        model, results = tiny_pool([2, 3], router_layer).model, []
        for each in (single_rank, group):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(groups, "_world", each)
                states = list(base_states(model, splits["long"].segments, 24, 1))
                domains = make_domains(splits, 24, 1)
                evaluation = evaluate_all(Evaluator(model, compiled=False), domains, Routing(2, mx.array(0.7)))
                losses = [losses_by_segment(model, domain, 1) for domain in domains.values()]
            results.append((states, evaluation, losses))
        (single_states, evaluation, segment_losses), (shared_states, shared_evaluation, shared_segment_losses) = results
        assert len(single_states) == len(shared_states) > CHUNK - 3
        for first, second in zip(single_states, shared_states, strict=True):
            assert first.batch.rows == second.batch.rows
            assert first.final.tobytes() == second.final.tobytes()
            assert first.features.tobytes() == second.features.tobytes()
        assert evaluation == shared_evaluation
        assert all(np.array_equal(a, b) for a, b in zip(segment_losses, shared_segment_losses, strict=True))


def drifted() -> None:
    """A rank whose weights or moments differ takes those of rank 0. Nothing is sent where all agree."""
    from types import SimpleNamespace

    from dylora_mlx.config import TrainingConfig
    from dylora_mlx.training.step.optimizers import make_optimizers
    from dylora_mlx.training.weight_sync import sync_weights
    from tests.tiny import flat, tiny_pool

    group, pool, optimizers = groups.world(), tiny_pool([2, 3]), make_optimizers(TrainingConfig())
    optimizers.init(pool.model)
    run = SimpleNamespace(model=pool.model, optimizers=optimizers)
    assert not sync_weights(run.model, run.optimizers)
    before = flat(pool.model.trainable_parameters())
    if group.rank == 1:
        factors = pool.model.experts[0].layers[0]["q_proj"]
        factors.lora_a = factors.lora_a * (1 + 2**-20)
        optimizers.experts.state["step"] = optimizers.experts.state["step"] + 3
    assert sync_weights(run.model, run.optimizers)
    after = flat(pool.model.trainable_parameters())
    assert all(after[name].tobytes() == value.tobytes() for name, value in before.items())
    assert optimizers.experts.state["step"].item() == 0
    assert not sync_weights(run.model, run.optimizers)


def lost() -> None:
    """Rank 1 is killed. The others report it."""
    group = groups.world()
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    for _ in range(3):
        group.barrier()


def silent() -> None:
    """Rank 1 is alive and does not answer."""
    groups.TIMEOUT_SECONDS = 1.0
    group = groups.world()
    if group.rank == 1:
        time.sleep(4)
        os._exit(0)
    group.barrier()


def work(argv: list[str]) -> int:
    """Run the named checks."""
    parts = (exchange, errors, step, shares, drifted, lost, silent)
    for name in argv:
        next(part for part in parts if part.__name__ == name)()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(work, sys.argv[1:], parallel=True))
