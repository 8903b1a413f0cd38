"""Files of every format: the values that come out are those of the file, and one line says what cannot be read."""

from __future__ import annotations

import bz2
import datetime
import decimal
import gzip
import json
import lzma
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import datasets
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import feather, parquet

from dylora_mlx.data import readers
from tests.data.sources import complaint, files_of, numbered, parts_of, read, rows_of, texts, together

ROWS = [
    {"id": "007", "n": 2**70 + 1, "x": 0.1, "args": {"city": "Bern"}, "tags": []},
    {"id": "NA", "n": -3, "x": 1e-7, "args": {"amount": 0}},
    {"id": "1.10", "n": None, "x": 1e22, "args": {"amount": 2.5, "deep": [{"a": 1}, {"b": None}, "c"]}},
    {"id": "", "n": True, "x": "0.1", "args": None, "\u00e9": "\u2028\U0001f600"},
]


def zst(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst,
}  # fmt: skip


def json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


JSON_FILES: dict[str, Callable[[list[dict]], str]] = {
    "s.jsonl": json_lines,
    "s.ndjson": json_lines,
    "s.JSONL": json_lines,
    "s.json": json.dumps,
    "pretty.json": lambda rows: json.dumps(rows, indent=2, ensure_ascii=False),
    "object.json": lambda rows: json.dumps({"version": 2, "names": ["a"], "data": rows}),
    "lines.json": json_lines,
    "no_ending": json_lines,
    "array.dat": json.dumps,
}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", [name for name in JSON_FILES if name not in ("no_ending", "array.dat")])
def test_json_values_come_out_unchanged(tmp_path, name, compression):
    path = tmp_path / f"{name}{compression}"
    path.write_bytes(COMPRESS[compression](b"\xef\xbb\xbf" + JSON_FILES[name](ROWS).encode()))
    records = readers.read_file(path)
    assert [record.row for record in records] == ROWS
    assert [[type(value) for value in record.row.values()] for record in records] == [
        [type(value) for value in row.values()] for row in ROWS
    ]
    part = "line" if JSON_FILES[name] is json_lines else "record"
    assert [record.location for record in records] == [f"{path}, {part} {n}" for n in range(1, 5)]
    assert files_of(path) == [path.name]


