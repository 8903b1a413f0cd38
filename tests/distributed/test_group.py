"""The process group: encoding, collectives, shared work, launch detection, and lost ranks."""

from __future__ import annotations

import signal

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dylora_mlx import add
from dylora_mlx.config import DataConfig
from dylora_mlx.data.stream import BatchPlan, Split
from dylora_mlx.distributed import group as ranks
from dylora_mlx.distributed import launcher
from dylora_mlx.distributed.group import Group, decode_object, encode_object, pack_bytes, unpack_bytes, world
from dylora_mlx.errors import UserError
from dylora_mlx.growth.library import Library
from dylora_mlx.system import signals
from dylora_mlx.system.signals import Interrupted
from dylora_mlx.training.skill.prefetch import Prefetcher
from dylora_mlx.training.step.domains import make_domains
from dylora_mlx.training.weight_sync import sync_weights
from tests.distributed import launching
from tests.tiny import ARGS, pieces_of

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


class PretendedGroup(Group):
    """A rank of several, without the other ranks."""

    def __init__(self, rank: int, size: int):
        super().__init__(None)
        self.rank, self.world_size = rank, size


def pretend_rank(monkeypatch, rank: int, size: int) -> None:
    """Make this process act as a rank of several."""
    group = PretendedGroup(rank, size)
    monkeypatch.setattr(ranks, "_world", group)


@settings(deadline=None)
@given(VALUES)
def test_encoded_values_round_trip(value):
    data = encode_object(value)
    words = pack_bytes(data)
    assert words.dtype == np.int32
    assert decode_object(unpack_bytes(words, len(data))) == value


@settings(deadline=None)
@given(st.binary(max_size=40))
def test_packed_bytes_round_trip(data):
    assert unpack_bytes(pack_bytes(data), len(data)) == data


def test_a_single_process_is_a_group_of_one():
    group = world()
    assert (group.rank, group.world_size, group.is_main_process) == (0, 1, True)
    tree, value, rows = {"a": mx.array([1.0])}, object(), np.ones((2, 3), np.float32)
    assert group.all_reduce_tree(tree) is tree
    assert group.broadcast_object(value) is value
    assert group.all_gather_object(value) == [value]
    assert group.all_gather(rows, [2])[0] is rows
    assert group.broadcast_bytes(b"x") == b"x"
    assert group.shard("abc") == ["a", "b", "c"]
    group.barrier()
    group.raise_if_stop_requested("nobody was asked")
    with pytest.raises(UserError, match=r"^wrong$"), group.raise_on_all_ranks():
        raise UserError("wrong")
    assert (group.wait_seconds, group.bytes_sent) == (0.0, 0)
    assert not sync_weights(None, None), "one rank compares nothing"


def test_a_rank_without_the_signal_exits_as_terminated():
    with pytest.raises(Interrupted, match="go on") as raised:
        signals.raise_interrupted("go on")
    assert raised.value.code == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("environment", "rank"),
    [({}, None), ({"MLX_RANK": "0"}, 0), ({"OMPI_COMM_WORLD_RANK": "3"}, 3), ({"MLX_RANK": ""}, None)],
)
def test_the_rank_is_read_from_the_environment(monkeypatch, environment, rank):
    for name in launcher.RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launcher.launched_rank() == rank
    assert launcher.prints_messages() == (rank in (None, 0))


@pytest.mark.parametrize(
    ("hosts", "rank"),
    [("\n", None), ('[["10.0.0.1:5000"]]', None), ('[["10.0.0.1:5000"], ["10.0.0.2:5000"]]', 0), ("[[", 0), ("3", 0)],
)
def test_a_ring_of_one_is_a_single_process(monkeypatch, tmp_path, hosts, rank):
    """mlx.launch -n 1 leaves an empty list of hosts."""
    (tmp_path / "hosts.json").write_text(hosts)
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts.json"))
    assert launcher.launched_rank() == rank
    if rank is None:
        monkeypatch.setattr(ranks, "_world", None)
        assert world().world_size == 1


