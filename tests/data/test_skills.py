"""Sources: every kind of loader, its splits, and one line for what cannot be read."""

from __future__ import annotations

import json
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import datasets
import httpx
import pyarrow
import pytest
from huggingface_hub.errors import GatedRepoError

from dylora_mlx.assets import packaged_skills
from dylora_mlx.config import Source
from dylora_mlx.data import formatting, skills
from dylora_mlx.data.records import Record
from tests.data.sources import complaint, numbered, parts_of, read, rows_of, texts, together, write

LOCAL = Path(__file__).parents[3] / "shared" / "data"
needs_local = pytest.mark.skipif(not LOCAL.is_dir(), reason=f"no data sets in {LOCAL}")


def test_a_jsonl_file_is_split_by_the_seed(tmp_path):
    path = write(tmp_path / "s.jsonl", numbered(50))
    train, validation, test = texts(read(path, seed=3))
    assert (len(train), len(validation), len(test)) == (40, 5, 5)
    assert sorted(train + validation + test) == sorted(row["text"] for row in numbered(50))
    assert texts(read(path, seed=3)) == (train, validation, test)
    other = texts(read(path, seed=4))
    assert set(other[1]) != set(validation)
    assert set(other[2]) != set(test)


@pytest.mark.parametrize("count", [3, 4, 11, 137])
def test_seeded_splits_cover_sources_of_any_size(tmp_path, count):
    splits = texts(read(write(tmp_path / "s.jsonl", numbered(count))))
    assert all(splits)
    assert sorted(together(splits)) == sorted(row["text"] for row in numbered(count))


@pytest.mark.parametrize("count", [1, 2])
def test_a_source_too_small_to_split_is_refused(tmp_path, count):
    message = complaint(write(tmp_path / "s.jsonl", numbered(count)))
    assert f"{count} records are too few to hold some out" in message


def test_jsonl_is_read_as_it_comes(tmp_path):
    path = tmp_path / "s.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in ("é", "a\u2028b", "c", "d")]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    assert sorted(together(texts(read(path)))) == sorted(["é", "a\u2028b", "c", "d"])


def test_a_column_that_the_first_record_lacks_is_kept(tmp_path):
    rows = [{"text": "a"}, *({"text": "b", "input": "x"} for _ in range(9))]
    records = read(write(tmp_path / "s.jsonl", rows))
    assert rows_of(records) == [{"text": "a"}, *rows[1:]]