@pytest.mark.parametrize("name", ["no_ending", "array.dat"])
def test_json_under_an_unknown_ending_is_read(tmp_path, name):
    path = tmp_path / name
    path.write_text("\n  " + JSON_FILES[name](ROWS))
    assert [record.row for record in readers.read_file(path)] == ROWS


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.text(), json_values, max_size=4), min_size=1, max_size=4))
def test_any_json_values_come_out_unchanged(tmp_path, rows):
    for name, encode in JSON_FILES.items():
        # One object in a .json file is no record: it may hold the list of records.
        if name not in ("no_ending", "array.dat", "object.json") and (name != "lines.json" or len(rows) > 1):
            (tmp_path / name).write_text(encode(rows), "utf-8")
            assert repr([record.row for record in readers.read_file(tmp_path / name)]) == repr(rows)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("s.json", "", "the file has no records"),
        ("s.json", "[]", "the file has no records"),
        ("s.json", '{"data": []}', "without a list of records"),
        ("s.json", "3", "a JSON int; needed is an array of objects"),
        ("s.json", '{"text": ["a", "b"]}', "a JSON object without a list of records; needed is an array of objects"),
        ("s.json", '{"messages": [{"role": "user"}]}', "without a list of records"),
        ("s.json", '{"train": [{"a": 1}], "test": [{"a": 1}]}', "several lists of records (train, test)"),
        ("s.json", '[{"text": "a"},\n{"text": }]', "line 2: not JSON (Expecting value)"),
        ("s.json", '[{"text": "a"}, "b"]', "record 2: a JSON str, but every record must be an object"),
        ("s.json", '{"text": "a"}\n{"text": \n', "line 2: not JSON (Expecting value); every line must be one JSON object"),
        ("s.json", "[" * 100_000, "not JSON (nested too deeply)"),
        ("s.json", "[" + "9" * 5000 + "]", "not JSON (a number too long)"),
        ("s.jsonl", '[\n{"text": "a"}\n]\n', "every line must be one JSON object; a file with one JSON array ends in .json"),
        ("s.csv", "text\n", "the file has no records"),
        ("s.csv", "", "the file has no records"),
        ("s.csv", "a,b\n1,2\n1,2,3\n", "line 3: 3 fields, but the first line names 2 columns (a, b)"),
        ("s.csv", 'a,b\n"x\ny",2\n1\n', "line 4: 1 fields, but the first line names 2 columns"),
        ("s.csv", "a,a\n1,2\n", "line 1: two columns are called 'a'"),
        ("s.csv", 'a,b\n1,2\n"x"y,2\n', "line 3: not CSV"),
        ("s.csv", 'a,b\n1,2\n3,"x\n', "line 3: not CSV (unexpected end of data)"),
        ("s.txt", " \n\n", "the file has no records"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_line_or_record(tmp_path, name, content, reason):
    (tmp_path / name).write_text(content)
    assert reason in complaint(tmp_path / name)


def test_csv_values_stay_the_text_that_they_are(tmp_path):
    rows = [
        {"id": "007", "text": 'a, "b"\nc', "note": "NA"},
        {"id": "1.10", "text": " spaces ", "note": ""},
        {"id": "True", "text": "x" * 200_000, "note": "None"},
        {"id": "1e3", "text": "\u00e9\u2028", "note": "nan"},
    ]
    cell = '"a, ""b""\nc"'
    content = f"id,text,note\n007,{cell},NA\n1.10, spaces ,\n\nTrue,{'x' * 200_000},None\n1e3,\u00e9\u2028,nan\n"
    (tmp_path / "s.csv").write_text("\ufeff" + content)
    records = readers.read_file(tmp_path / "s.csv")
    assert [record.row for record in records] == rows
    assert [record.location.rpartition(" ")[2] for record in records] == ["2", "4", "6", "7"]
    (tmp_path / "s.csv.gz").write_bytes(gzip.compress(content.replace("\n", "\r\n").encode()))
    assert [record.row for record in readers.read_file(tmp_path / "s.csv.gz")] == [
        rows[0] | {"text": 'a, "b"\r\nc'},
        *rows[1:],
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("s.tsv", "id\ttext\n01\ta, b\n02\tc;d\n"),
        ("s.csv", "id;text\n01;a, b\n02;'c'\n"),
        ("s.csv", "id\ttext\n01\ta, b\n02\tc;d\n"),
        ("s.csv", "text\na\n\nb\n"),
    ],
)
def test_columns_may_be_divided_by_other_characters(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    header, *lines = (line for line in content.splitlines() if line)
    delimiter = next((mark for mark in "\t;" if mark in header), None)
    expected = [dict(zip(header.split(delimiter), line.split(delimiter), strict=True)) for line in lines]
    assert [record.row for record in readers.read_file(tmp_path / name)] == expected


TABLE = {
    "id": ["007", None, "1.10"],
    "n": pyarrow.array([2**64 - 1, 0, None], pyarrow.uint64()),
    "x": pyarrow.array([0.1, 16777216.0, None], pyarrow.float32()),
    "half": pyarrow.array([0.1, 2.0, None], pyarrow.float16()),
    "price": [decimal.Decimal("1.10"), None, decimal.Decimal("-2.00")],
    "day": [datetime.date(2026, 1, 2), None, None],
    "at": pyarrow.array([datetime.datetime(2026, 1, 2, 3, 4), None, None], pyarrow.timestamp("ns")),
    "kind": pyarrow.array(["a", "b", "a"]).dictionary_encode(),
    "args": [{"city": "Bern"}, {"amount": 0}, {"deep": {"a": [{"b": 1}, {"c": ""}]}}],
    "raw": [b"\xff", b"text", None],
    "nothing": pyarrow.nulls(3),
}
VALUES = [
    {"id": "007", "n": 2**64 - 1, "x": 0.1, "half": 0.1, "price": "1.10", "day": "2026-01-02",
     "at": "2026-01-02T03:04:00", "kind": "a", "args": {"city": "Bern"}, "nothing": None},
    {"id": None, "n": 0, "x": 16777216.0, "half": 2.0, "price": None, "day": None, "at": None, "kind": "b",
     "args": {"amount": 0}, "raw": "text", "nothing": None},
    {"id": "1.10", "n": None, "x": None, "half": None, "price": "-2.00", "day": None, "at": None, "kind": "a",
     "args": {"deep": {"a": [{"b": 1}, {"c": ""}]}}, "raw": None, "nothing": None},
]  # fmt: skip


@pytest.mark.parametrize("name", ["s.parquet", "s.PARQUET", "s.arrow", "stream.arrow", "with [brackets]*.parquet"])
def test_tables_are_read_without_changing_a_value(tmp_path, name):
    table, path = pyarrow.table(TABLE), tmp_path / name
    if name == "stream.arrow":
        with pyarrow.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    elif name.endswith(".arrow"):
        feather.write_feather(table, path)
    else:
        parquet.write_table(table, path, row_group_size=2)
    records = readers.read_file(path)
    assert [record.row for record in records] == VALUES
    assert [record.location for record in records] == [f"{path}, record {n}" for n in (1, 2, 3)]
    assert files_of(path) == [name]


def test_objects_that_the_library_keeps_as_json_are_decoded(tmp_path):
    """Since version 4.8 `datasets` stores mixed values as JSON text, with its own type."""
    rows = [{"q": 1, "args": {"city": "Bern"}}, {"q": 2, "args": {"amount": 0}}, {"q": 3, "args": [None, "x"]}]
    mixed = datasets.Dataset.from_dict(
        {name: [row[name] for row in rows] for name in rows[0]}, on_mixed_types="use_json"
    )
    mixed.to_parquet(str(tmp_path / "s.parquet"))
    mixed.save_to_disk(str(tmp_path / "saved"))
    assert [record.row for record in readers.read_file(tmp_path / "s.parquet")] == rows
    assert rows_of(read(tmp_path / "saved")) == rows


def test_shards_with_other_columns_are_not_brought_into_one_form(tmp_path):
    parquet.write_table(pyarrow.table({"text": ["a"] * 9, "n": [1] * 9}), tmp_path / "train-00000-of-00002.parquet")
    parquet.write_table(pyarrow.table({"text": ["b"] * 9, "n": ["1"] * 9}), tmp_path / "train-00001-of-00002.parquet")
    assert rows_of(read(tmp_path)) == [{"text": "a", "n": 1}] * 9 + [{"text": "b", "n": "1"}] * 9


def test_a_saved_data_set_is_split(tmp_path):
    datasets.Dataset.from_list(numbered(20)).save_to_disk(str(tmp_path / "saved"))
    records = read(tmp_path / "saved")
    assert [len(part) for part in parts_of(records)] == [16, 2, 2]
    assert sorted(together(texts(records))) == sorted(row["text"] for row in numbered(20))
    assert records.info.files == {".arrow": 1}
    assert records.info.split_origins["train"] == "saved, split train"
    assert files_of(tmp_path / "saved") == ["data-00000-of-00001.arrow", "dataset_info.json", "state.json"]
    (tmp_path / "saved" / "data-00000-of-00001.arrow").write_bytes(b"ARROW1 and no more")
    assert "cannot be read as a saved data set" in complaint(tmp_path / "saved")


def test_a_saved_dictionary_brings_its_splits(tmp_path):
    saved = {
        "train": numbered(20),
        "dev": numbered(4, "dev"),
        "test": numbered(3, "test"),
        "extra": numbered(9, "extra"),
    }
    tables = {name: datasets.Dataset.from_list(rows) for name, rows in saved.items()}
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "saved"))
    records = read(tmp_path / "saved")
    expected = tuple([row["text"] for row in saved[name]] for name in ("train", "dev", "test"))
    assert texts(records) == expected
    assert records.test[2].location == f"{tmp_path / 'saved'} (test), record 3"
    assert sorted(texts(read(tmp_path / "saved", split="extra"))[0]) == sorted(row["text"] for row in saved["extra"])
    assert "no split 'gone', there are dev, extra, test, train" in complaint(tmp_path / "saved", split="gone").replace(
        "train, dev, test, extra", "dev, extra, test, train"
    )
    assert len(files_of(tmp_path / "saved")) == 13


