"""Packing, over documents, row lengths and plans that hypothesis draws: nothing is lost, doubled, mixed or out of shape."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from dylora_mlx.config import DataConfig
from dylora_mlx.data import packing, stream
from dylora_mlx.data.encoding import Document
from dylora_mlx.data.packing import Batch, Segment
from dylora_mlx.data.stream import BatchPlan, Split

EACH = 1000
"""Token `EACH * document + position`: every token tells where it comes from."""
checked = settings(deadline=None, derandomize=True, max_examples=40)


@st.composite
def documents(draw) -> list[Document]:
    """Documents of 3 to 150 tokens, each token with a flag whether it is learned, never the first."""
    lengths = draw(st.lists(st.integers(3, 150), min_size=1, max_size=15))
    rng, made = np.random.default_rng(draw(st.integers(0, 999))), []
    for number, length in enumerate(lengths, 1):
        learn = np.append(False, rng.random(length - 1) < 0.6)
        learn[-1] = True
        made.append(Document(np.arange(length, dtype=np.int32) + EACH * number, learn))
    return made


lengths_of_rows = st.integers(16, 96)


@st.composite
def plans(draw) -> tuple[list[Document], BatchPlan, int]:
    """Documents, their stream, and the number of passes over them."""
    found, epochs = draw(documents()), draw(st.integers(1, 3))
    data = DataConfig(max_seq_length=draw(lengths_of_rows), packing_window=draw(st.integers(1, 30)))
    split = Split(packing.split_documents(found, data.max_seq_length), len(found))
    rows, accumulation = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return (
        found,
        BatchPlan.plan(split, data, epochs, rows, accumulation, draw(st.integers(0, 99)), draw(st.booleans())),
        epochs,
    )


def batches(plan: BatchPlan) -> list[Batch]:
    return [batch for step in plan.steps() for batch in step]


@checked
@given(documents(), lengths_of_rows)
def test_windows_predict_every_token_but_the_first_once(found, max_seq_length):
    pieces = packing.split_documents(found, max_seq_length)
    assert all(1 <= piece.positions <= max_seq_length for piece in pieces)
    for number, (tokens, learn) in enumerate(found):
        own = [piece for piece in pieces if piece.document == number]
        assert all(piece.tokens[0] == tokens[0] and not piece.loss_mask[0] for piece in own)
        assert np.array_equal(np.concatenate([piece.tokens[1:] for piece in own]), tokens[1:])
        assert np.array_equal(np.concatenate([piece.loss_mask[1:] for piece in own]), learn[1:])
        assert [piece.start for piece in own] == list(range(1, len(tokens), max_seq_length))


@checked
@given(plans())
def test_every_token_is_a_target_once_a_pass(made):
    found, plan, epochs = made
    every = Counter(int(token) for batch in batches(plan) for token in batch.targets[batch.segment_ids > 0])
    assert every == {int(token): epochs for tokens, _ in found for token in tokens[1:]}
    learned = Counter(int(token) for batch in batches(plan) for token in batch.targets[batch.loss_mask])
    assert learned == {int(t): epochs for tokens, learn in found for t, own in zip(tokens, learn, strict=True) if own}


@checked
@given(plans())
def test_no_target_crosses_a_document(made):
    _, plan, _ = made
    for batch in batches(plan):
        real = batch.segment_ids > 0
        assert np.array_equal(batch.inputs[real] // EACH, batch.targets[real] // EACH)
        follows = (batch.targets == batch.inputs + 1) | (batch.inputs % EACH == 0)  # or a later window's, after the BOS
        assert follows[real].all()
        same = real[:, 1:] & (batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1])
        assert np.array_equal(batch.inputs[:, 1:][same], batch.targets[:, :-1][same])


@checked
@given(plans())
def test_each_piece_begins_anew_and_lies_in_one_row(made):
    _, plan, _ = made
    for batch in batches(plan):
        for row, segments in enumerate(batch.segment_ids):
            filled = int((segments > 0).sum())
            assert (segments[:filled] > 0).all(), "padding comes last"
            assert (np.diff(segments[:filled]) >= 0).all()
            assert sorted({*segments.tolist()} - {0}) == list(range(1, len(batch.rows[row]) + 1))
            for segment, number in enumerate(batch.rows[row], 1):
                places = np.flatnonzero(segments == segment)
                assert np.array_equal(places, np.arange(places[0], places[-1] + 1))
                assert np.array_equal(batch.inputs[row, places], plan.segments[number].tokens[:-1])
                assert batch.inputs[row, places[0]] % EACH == 0, "a piece begins with its document's first token"
            nothing = [array[row, filled:].any() for array in (batch.inputs, batch.targets, batch.loss_mask)]
            assert nothing == [False] * 3


@checked
@given(plans())
def test_shapes_hold(made):
    _, plan, _ = made
    steps = list(plan.steps())
    assert len(steps) == len(plan)
    for step in steps:
        assert 1 <= len(step) <= plan.grad_accumulation_steps
        for batch in step:
            rows, width = batch.inputs.shape
            assert 1 <= rows <= plan.batch_size
            assert width <= plan.max_seq_length
            assert all(part.shape == (rows, width) for part in (batch.targets, batch.loss_mask, batch.segment_ids))
            kinds = [part.dtype for part in (batch.inputs, batch.targets, batch.segment_ids, batch.loss_mask)]
            assert kinds == [np.int32, np.int32, np.int32, bool]
    if plan.max_targets is not None:
        assert {batch.inputs.shape for step in steps for batch in step} == {(plan.batch_size, plan.max_seq_length)}
        assert {len(step) for step in steps} == {plan.grad_accumulation_steps}
        assert max(int(batch.loss_mask.sum()) for step in steps for batch in step) == plan.max_targets


@checked
@given(plans(), st.data())
def test_a_cursor_goes_on_where_it_was(made, data):
    _, plan, _ = made
    start = data.draw(st.integers(0, len(plan)))
    tail, whole = list(plan.steps(start)), list(plan.steps())
    assert len(tail) == len(whole) - start
    for ours, theirs in zip(tail, whole[start:], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(one[:4], other[:4], strict=True))
            assert one.rows == other.rows


@checked
@given(
    st.lists(st.integers(1, 60), max_size=60),
    st.integers(60, 90),
    st.integers(1, 3),
    st.integers(1, 70),
    st.integers(0, 9),
)
def test_a_plan_holds_every_piece_once_a_pass(lengths, capacity, epochs, window, seed):
    rows = packing.plan_rows(lengths, capacity, epochs, window, seed)
    assert Counter(index for row in rows for index in row) == dict.fromkeys(range(len(lengths)), epochs)
    assert all(0 < sum(lengths[index] for index in row) <= capacity for row in rows)


@checked
@given(documents(), lengths_of_rows, st.integers(1, 4), st.booleans())
def test_evaluation_sees_every_piece_once(found, max_seq_length, batch_size, fixed):
    pieces = packing.split_documents(found, max_seq_length)
    made = stream.evaluation_batches(pieces, max_seq_length, batch_size, fixed)
    assert sorted(number for batch in made for row in batch.rows for number in row) == list(range(len(pieces)))
    assert sum(int(batch.loss_mask.sum()) for batch in made) == sum(int(learn.sum()) for _, learn in found)
    if fixed:
        assert {batch.inputs.shape for batch in made} == {(batch_size, max_seq_length)}


@checked
@given(plans())
def test_gathered_values_lie_where_their_tokens_do(made):
    _, plan, _ = made
    values = [piece.tokens[:-1, None].astype(np.float32) for piece in plan.segments]
    for batch in batches(plan):
        assert np.array_equal(stream.gather_rows(values, batch)[..., 0], batch.inputs)


@checked
@given(plans())
def test_statistics_are_those_of_the_batches(made):
    _, plan, _ = made
    found = batches(plan)
    filled, size = (
        sum(int(part.sum()) for part in parts)
        for parts in ([b.segment_ids > 0 for b in found], [np.ones_like(b.segment_ids) for b in found])
    )
    measured = plan.statistics()
    assert measured.rows == len(plan.rows) == sum(measured.histogram)
    assert measured.padding_fraction == pytest.approx(1 - filled / size)


def test_a_piece_is_what_the_tests_take_it_for():
    assert Segment(np.arange(5), np.ones(5, bool), 0, 1).positions == 4