def test_records_of_different_forms_may_share_a_file(tmp_path, tokenizer):
    rows = [
        {"text": "plain"},
        {"prompt": "ask ", "completion": "answer"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
    ]
    records = read(write(tmp_path / "s.jsonl", rows * 4))
    encoded = [e for part in parts_of(records) for e in formatting.encode_records(part, records.source, tokenizer)]
    documents = [document for _, of_record in encoded for document in of_record]
    heads = sorted(tokenizer.decode(d.tokens[1:-1].tolist())[:5] for d in documents)
    assert heads == sorted(["plain", "ask a", "<star"] * 4)


def test_a_folder_with_split_files_is_used_as_it_is(tmp_path):
    for name, count in (("train", 8), ("validation", 3), ("test", 2)):
        write(tmp_path / f"{name}.jsonl", numbered(count, name))
    train, validation, test = texts(read(tmp_path))
    assert train == [row["text"] for row in numbered(8, "train")]
    assert validation == [row["text"] for row in numbered(3, "validation")]
    assert test == [row["text"] for row in numbered(2, "test")]


def test_a_missing_split_file_is_drawn_from_train(tmp_path):
    write(tmp_path / "train.jsonl", numbered(20, "train"))
    write(tmp_path / "test.jsonl", numbered(4, "test"))
    train, validation, test = texts(read(tmp_path))
    assert len(validation) == 2
    assert sorted(train + validation) == sorted(row["text"] for row in numbered(20, "train"))
    assert test == [row["text"] for row in numbered(4, "test")]


def test_training_on_another_split_never_holds_out_the_same_records(tmp_path):
    write(tmp_path / "train.jsonl", numbered(10, "train"))
    write(tmp_path / "test.jsonl", numbered(20, "test"))
    splits = texts(read(tmp_path, split="test"))
    assert sorted(together(splits)) == sorted(row["text"] for row in numbered(20, "test"))
    assert "no such file, the split 'validation'" in complaint(tmp_path / ".", split="validation")


def test_a_folder_of_text_files_is_one_document_each(tmp_path):
    for number in range(10):
        (tmp_path / f"part_{number % 2}").mkdir(exist_ok=True)
        (tmp_path / f"part_{number % 2}" / f"f{number}.py").write_text(f"x = {number}\n")
    (tmp_path / "empty.py").write_text("  \n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")
    records = read(tmp_path)
    assert sorted(together(texts(records))) == [f"x = {number}\n" for number in range(10)]
    paths = {row["path"] for row in rows_of(records)}
    assert paths == {f"part_{number % 2}/f{number}.py" for number in range(10)}


@pytest.mark.parametrize("name", packaged_skills())
def test_packaged_skills_bring_their_splits(name):
    records = read(f"packaged/{name}")
    folder = skills.assets.SKILLS / name
    for split, found in zip(skills.SPLITS, texts(records), strict=True):
        lines = (folder / f"{split}.jsonl").read_text("utf-8").splitlines()
        assert found == [json.loads(line)["text"] for line in lines]


def test_limit_draws_from_each_split_by_the_seed():
    everything, few = texts(read("packaged/sql")), texts(read("packaged/sql", limit=10))
    assert [len(split) for split in few] == [10, 10, 10]
    assert all(set(part) <= set(whole) for part, whole in zip(few, everything, strict=True))
    assert few[0] != everything[0][:10]
    assert texts(read("packaged/sql", limit=10)) == few
    assert texts(read("packaged/sql", limit=10, seed=1)) != few
    assert texts(read("packaged/sql", limit=10_000)) == everything


def test_contains_keeps_matching_records_of_any_column_and_case(tmp_path):
    rows = [{"text": f"row {n}", "tag": "PyThon" if n % 3 == 0 else "rust"} for n in range(30)]
    splits = texts(read(write(tmp_path / "s.jsonl", rows), contains="pYTHON"))
    assert sorted(together(splits)) == sorted(f"row {n}" for n in range(0, 30, 3))
    assert "no record contains 'cobol'" in complaint(tmp_path / "s.jsonl", contains="cobol")


def test_contains_looks_into_values_as_templates_show_them(tmp_path):
    rows = [{"text": f"row {n}", "tags": ["A", "b c"] if n % 2 else {"x": True}, "nothing": None} for n in range(20)]
    path = write(tmp_path / "s.jsonl", rows)
    assert len(rows_of(read(path, contains="B C"))) == 10
    assert len(rows_of(read(path, contains='{"x": true}'))) == 10
    assert "no record contains 'None'" in complaint(path, contains="None")


def test_limit_counts_what_contains_has_kept(tmp_path):
    rows = numbered(40, "wanted") + numbered(40, "other")
    splits = texts(read(write(tmp_path / "s.jsonl", rows), contains="wanted", limit=12))
    assert len(together(splits)) == 12
    assert all(text.startswith("wanted") for text in together(splits))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file has no records"),
        (b'{"text": "a"}\n\n{"text": \n', "line 3: not JSON"),
        (b'{"text": "a"}\n["b"]\n', "line 2: a JSON list, but every line must be one JSON object"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: not UTF-8 (byte 0xff)"),
        (b'[\n{"text": "a"},\n{"text": "b"}\n]\n', "line 1: not JSON (Expecting value); every line must be one JSON"),
        (b'{"text": "a"}\n' + b"[" * 100_000, "line 2: not JSON (nested too deeply)"),
    ],
)
def test_a_malformed_file_is_named_by_line(tmp_path, content, reason):
    (tmp_path / "s.jsonl").write_bytes(content)
    assert reason in complaint(tmp_path / "s.jsonl")