PARAGRAPHS = [f"Paragraph {n}.\n" + "\n".join(f"    line {n} {i} of it" for i in range(3)) for n in range(200)]


@pytest.mark.parametrize("name", ["book.txt", "BOOK.TXT", "book.md", "book.txt.gz", "book.sql"])
def test_a_long_text_is_cut_at_paragraphs(tmp_path, name):
    separators = ["\n\n", "\n \t\n", "\n\n\n\n"]
    content = "\n\n" + "".join(text + separators[n % 3] for n, text in enumerate(PARAGRAPHS))
    path = tmp_path / name
    path.write_bytes(COMPRESS[".gz" if name.endswith(".gz") else ""](content.encode()))
    records = readers.read_file(path)
    lines = content.split("\n")
    for record in records:
        text, line = record.row["text"], int(record.location.rpartition(" ")[2])
        assert record.location == f"{path}, line {line}"
        assert text in content
        assert text.split("\n")[0] == lines[line - 1]
        assert len(text) <= readers.TEXT_DOCUMENT
    found = [part.strip("\n") for record in records for part in record.row["text"].replace(" \t", "").split("\n\n")]
    assert [part for part in found if part] == PARAGRAPHS
    for one, other in pairwise(records):  # greedy: the next paragraph would not have fitted
        paragraph = next(text for text in PARAGRAPHS if other.row["text"].startswith(text))
        assert len(one.row["text"]) + 2 + len(paragraph) > readers.TEXT_DOCUMENT
    assert rows_of(read(path)) == sorted((dict(record.row) for record in records), key=str)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a" * 25, ["a" * 10, "a" * 10, "a" * 5]),
        ("aaaaaa\n  bbbb\ncccc", ["aaaaaa", "  bbbb", "cccc"]),
        ("One two. Three four.", ["One two.", "Three", "four."]),
        ("aaaa bbbb cccc", ["aaaa bbbb", "cccc"]),
        ("aaaa bbbbb cccc", ["aaaa bbbbb", "cccc"]),
        ("aaaaaa bbbbbb\n\ncc", ["aaaaaa", "bbbbbb\n\ncc"]),
        ("\u00e9\u00e9 \U0001f600" * 4,
         ["\u00e9\u00e9 \U0001f600\u00e9\u00e9 \U0001f600\u00e9\u00e9", "\U0001f600\u00e9\u00e9 \U0001f600"]),
    ],
)  # fmt: skip
def test_a_paragraph_is_cut_only_if_it_is_too_long(text, parts):
    assert [part for _, part in readers.cut(text, 10)] == parts