@pytest.mark.parametrize(("rank", "message_count"), [("0", 1), ("1", 0)])
def test_other_commands_refuse_several_ranks(monkeypatch, capsys, rank, message_count):
    monkeypatch.setenv("MLX_RANK", rank)
    assert add.main(["runs/none", "more.jsonl", "--name", "more"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == err.count("does not work on several ranks") == message_count


def test_a_rank_without_a_backend_is_an_error(monkeypatch, capsys):
    """The launcher sets rank 1, but no backend connects the ranks."""
    monkeypatch.setenv("MLX_RANK", "1")
    monkeypatch.setattr(ranks, "_world", None)
    with pytest.raises(UserError, match="no backend"):
        world()
    monkeypatch.delenv("MLX_RANK")
    assert world().world_size == 1


def feed() -> Prefetcher:
    """Return a prefetcher of one epoch, with four micro-batches of one row per step."""
    segments = pieces_of((9, 20, 4, 24, 13, 6, 11, 23, 7, 16))
    plan = BatchPlan.plan(Split(segments, len(segments)), DataConfig(max_seq_length=24), 1, 1, 4, seed=1)
    return Prefetcher(plan, None, Library("tiny"), 8, seed=0, steps_before=0, window=ARGS.sliding_window)


def test_micro_batches_are_shared_among_ranks(monkeypatch):
    """Each micro-batch goes to one rank, and each rank knows the counts of all.

    The last step has fewer batches than ranks.
    """
    prefetcher = feed()
    last = len(prefetcher.plan) - 1
    assert 0 < len(prefetcher.plan.step(last)) < 3
    for number in range(last + 1):
        single, shared = prefetcher.work(number), []
        for rank in range(3):
            pretend_rank(monkeypatch, rank, 3)
            shared.append(prefetcher.work(number))
        monkeypatch.undo()
        assert sorted(b.inputs.tolist() for work in shared for b in work.batches) == sorted(
            b.inputs.tolist() for b in single.batches
        )
        tokens = sum(int(b.weights.sum().item()) for b in single.batches)
        for work in shared:
            assert work.sizes == single.sizes
            assert work.global_counts is not None
            assert [value.item() for value in work.global_counts] == [tokens, len(single.batches), 0]
        assert single.global_counts is None
    assert not shared[2].batches


def test_evaluation_batches_are_dealt_round_robin(monkeypatch):
    splits = {name: Split(pieces_of((24,) * count), count) for name, count in (("a", 1), ("b", 1), ("c", 2), ("d", 1))}
    shares = []
    for rank in range(2):
        pretend_rank(monkeypatch, rank, 2)
        domains = make_domains(splits, 24, 1)
        shares.append([len(domain.local_batches) for domain in domains.values()])
    assert shares == [[1, 0, 1, 1], [0, 1, 1, 0]]


def test_checks_on_three_ranks(tmp_path):
    results = launching.run_ranks(
        tmp_path, 3, ["-m", "tests.distributed.ranks_child", "exchange", "errors", "step", "shares", "drifted"], 120
    )
    assert [rank.code for rank in results] == [0] * 3, [rank.err for rank in results]
    assert [rank.err.count("Error") for rank in results] == [0] * 3


def test_a_lost_rank_is_noticed(tmp_path):
    """The rank that is not its neighbour in the ring notices it too."""
    results = launching.run_ranks(tmp_path, 4, ["-m", "tests.distributed.ranks_child", "lost"], 120)
    assert [rank.code for rank in results] == [1, -signal.SIGKILL, 1, 1]
    for number in (0, 2, 3):
        (line,) = results[number].error_lines
        assert line == f"failed: rank {number} of 4 lost another rank, which was stopped or cut off"


def test_a_silent_rank_times_out(tmp_path):
    results = launching.run_ranks(tmp_path, 2, ["-m", "tests.distributed.ranks_child", "silent"], 120)
    assert results[0].code == 1
    assert results[0].err.startswith("failed: rank 0 of 2 got no answer from the other ranks for 1 s")