def test_what_is_not_there_is_named(tmp_path):
    assert "no such file or folder (skill 's')" in complaint(tmp_path / "gone.jsonl")
    assert "no such file or folder" in complaint(tmp_path / "gone")
    assert "no such file or folder" in complaint("data/gone.jsonl")
    assert "no such file or folder" in complaint("gone")
    assert "no such packaged skill, there are flask, python, requests" in complaint("packaged/gone")
    assert "neither train.jsonl nor text files" in complaint(tmp_path)
    assert "has no split 'test'" in complaint(write(tmp_path / "s.jsonl", numbered(9)), split="test")


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub: a function that sets what loading gives or raises, and the list of what was asked."""
    asked = []

    def serve(answer):
        def load_dataset(*arguments):
            asked.append(arguments)
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return serve


def table(count: int, prefix: str) -> datasets.Dataset:
    return datasets.Dataset.from_list(numbered(count, prefix))


def test_a_hub_data_set_brings_its_splits(hub):
    answer = {"train": table(9, "train"), "validation": table(4, "validation"), "test": table(3, "test")}
    asked = hub(datasets.DatasetDict(answer | {"prompt": table(5, "prompt")}))
    records = read("owner/set", subset="small")
    assert asked == [("owner/set", "small")]
    assert texts(records) == tuple(answer[name]["text"][:] for name in skills.SPLITS)


def test_a_hub_data_set_without_held_out_splits_is_split(hub):
    hub(datasets.DatasetDict({"extra": table(30, "extra"), "train": table(30, "train")}))
    splits = texts(read("owner/set", split="extra"))
    assert [len(part) for part in splits] == [24, 3, 3]
    assert sorted(together(splits)) == sorted(f"extra {n}" for n in range(30))
    assert "no split 'gone', there are extra, train" in complaint("owner/set", split="gone")


@pytest.mark.parametrize("name", ["valid", "val", "dev", "eval"])
def test_a_hub_data_set_may_call_its_validation_split_otherwise(hub, name):
    hub(datasets.DatasetDict({"train": table(20, "train"), name: table(4, "held out")}))
    records = read("owner/set")
    assert texts(records)[1] == [f"held out {n}" for n in range(4)]
    origins = {"train": "owner/set, split train", "validation": f"owner/set, split {name}", "test": "drawn from train"}
    assert records.info.split_origins == origins
    assert records.validation[1].location == f"owner/set ({name}), record 2"


def test_the_usual_name_of_a_split_comes_first_where_a_data_set_has_several(hub):
    hub(
        datasets.DatasetDict(
            {"dev": table(4, "dev"), "train": table(20, "train"), "validation": table(3, "validation")}
        )
    )
    assert texts(read("owner/set"))[1] == [f"validation {n}" for n in range(3)]
    trained, validation, _ = texts(read("owner/set", split="dev", limit=3))  # each split is used once
    assert {text[:3] for text in trained} == {"dev"}
    assert {text[:10] for text in validation} == {"validation"}


def test_values_of_a_hub_data_set_are_plain(hub):
    rows = [
        {
            "text": "a",
            "args": {"city": "Bern"},
            "when": datetime(2026, 1, 2, 3),
            "price": Decimal("1.10"),
            "raw": b"\xff",
        },
        {"text": "b", "args": {"amount": 0}, "when": None, "price": None, "raw": b"yes"},
        {"text": "c", "args": {}, "when": None, "price": None, "raw": None},
    ]
    hub(datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}))
    assert rows_of(read("owner/set")) == [
        {
            "text": "a",
            "args": {"city": "Bern"},
            "when": "2026-01-02T03:00:00",
            "price": "1.10",
        },  # bytes that are no text
        {"text": "b", "args": {"amount": 0}, "when": None, "price": None, "raw": "yes"},
        {"text": "c", "args": {}, "when": None, "price": None, "raw": None},
    ]


def test_pictures_of_a_hub_data_set_are_left_out(hub):
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    rows = [{"text": f"t {n}", "image": {"bytes": b"\x89PNG no picture", "path": "a.png"}} for n in range(5)]
    stored = pyarrow.Table.from_pylist(rows, schema=features.arrow_schema)
    hub(datasets.DatasetDict({"train": datasets.Dataset(datasets.table.InMemoryTable(stored))}))
    records = read("owner/set")
    assert rows_of(records) == [{"text": f"t {n}"} for n in range(5)]


def test_include_and_exclude_are_for_folders(hub, tmp_path):
    hub(datasets.DatasetDict({"train": table(9, "train")}))
    assert "include and exclude choose files of a local folder" in complaint("owner/set", include=["*.py"])
    assert "this is one file" in complaint(write(tmp_path / "s.jsonl", numbered(9)), exclude=["*.py"])


def test_a_hub_name_may_hold_a_dot(hub):
    asked = hub(datasets.DatasetDict({"train": table(9, "train")}))
    read("owner/set-v1.5")
    assert asked == [("owner/set-v1.5", None)]


def test_a_gated_data_set_says_how_to_be_let_in(hub):
    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co/api/datasets/owner/set"))
    hub(GatedRepoError("403 Client Error.\n\nCannot access gated repo", response=response))
    assert "owner/set: this data set is gated; accept its terms" in complaint("owner/set")
    hub(datasets.exceptions.DatasetNotFoundError("Dataset 'owner/set' is a gated dataset on the Hub.\nAsk for access."))
    assert "owner/set: this data set is gated; accept its terms" in complaint("owner/set")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionError("Couldn't reach 'owner/set' on the Hub\nMaxRetryError"), "(Couldn't reach 'owner/set' on the"),
        (ConnectionError(), "(ConnectionError)"),
        (ConnectionError("\n\nOffline"), "(Offline)"),
        (ValueError("x" * 1000), "(" + "x" * 200 + ")"),
    ],
)
def test_an_unreachable_hub_is_one_line(hub, error, reason):
    hub(error)
    message = complaint("owner/set")
    assert message.startswith("owner/set: not a local path, and the hub data set could not be loaded")
    assert reason in message
    assert message.endswith("check the name and the connection, or give the path of a local copy")


def whole_and_learned(record: Record, source: Source, tokenizer) -> tuple[str, str]:
    """The text of a record's only document, and the learned part of it, without BOS and EOS."""
    _, (document,) = formatting.encode_record(record, source, tokenizer)
    tokens, loss_mask = document.tokens[1:-1], document.loss_mask[1:-1]
    return tokenizer.decode(tokens.tolist()), tokenizer.decode(tokens[loss_mask].tolist())


@needs_local
def test_mbpp(tokenizer):
    records = read(LOCAL / "mbpp", preset="mbpp")
    assert [len(part) for part in parts_of(records)] == [374, 90, 500]
    row = records.train[0].row
    code = f"{row['code']}\n"
    found = whole_and_learned(records.train[0], records.source, tokenizer)
    assert found == (f'"""\n{row["text"]}\n"""\n{code}', code)


@needs_local
def test_code_alpaca(tokenizer):
    records = read(LOCAL / "code_alpaca", preset="code_alpaca", contains="python")
    found = rows_of(records)
    assert all("python" in json.dumps(row).lower() for row in found)
    lines = [
        line for n in ("train", "test") for line in (LOCAL / f"code_alpaca/{n}.jsonl").read_text("utf-8").split("\n")
    ]
    assert len(found) == sum("python" in line.lower() for line in lines) > 250
    trained, validated = (
        {(record.row["instruction"], record.row["input"]) for record in part} for part in parts_of(records)[:2]
    )
    assert not trained & validated
    _, learned = whole_and_learned(records.train[0], records.source, tokenizer)
    assert learned == f"{records.train[0].row['output']}\n"
