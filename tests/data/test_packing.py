"""Packing: nothing lost, nothing doubled, little padding, and rows laid out as the module's drawing says."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from dylora_mlx import assets
from dylora_mlx.config import DataConfig, Source
from dylora_mlx.data import packing
from dylora_mlx.data.encoding import Document
from dylora_mlx.data.packing import Segment
from dylora_mlx.data.stream import BatchPlan, Split, prepare_skill

BOS, EOS = 2, 1


def document(length: int, first: int = 100) -> Document:
    """BOS, then numbers that occur nowhere else, then EOS."""
    tokens = np.array([BOS, *range(first, first + length - 2), EOS], np.int32)
    return Document(tokens, np.arange(length) > 0)


def pieces_of(positions: list[int]) -> list[Segment]:
    return [Segment(*document(n + 1), number, 1) for number, n in enumerate(positions)]


def lognormal(count: int, seed: int, mean: float = 120, sigma: float = 0.9, cap: int = 512) -> list[int]:
    draws = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(draws.round(), 2, cap).astype(int).tolist()


@pytest.mark.parametrize("window", [1, 7, 64, 10_000])
@pytest.mark.parametrize("epochs", [1, 3])
def test_plan_holds_every_piece_once_an_epoch_in_rows_that_fit(epochs, window):
    lengths = lognormal(150, seed=epochs)
    rows = packing.plan_rows(lengths, 512, epochs, window, seed=4)
    assert Counter(i for row in rows for i in row) == dict.fromkeys(range(150), epochs)
    assert all(0 < sum(lengths[i] for i in row) <= 512 for row in rows)


def test_plan_packs_only_what_has_arrived():
    lengths = lognormal(600, seed=1)
    rows = packing.plan_rows(lengths, 512, 2, 64, seed=0)
    half = len(rows) // 2
    early = Counter(i for row in rows[:half] for i in row)
    assert len(early) > 0.85 * len(lengths)  # the first epoch comes first: few pieces are met twice before the rest


@pytest.mark.parametrize("window", [16, 64])
def test_only_the_last_rows_are_short(window):
    lengths = lognormal(600, seed=3)
    rows = packing.plan_rows(lengths, 512, 1, window, seed=0)
    short = [number for number, row in enumerate(rows) if sum(lengths[i] for i in row) < 0.99 * 512]
    assert all(number >= 0.9 * len(rows) for number in short)


def test_plan_of_nothing_is_empty():
    assert packing.plan_rows([], 512, 2, 64, seed=0) == []


def test_plan_follows_the_seed():
    lengths = lognormal(100, seed=0)
    assert packing.plan_rows(lengths, 512, 2, 32, seed=5) == packing.plan_rows(lengths, 512, 2, 32, seed=5)
    assert packing.plan_rows(lengths, 512, 2, 32, seed=5) != packing.plan_rows(lengths, 512, 2, 32, seed=6)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pads_little_on_lognormal_lengths(seed, batch_size):
    pieces = pieces_of(lognormal(800, seed))
    stream = BatchPlan.plan(Split(pieces, 800), DataConfig(max_seq_length=512), 1, batch_size, 1, seed)
    assert 0 <= stream.statistics().padding_fraction < 0.015


@pytest.mark.parametrize("name", assets.packaged_skills())
def test_pads_little_on_packaged_skills(tokenizer, name):
    data = DataConfig(max_seq_length=768)
    skill = prepare_skill(Source(name=name, source=f"packaged/{name}"), data, tokenizer, seed=0)
    stream = BatchPlan.plan(skill.train, data, 2, 1, 1, seed=0)
    assert 0 <= stream.statistics().padding_fraction < 0.015


def test_statistics_count_positions_of_the_batches():
    pieces = pieces_of([100, 28, 50])
    # widths 128 and 64: 128 + 64 positions, 178 of them filled
    found = packing.packing_stats(pieces, [[[0, 1]], [[2]]], max_seq_length=256)
    assert found.rows == 2
    assert found.padding_fraction == pytest.approx(1 - 178 / 192)
    assert found.histogram == [0, 1, 0, 0, 1, 0, 0, 0]
    assert found.edges == [0, 32, 64, 96, 128, 160, 192, 224, 256]
    # one batch of both rows is as wide as its fullest
    both = packing.packing_stats(pieces, [[[0, 1], [2]]], max_seq_length=256)
    assert both.padding_fraction == pytest.approx(1 - 178 / 256)


def test_statistics_agree_with_the_collated_batches():
    pieces = pieces_of(lognormal(90, seed=8))
    stream = BatchPlan.plan(Split(pieces, 90), DataConfig(max_seq_length=512), 1, 3, 2, 0)
    batches = [batch for step in stream.steps() for batch in step]
    empty = sum(int((b.segment_ids == 0).sum()) for b in batches)
    assert stream.statistics().padding_fraction == pytest.approx(empty / sum(b.segment_ids.size for b in batches))
    assert stream.statistics().rows == sum(len(b.segment_ids) for b in batches) == len(stream.rows)


@pytest.mark.parametrize("length", [3, 16, 17, 18, 32, 33, 34, 50, 161])
def test_long_documents_become_windows_without_overlap(length):
    tokens, learn = document(length)
    pieces = packing.split_documents([Document(tokens, learn)], max_seq_length=16)
    assert all(piece.positions <= 16 for piece in pieces)
    assert all(piece.tokens[0] == BOS and not piece.loss_mask[0] for piece in pieces)
    predicted = np.concatenate([piece.tokens[1:] for piece in pieces])
    assert predicted.tolist() == tokens[1:].tolist()
    for piece in pieces:
        assert piece.tokens[1:].tolist() == tokens[piece.start : piece.start + piece.positions].tolist()


def test_cut_keeps_the_mask_and_the_origin():
    documents = [document(5), document(40, first=500), document(17, first=900)]
    documents[1].loss_mask[3:9] = False
    pieces = packing.split_documents(documents, max_seq_length=16)
    assert [piece.document for piece in pieces] == [0, 1, 1, 1, 2]
    assert [piece.start for piece in pieces] == [1, 1, 17, 33, 1]
    assert [piece.positions for piece in pieces] == [4, 16, 16, 7, 16]
    kept = np.concatenate([piece.loss_mask[1:] for piece in pieces if piece.document == 1])
    assert kept.tolist() == documents[1].loss_mask[1:].tolist()


def test_long_documents_lose_nothing_on_the_way_to_batches():
    documents = [document(n, first=1000 * n) for n in (130, 9, 64, 65, 66, 200)]
    pieces = packing.split_documents(documents, max_seq_length=64)
    rows = packing.plan_rows([piece.positions for piece in pieces], 64, 1, 4, seed=0)
    batch = packing.collate(pieces, rows, 64)
    expected = sorted(int(t) for tokens, _ in documents for t in tokens[1:])
    assert sorted(batch.targets[batch.loss_mask].tolist()) == expected


def test_collate_draws_the_rows_of_the_docstring():
    documents = [
        Document(np.array([2, 10, 11, 12, 1], np.int32), np.array([0, 0, 1, 1, 1], bool)),
        Document(np.array([2, 20, 21, 1], np.int32), np.array([0, 1, 1, 1], bool)),
        Document(np.array([2, 30, 31, 32, 33, 34, 1], np.int32), np.array([0, 1, 0, 1, 1, 1, 1], bool)),
    ]
    batch = packing.collate(packing.split_documents(documents, 9), [[0, 1], [2]], max_seq_length=9)
    assert batch.inputs.tolist() == [[2, 10, 11, 12, 2, 20, 21, 0, 0], [2, 30, 31, 32, 33, 34, 0, 0, 0]]
    assert batch.targets.tolist() == [[10, 11, 12, 1, 20, 21, 1, 0, 0], [30, 31, 32, 33, 34, 1, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0, 0]]
    assert batch.loss_mask.astype(int).tolist() == [[0, 1, 1, 1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 1, 0, 0, 0]]
    assert batch.rows == ((0, 1), (2,))
    assert batch.inputs.dtype == batch.targets.dtype == batch.segment_ids.dtype == np.int32
    assert batch.loss_mask.dtype == bool


@pytest.mark.parametrize(("longest", "width"), [(3, 64), (64, 64), (65, 128), (129, 192), (193, 200), (200, 200)])
def test_a_batch_is_only_as_wide_as_it_needs(longest, width):
    pieces = pieces_of([longest, 2])
    assert packing.collate(pieces, [[0], [1]], max_seq_length=200).inputs.shape == (2, width)


def test_the_last_batch_may_be_narrower():
    stream = BatchPlan.plan(Split(pieces_of([256] * 4 + [20]), 5), DataConfig(max_seq_length=256), 1, 1, 1, seed=0)
    widths = [batch.inputs.shape[1] for step in stream.steps() for batch in step]
    assert sorted(widths) == [64, 256, 256, 256, 256]


def fullest_with_the_longest(lengths: list[int], capacity: int) -> int:
    """By trying all: the fullest row that holds the longest piece."""
    first, *rest = sorted(lengths, reverse=True)
    sums = (first + sum(chosen) for n in range(len(rest) + 1) for chosen in combinations(rest, n))
    return max(total for total in sums if total <= capacity)


@pytest.mark.parametrize("seed", range(40))
def test_every_best_fit_row_is_the_fullest_possible(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(10, 60))
    lengths = rng.integers(1, capacity + 1, int(rng.integers(1, 10))).tolist()
    rows = packing.best_fit(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    left = list(lengths)
    for row in rows:
        taken = [lengths[i] for i in row]
        assert max(taken) == max(left)
        assert sum(taken) == fullest_with_the_longest(left, capacity)
        for length in taken:
            left.remove(length)


def test_best_fit_beats_greedy_where_greedy_leaves_a_gap():
    # by decreasing length greedy takes 6 + 5 of 12 and leaves a gap; 6 + 3 + 3 fills the row
    rows = packing.best_fit([6, 5, 3, 3, 7], 12)
    assert [sum([6, 5, 3, 3, 7][i] for i in row) for row in rows] == [12, 12]


def test_best_fit_prefers_long_pieces_among_equal_fills():
    lengths = [6, 4, 2, 2, 1, 1, 1, 1]
    assert [lengths[i] for i in packing.best_fit(lengths, 10)[0]] == [6, 4]


def test_refuses_a_piece_longer_than_a_row():
    with pytest.raises(ValueError, match="a piece of 17 positions does not fit a row of 16"):
        packing.best_fit([3, 17, 2], 16)
    with pytest.raises(ValueError, match="17 positions"):
        packing.plan_rows([3, 17, 2], 16, 1, 8, seed=0)


def test_pieces_that_fill_no_row_do_not_pile_up():
    lengths = [400 + number % 100 for number in range(1200)]
    rows = packing.plan_rows(lengths, 512, 1, 16, seed=0)
    arrived = np.random.default_rng(0).permutation(1200)[: packing.MAX_WAITING + 2 * 16]
    assert {index for row in rows[:100] for index in row} <= set(arrived.tolist())


def test_like_lengths_are_packed_as_full_as_they_go():
    rows = packing.plan_rows([150 + number % 11 for number in range(2000)], 512, 1, 256, seed=0)
    assert sum(len(row) == 3 for row in rows) >= len(rows) - 8