@settings(deadline=None, max_examples=200)
@given(st.text(st.sampled_from("ab. \n\r\t\u00e9"), max_size=200), st.integers(4, 30))
def test_a_cut_loses_nothing_but_white_space(text, size):
    pieces = readers.cut(text, size)
    assert "".join("".join(part.split()) for _, part in pieces) == "".join(text.split())
    for line, part in pieces:
        assert 0 < len(part.strip()) <= len(part) <= size
        assert part in text
        assert part.split("\n")[0] in text.split("\n")[line - 1]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("report.pdf", b"%PDF-1.7\n", "a PDF document; what is read: .jsonl"),
        ("notes.docx", b"PK\x03\x04...", "a ZIP archive or an office document"),
        ("data.zip", b"PK\x03\x04...", "a ZIP archive or an office document"),
        ("image.png", b"\x89PNG\r\n", "a picture"),
        ("base.sqlite", b"SQLite format 3\0", "an SQLite database"),
        ("a.log", b"plain text", "the ending .log is not known; what is read"),
        ("LICENSE", b"plain text", "a file without an ending; what is read"),
        ("a.bin", b"\0\1\2", "the ending .bin is not known"),
        ("s.dat", gzip.compress(b'{"text": "a"}', mtime=0), "gzip-compressed; what is read"),
        ("s.parquet.gz", gzip.compress(b"PAR1", mtime=0), "gzip-compressed; what is read"),
        ("s.tar.gz", gzip.compress(b"x", mtime=0), "gzip-compressed"),
        ("table", b"PAR1", "a Parquet file"),
        ("s.parquet", b"PAR1 and no more", "cannot be read as Parquet ("),
        ("s.parquet", b"", "cannot be read as Parquet ("),
        ("s.arrow", b"ARROW1 and no more", "cannot be read as Arrow ("),
        ("s.jsonl", gzip.compress(b"x", mtime=0), "line 1: not UTF-8 (byte 0x8b: gzip-compressed); convert the file"),
        ("s.csv", "a,b".encode("utf-16"), "line 1: not UTF-8 (byte 0xff: UTF-16 text)"),
        ("s.txt", b"one\ntwo\xe9\n", "line 2: not UTF-8 (byte 0xe9); convert the file"),
        ("s.jsonl.gz", b'{"text": "a"}', "cannot be decompressed (Not a gzipped file"),
        ("s.jsonl.gz", gzip.compress(b"x" * 99, mtime=0)[:-9], "cannot be decompressed ("),
        ("s.json.bz2", bz2.compress(b"x" * 99)[:-9], "cannot be decompressed ("),
        ("s.csv.xz", lzma.compress(b"x" * 99)[:-9], "cannot be decompressed ("),
        ("s.txt.zst", zst(b"x" * 99)[:-2], "cannot be decompressed ("),
        ("s.txt.zst", b"nonsense", "cannot be decompressed (ZSTD"),
    ],
)
def test_a_file_that_is_not_read_says_what_it_is(tmp_path, name, content, what, caplog):
    (tmp_path / name).write_bytes(content)
    assert what in complaint(tmp_path / name)
    assert not caplog.records


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "s.jsonl").mkdir()
    with pytest.raises(Exception, match=r"s.jsonl: cannot be read \(Is a directory\)"):
        readers.read_file(tmp_path / "s.jsonl")
    with pytest.raises(Exception, match=r"s: cannot be read \(No such file"):
        readers.read_file(tmp_path / "s")


def test_files_by_their_endings(tmp_path):
    path = tmp_path / "a.b.JSONL.GZ"
    path.write_bytes(gzip.compress(json_lines(numbered(9)).encode()))
    records = read(path)
    assert records.info.files == {".jsonl.gz": 1}
    assert records.info.split_origins["train"] == "a.b.JSONL.GZ"


def test_local_formats_leave_no_copy_in_the_librarys_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    parquet.write_table(pyarrow.table({"text": ["a", "b", "c"]}), tmp_path / "s.parquet")
    read(tmp_path / "s.parquet")
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["s.parquet"]
