"""Work prepared ahead: the same as prepared in turn, from any step, one step ahead, and gone when it is closed."""

from __future__ import annotations

import threading
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx.config import DataConfig
from dylora_mlx.data.stream import BatchPlan, Split
from dylora_mlx.growth.gate_init import FeatureStatistics
from dylora_mlx.growth.library import Library, LibraryEntry
from dylora_mlx.training.skill.prefetch import Prefetcher, StepWork, prefetch
from tests.tiny import ARGS, flat, pieces_of

LENGTHS, ROW = (9, 20, 4, 24, 13, 6, 11, 23, 7, 16), 24


@pytest.fixture
def feed() -> Prefetcher:
    pieces, library, rng = pieces_of(LENGTHS), Library("tiny"), np.random.default_rng(0)
    for expert_id in range(2):
        x = rng.normal(size=(30, ARGS.hidden_size)).astype(np.float32)
        library.add(LibraryEntry(f"skill_{expert_id}", expert_id, x[:3], FeatureStatistics.from_features(x), x))
    plan = BatchPlan.plan(Split(pieces, len(pieces)), DataConfig(max_seq_length=ROW), 3, 1, 2, seed=1)
    return Prefetcher(plan, None, library, 8, seed=0, steps_before=100, window=ARGS.sliding_window)


def same(one: StepWork, other: StepWork) -> bool:
    ours, theirs = flat(one), flat(other)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_work_ahead_is_the_work_in_turn(feed):
    steps = len(feed.plan)
    assert steps > 5
    works = list(feed.steps(0, steps))
    assert len(works) == steps
    for number, work in enumerate(works):
        assert same(work, feed.work(number))
        assert [b.inputs.tolist() for b in work.batches] == [b.inputs.tolist() for b in feed.plan.step(number)]
    assert not mx.array_equal(works[0].memory.features, works[1].memory.features)
    for number, work in enumerate(feed.steps(3, 5), 3):
        assert same(work, works[number])


def test_draws_follow_the_steps_of_the_whole_run(feed):
    later = replace(feed, steps_before=feed.steps_before + 1)
    assert mx.array_equal(later.work(0).memory.features, feed.work(1).memory.features)


def test_features_come_along(feed):
    pieces = feed.plan.segments
    values = [np.full((piece.positions, 4), i, np.float16) for i, piece in enumerate(pieces)]
    work = replace(feed, features=values).work(2)
    for batch, source in zip(work.batches, feed.plan.step(2), strict=True):
        assert batch.features is not None
        assert batch.features.dtype == mx.float16
        assert batch.features.shape == (*source.inputs.shape, 4)


def test_the_next_is_made_while_the_last_is_used():
    begun = [threading.Event() for _ in range(5)]
    makers = set()

    def make(number: int) -> int:
        begun[number].set()
        makers.add(threading.current_thread().name)
        return number

    for number in prefetch(make, range(5)):
        if number < 4:
            assert begun[number + 1].wait(5)
        assert not any(later.is_set() for later in begun[number + 2 :])
    assert len(makers) == 1
    assert threading.current_thread().name not in makers
    assert not makers & {thread.name for thread in threading.enumerate()}, "it ends with the last"
    assert list(prefetch(make, [])) == []


def test_an_error_comes_when_its_result_is_due():
    def make(number: int) -> int:
        if number == 2:
            raise OSError("gone")
        return number

    seen = []
    with pytest.raises(OSError, match="gone"):
        seen.extend(prefetch(make, range(9)))
    assert seen == [0, 1]


def test_closing_early_ends_the_thread(feed):
    before = threading.active_count()
    works = feed.steps(0, len(feed.plan))
    next(works)
    assert threading.active_count() == before + 1
    works.close()
    assert threading.active_count() == before
