"""Copies among records: one text never stands in two of the splits that we draw, and is counted in those that a source brings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dylora_mlx.config import Source
from dylora_mlx.data import duplicates
from dylora_mlx.data.records import Record, hold_out
from tests.data.sources import complaint, numbered, parts_of, read, texts, together, write


def distinct(records) -> list[set[str]]:
    return [set(part) for part in texts(records)]


@pytest.mark.parametrize("seed", range(4))
def test_all_copies_of_a_text_go_into_one_split(tmp_path, seed):
    rows = [{"text": f"text {n % 20}", "id": n} for n in range(200)]
    records = read(write(tmp_path / "s.jsonl", rows), seed=seed)
    train, validation, test = distinct(records)
    assert not train & validation | train & test | validation & test
    assert [len(part) for part in parts_of(records)] == [160, 20, 20]
    assert sorted(record.row["id"] for part in parts_of(records) for record in part) == list(range(200))
    assert records.info.duplicates == 180
    assert records.info.leaked == {}
    assert records.info.records == {"train": 160, "validation": 20, "test": 20}


def test_a_text_with_many_copies_is_not_held_out(tmp_path):
    rows = numbered(20) + [{"text": "the same"}] * 181
    for seed in range(10):
        train, validation, test = texts(read(write(tmp_path / "s.jsonl", rows), seed=seed))
        assert train.count("the same") == 181
        assert len(validation) == len(test) == 2


def test_few_texts_with_many_copies_are_divided(tmp_path):
    rows = [{"text": f"text {n % 4}"} for n in range(40)]
    records = read(write(tmp_path / "s.jsonl", rows))
    assert [len(part) for part in parts_of(records)] == [20, 10, 10]
    assert records.info.leaked == {}


@pytest.mark.parametrize("different", [1, 2])
def test_too_few_texts_are_divided_by_records_and_counted(tmp_path, different):
    rows = [{"text": f"text {n % different}"} for n in range(40)]
    records = read(write(tmp_path / "s.jsonl", rows))
    assert [len(part) for part in parts_of(records)] == [32, 4, 4]
    assert records.info.leaked == {"validation": 4, "test": 4}
    assert records.info.duplicates == 40 - different


def test_a_split_of_its_own_is_counted_and_left_as_it_is(tmp_path):
    write(tmp_path / "train.jsonl", numbered(20) + numbered(3))
    write(tmp_path / "valid.jsonl", numbered(5, "held out") + numbered(2))
    records = read(tmp_path)
    assert texts(records)[1] == [row["text"] for row in numbered(5, "held out") + numbered(2)]
    trained, tested = set(texts(records)[0]), set(texts(records)[2])
    assert not trained & tested
    assert records.info.leaked == {"validation": sum(text in trained for text in ("text 0", "text 1"))}
    assert records.info.duplicates == 5


def test_copies_of_test_are_counted_too(tmp_path):
    for name, rows in (("train", numbered(9)), ("dev", numbered(3, "dev")), ("test", numbered(4))):
        write(tmp_path / f"{name}.jsonl", rows)
    assert read(tmp_path).info.leaked == {"test": 4}


@pytest.mark.parametrize(
    ("one", "other", "options", "same"),
    [
        ({"text": "a", "id": 1}, {"text": "a", "id": 2}, {}, True),
        ({"text": "a"}, {"text": "a "}, {}, False),
        ({"text": "a"}, {"text": "A"}, {}, False),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b", "x": [1]}, {}, True),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "c"}, {}, False),
        ({"prompt": "a", "completion": "b"}, {"text": "ab"}, {}, False),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "response": "b"}, {}, True),
        ({"q": 1, "a": 2, "n": 3}, {"q": 1, "a": 2, "n": 4}, {"prompt": "{q}", "completion": "{a}"}, True),
        ({"q": 1, "a": 2, "n": 3}, {"q": 1, "a": 2, "n": 4}, {"text": "{n}"}, False),
        ({"instruction": "a", "output": "b", "text": "x"}, {"instruction": "a", "output": "b", "input": ""}, {}, True),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            {
                "messages": [
                    {"content": [{"type": "text", "text": "a"}], "role": "user"},
                    {"role": "model", "content": "b"},
                ]
            },
            {},
            True,
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
            {},
            False,
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            {},
            True,
        ),
        ({"nothing": 1}, {"nothing": 1}, {}, True),
        ({"nothing": 1}, {"nothing": 2}, {}, False),
        ({"text": "\ud800"}, {"text": "\ud800"}, {}, True),
    ],
)
def test_what_is_learned_makes_a_copy(one, other, options, same):
    source = Source(name="s", source="x", **options)
    keys = {duplicates.content_key(Record(row, "here"), source) for row in (one, other)}
    assert (len(keys) == 1) is same


def test_equal_files_of_a_folder_are_copies(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.py").write_text(f"x = {number % 10}\n")
    records = read(tmp_path)
    assert records.info.duplicates == 20
    train, validation, test = distinct(records)
    assert not train & (validation | test)


def old_draw(rows: list, validation: float, test: float, seed: int) -> tuple[list, list, list]:
    """The draws as they have always been: a fraction of all records, one split after the other."""
    count = len(rows)
    train, first = hold_out(rows, max(1, round(validation * count)), seed)
    train, second = hold_out(train, max(1, round(test * count)), seed + 1)
    return train, first, second


@pytest.mark.parametrize("count", [4, 11, 40, 137])
@pytest.mark.parametrize("seed", [0, 7])
def test_without_copies_the_splits_are_the_ones_of_always(tmp_path, count, seed):
    """Results of earlier runs depend on these draws, bit for bit."""
    rows = numbered(count)
    found = texts(read(write(tmp_path / "s.jsonl", rows), seed=seed))
    assert found == tuple([row["text"] for row in part] for part in old_draw(rows, 0.1, 0.1, seed))


def test_the_draws_are_these(tmp_path):
    train = [f"text {n}" for n in (1, 0, 11, 2, 7, 10, 4, 8, 3, 5)]
    assert texts(read(write(tmp_path / "s.jsonl", numbered(12)), seed=0)) == (train, ["text 9"], ["text 6"])


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.integers(1, 30), st.integers(1, 30), st.integers(0, 5))
def test_groups_are_held_out_whole(numbers, max_records, max_groups, seed):
    source = Source(name="s", source="x")
    records = [Record({"text": str(number), "id": i}, "here") for i, number in enumerate(numbers)]
    groups = duplicates.group_copies(duplicates.with_keys(records, source))
    kept, held_out = duplicates.hold_out_copies(groups, max_records, max_groups, seed)
    assert held_out
    assert sorted(keyed.record.row["id"] for copies in kept + held_out for keyed in copies) == list(range(len(numbers)))
    assert not {copies[0].record.row["text"] for copies in kept} & {copies[0].record.row["text"] for copies in held_out}
    if len(held_out) > 1:
        assert len(held_out) <= max_groups
        assert sum(map(len, held_out)) <= max_records
    if len(groups) == len(records):
        order = np.random.default_rng(seed).permutation(len(records))
        count = min(max_records, max_groups)
        assert [copies[0].record.row["id"] for copies in held_out] == [int(i) for i in order[:count]]
        assert [copies[0].record.row["id"] for copies in kept] == [int(i) for i in order[count:]]


def test_limit_is_drawn_before_copies_are_counted(tmp_path):
    rows = [{"text": f"text {n % 10}"} for n in range(100)]
    records = read(write(tmp_path / "s.jsonl", rows), limit=30)
    assert sum(records.info.records.values()) == 30
    assert records.info.duplicates == 30 - len(set(together(texts(records))))


def test_info_comes_back_from_its_values(tmp_path):
    info = read(write(tmp_path / "s.jsonl", [{"text": f"text {n % 9}"} for n in range(40)])).info
    assert type(info).from_dict(json.loads(json.dumps(info.to_dict()))) == info


def test_too_few_records_are_still_refused(tmp_path: Path):
    assert "2 records are too few to hold some out for test" in complaint(
        write(tmp_path / "s.jsonl", [{"text": "a"}] * 2)
    )
