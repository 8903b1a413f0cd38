"""Prefetching of step inputs: equal to inputs prepared in turn, from any step, one step ahead, and stopped on close."""

from __future__ import annotations

import threading
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx.config import DataConfig
from dylora_mlx.data.stream import BatchPlan, Split
from dylora_mlx.distributed import group as groups
from dylora_mlx.distributed.group import Group
from dylora_mlx.growth.feature_statistics import FeatureStatistics
from dylora_mlx.growth.library import Library, LibraryEntry
from dylora_mlx.training.skill.prefetch import Prefetcher, StepWork, prefetch
from tests.tiny import ARGS, flat, pieces_of

LENGTHS, ROW = (9, 20, 4, 24, 13, 6, 11, 23, 7, 16), 24


@pytest.fixture
def prefetcher() -> Prefetcher:
    segments, library, rng = pieces_of(LENGTHS), Library("tiny"), np.random.default_rng(0)
    for expert_id in range(2):
        x = rng.normal(size=(30, ARGS.hidden_size)).astype(np.float32)
        library.add(LibraryEntry(f"skill_{expert_id}", expert_id, x[:3], FeatureStatistics.from_features(x), x))
    plan = BatchPlan.plan(Split(segments, len(segments)), DataConfig(max_seq_length=ROW), 3, 1, 2, seed=1)
    return Prefetcher(plan, None, library, 8, seed=0, steps_before=100, window=ARGS.sliding_window)


def same(one: StepWork, other: StepWork) -> bool:
    ours, theirs = flat(one), flat(other)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_prefetched_inputs_equal_those_prepared_in_turn(prefetcher):
    steps = len(prefetcher.plan)
    assert steps > 5
    works = list(prefetcher.steps(0, steps))
    assert len(works) == steps
    for number, work in enumerate(works):
        assert same(work, prefetcher.work(number))
        assert [b.inputs.tolist() for b in work.batches] == [b.inputs.tolist() for b in prefetcher.plan.step(number)]
    assert not mx.array_equal(works[0].memory.features, works[1].memory.features)
    for number, work in enumerate(prefetcher.steps(3, 5), 3):
        assert same(work, works[number])


def test_random_draws_depend_on_the_step_of_the_whole_run(prefetcher):
    later = replace(prefetcher, steps_before=prefetcher.steps_before + 1)
    assert mx.array_equal(later.work(0).memory.features, prefetcher.work(1).memory.features)


def test_keys_of_dropout_depend_on_step_and_micro_batch_alone(prefetcher):
    assert {b.dropout_key for work in prefetcher.steps(0, 3) for b in work.batches} == {None}
    dropping = replace(prefetcher, dropout=True)
    keys = {(n, i): b.dropout_key.tolist() for n in range(4) for i, b in enumerate(dropping.work(n).batches)}
    assert len({tuple(key) for key in keys.values()}) == len(keys) == 8
    work = replace(dropping, steps_before=prefetcher.steps_before + 1).work(2)
    assert [b.dropout_key.tolist() for b in work.batches] == [keys[3, 0], keys[3, 1]]
    assert replace(dropping, seed=1).work(0).batches[0].dropout_key.tolist() != keys[0, 0]


def test_every_number_of_ranks_drops_the_same(prefetcher, monkeypatch):
    dropping, alone = replace(prefetcher, dropout=True), replace(prefetcher, dropout=True).work(1)
    for rank in range(2):
        group = Group(None)
        group.rank, group.world_size = rank, 2
        monkeypatch.setattr(groups, "_world", group)
        (batch,) = dropping.work(1).batches
        assert batch.dropout_key.tolist() == alone.batches[rank].dropout_key.tolist()
        assert mx.array_equal(batch.inputs, alone.batches[rank].inputs)


def test_batches_carry_their_features(prefetcher):
    segments = prefetcher.plan.segments
    values = [np.full((segment.positions, 4), i, np.float16) for i, segment in enumerate(segments)]
    work = replace(prefetcher, features=values).work(2)
    for batch, source in zip(work.batches, prefetcher.plan.step(2), strict=True):
        assert batch.features is not None
        assert batch.features.dtype == mx.float16
        assert batch.features.shape == (*source.inputs.shape, 4)


def test_the_next_item_is_prepared_while_the_current_one_is_used():
    started = [threading.Event() for _ in range(5)]
    threads = set()

    def prepare(number: int) -> int:
        started[number].set()
        threads.add(threading.current_thread().name)
        return number

    for number in prefetch(prepare, range(5)):
        if number < 4:
            assert started[number + 1].wait(5)
        assert not any(later.is_set() for later in started[number + 2 :])
    assert len(threads) == 1
    assert threading.current_thread().name not in threads
    assert not threads & {thread.name for thread in threading.enumerate()}, "the thread ends with the last item"
    assert list(prefetch(prepare, [])) == []


def test_an_error_is_raised_when_its_result_is_due():
    def prepare(number: int) -> int:
        if number == 2:
            raise OSError("gone")
        return number

    seen = []
    with pytest.raises(OSError, match="gone"):
        seen.extend(prefetch(prepare, range(9)))
    assert seen == [0, 1]


def test_closing_early_ends_the_thread(prefetcher):
    before = threading.active_count()
    works = prefetcher.steps(0, len(prefetcher.plan))
    next(works)
    assert threading.active_count() == before + 1
    works.close()
    assert threading.active_count() == before
