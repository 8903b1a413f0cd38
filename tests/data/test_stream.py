"""Streams: a cursor is enough to go on, and features are laid out as the tokens are."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from dylora_mlx.config import DataConfig, Source
from dylora_mlx.data.packing import Batch, Segment
from dylora_mlx.data.stream import BatchPlan, Split, evaluation_batches, gather_rows, prepare_skill
from dylora_mlx.errors import UserError

DATA = DataConfig(max_seq_length=128, packing_window=16)


def make_pieces(count: int, seed: int = 0) -> list[Segment]:
    rng = np.random.default_rng(seed)
    pieces = []
    for number, n in enumerate(rng.integers(4, 120, count)):
        tokens = np.array([2, *rng.integers(10, 4000, n)], np.int32)
        pieces.append(Segment(tokens, np.append(False, rng.random(n) < 0.7), number, 1))
    return pieces


def make_stream(
    batch_size: int = 2, accumulation: int = 2, epochs: int = 2, seed: int = 0, count: int = 50
) -> BatchPlan:
    return BatchPlan.plan(Split(make_pieces(count), count), DATA, epochs, batch_size, accumulation, seed)


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.rows == b.rows
        assert all(np.array_equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))


@pytest.mark.parametrize("cursor", [0, 1, 4])
def test_going_on_from_a_cursor_equals_the_tail_of_a_full_pass(cursor):
    full = list(make_stream().steps())
    tail = list(make_stream().steps(cursor))  # as after a restart: planned afresh from the seed
    assert len(tail) == len(full) - cursor > 0
    for number, (ours, theirs) in enumerate(zip(tail, full[cursor:], strict=True)):
        assert_same(ours, theirs)
        assert_same(make_stream().step(cursor + number), theirs)


def test_steps_stop_where_told():
    stream = make_stream()
    assert len(list(stream.steps(1, 4))) == 3
    assert_same(next(stream.steps(1, 4)), stream.step(1))
    assert len(list(stream.steps(0, 10_000))) == len(stream)
    assert list(stream.steps(len(stream))) == []


def test_another_seed_is_another_order():
    assert make_stream(seed=0).rows != make_stream(seed=1).rows


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (3, 1), (1, 4), (3, 2), (50, 1), (5, 50)])
def test_only_the_last_step_is_short(batch_size, accumulation):
    stream = make_stream(batch_size, accumulation)
    steps = [[len(batch.inputs) for batch in step] for step in stream.steps()]
    assert len(steps) == len(stream)
    assert all(step == [batch_size] * accumulation for step in steps[:-1])
    assert 0 < sum(steps[-1]) <= batch_size * accumulation
    assert all(rows == batch_size for rows in steps[-1][:-1])
    assert sum(map(sum, steps)) == len(stream.rows)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (3, 1), (1, 4), (3, 2), (7, 3), (50, 1), (5, 50)])
def test_fixed_shapes_hold_the_same_rows(batch_size, accumulation):
    free = make_stream(batch_size, accumulation)
    fixed = BatchPlan.plan(Split(make_pieces(50), 50), DATA, 2, batch_size, accumulation, 0, fixed=True)
    assert fixed.rows == free.rows
    assert len(fixed) == len(free)
    learned = []
    for ours, theirs in zip(fixed.steps(), free.steps(), strict=True):
        assert [batch.inputs.shape for batch in ours] == [(batch_size, 128)] * accumulation
        learned += [int(batch.loss_mask.sum()) for batch in ours]
        for batch in ours[len(theirs) :]:
            assert not batch.segment_ids.any()
            assert batch.rows == ((),) * batch_size
        for one, other in zip(ours, theirs, strict=False):
            count, width = other.inputs.shape
            assert one.rows[:count] == other.rows
            for wide, cropped in zip(one[:4], other[:4], strict=True):
                assert np.array_equal(wide[:count, :width], cropped)
                assert not wide[count:].any()
                assert not wide[:, width:].any()
    assert fixed.max_targets == max(learned)
    assert free.max_targets is None


def test_padding_is_counted_as_it_is_computed():
    free, fixed = make_stream(3, 2), BatchPlan.plan(Split(make_pieces(50), 50), DATA, 2, 3, 2, 0, fixed=True)
    tokens = sum(int((batch.segment_ids > 0).sum()) for step in fixed.steps() for batch in step)
    computed = sum(batch.segment_ids.size for step in fixed.steps() for batch in step)
    assert fixed.statistics().padding_fraction == pytest.approx(1 - tokens / computed)
    assert fixed.statistics().padding_fraction > free.statistics().padding_fraction
    assert fixed.statistics().histogram == free.statistics().histogram


def test_fixed_evaluation_batches_have_one_shape():
    pieces = make_pieces(37)
    free, fixed = evaluation_batches(pieces, 128, 4), evaluation_batches(pieces, 128, 4, fixed=True)
    assert {batch.inputs.shape for batch in fixed} == {(4, 128)}
    assert len(free) == len(fixed)
    for one, other in zip(fixed, free, strict=True):
        assert sum(one.rows, ()) == sum(other.rows, ())
        assert one.loss_mask.sum() == other.loss_mask.sum()


def test_a_pass_trains_every_piece_once_an_epoch():
    stream = make_stream(epochs=3)
    seen = Counter(i for step in stream.steps() for batch in step for row in batch.rows for i in row)
    assert seen == dict.fromkeys(range(50), 3)


def test_gather_lays_features_out_as_collate_lays_tokens():
    pieces = make_pieces(40)
    # features that name their position: the token there, its number in the piece and the piece
    values = [
        np.stack([piece.tokens[:-1], np.arange(piece.positions), np.full(piece.positions, i)], -1).astype(np.float32)
        for i, piece in enumerate(pieces)
    ]
    for batch in (*evaluation_batches(pieces, 128, 3), *evaluation_batches(pieces, 128, 50, fixed=True)):
        laid = gather_rows(values, batch)
        assert laid.shape == (*batch.inputs.shape, 3)
        assert laid.dtype == np.float32
        assert np.array_equal(laid[..., 0], batch.inputs)
        assert (laid[batch.segment_ids == 0] == 0).all()
        for r, row in enumerate(batch.rows):
            for segment, index in enumerate(row, 1):
                here = laid[r, batch.segment_ids[r] == segment]
                assert np.array_equal(here[:, 1], np.arange(pieces[index].positions))
                assert (here[:, 2] == index).all()


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_evaluation_covers_every_piece_once(batch_size):
    pieces = make_pieces(37)
    batches = evaluation_batches(pieces, 128, batch_size)
    assert sorted(i for batch in batches for row in batch.rows for i in row) == list(range(37))
    assert all(len(batch.inputs) == batch_size for batch in batches[:-1])
    assert 0 < len(batches[-1].inputs) <= batch_size
    assert sum(int((batch.segment_ids > 0).sum()) for batch in batches) == sum(piece.positions for piece in pieces)
    learned = sorted(t for piece in pieces for t in piece.tokens[1:][piece.loss_mask[1:]].tolist())
    assert sorted(t for batch in batches for t in batch.targets[batch.loss_mask].tolist()) == learned


def test_prepare_tokenises_and_cuts_each_split(tokenizer):
    skill = prepare_skill(Source(name="sql", source="packaged/sql", limit=30), DATA, tokenizer, seed=0)
    assert skill.name == "sql"
    for split in (skill.train, skill.validation, skill.test):
        assert len({piece.document for piece in split.segments}) == split.num_documents
        assert all(piece.positions <= 128 for piece in split.segments)
        assert split.num_tokens == sum(len(piece.tokens) - 1 for piece in split.segments)
    assert (skill.train.num_documents, skill.validation.num_documents, skill.test.num_documents) == (30, 16, 16)
    assert len(skill.train.segments) > 30  # some are longer than a row


def test_the_digest_follows_the_training_data(tokenizer, tmp_path):
    def digest(rows: list[str], seed: int = 0) -> str:
        path = tmp_path / "s.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in rows))
        return prepare_skill(Source(name="s", source=str(path)), DATA, tokenizer, seed).digest

    rows = [f"SELECT {n} FROM numbers;" for n in range(20)]
    assert digest(rows) == digest(rows)
    assert digest(rows) != digest(rows, seed=1)  # other records are held out
    assert digest(rows) != digest(rows[:-1])
    assert digest(rows) != digest([row.replace("SELECT 7 ", "SELECT 77 ") for row in rows] + ["SELECT 21;"])


def test_the_token_digest_sees_one_changed_token_and_the_digest_only_records(tokenizer):
    source = Source(name="sql", source="packaged/sql", limit=5)
    one = prepare_skill(source, DATA, tokenizer, seed=0)
    renamed, other = replace(source, name="other"), replace(source, text="{text} ")
    assert prepare_skill(renamed, DATA, tokenizer, seed=0).token_digest == one.token_digest
    assert prepare_skill(other, DATA, tokenizer, seed=0).token_digest != one.token_digest
    assert prepare_skill(other, DATA, tokenizer, seed=0).digest == one.digest


def test_prepare_names_a_bad_record(tokenizer, tmp_path):
    (tmp_path / "s.jsonl").write_text("\n".join(['{"text": ""}'] * 9))
    with pytest.raises(UserError, match=r"s.jsonl, line \d: the document is empty"):
        prepare_skill(Source(name="s", source=str(tmp_path / "s.jsonl")), DATA, tokenizer, seed=0)
