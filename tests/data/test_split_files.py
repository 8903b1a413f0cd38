"""Splits that a folder, a pattern or a data set brings, under any of their names, in any format, in one file or several."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from pyarrow import Table, feather, parquet

from dylora_mlx.data import split_files
from tests.data.sources import complaint, files_of, numbered, parts_of, read, rows_of, texts, together, write

DRAWN = "drawn from train"


def csv(rows: list[dict]) -> bytes:
    return ("text\n" + "".join(f"{row['text']}\n" for row in rows)).encode()


def paragraphs(rows: list[dict]) -> bytes:
    return "\n\n".join(row["text"] + "." * 1990 for row in rows).encode()


WRITE: dict[str, Callable[[Path, list[dict]], object]] = {
    ".jsonl": write,
    ".ndjson": write,
    ".json": lambda path, rows: path.write_text(json.dumps(rows)),
    ".jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode())),
    ".csv": lambda path, rows: path.write_bytes(csv(rows)),
    ".parquet": lambda path, rows: parquet.write_table(Table.from_pylist(rows), path),
    ".arrow": lambda path, rows: feather.write_feather(Table.from_pylist(rows), path),
    ".txt": lambda path, rows: path.write_bytes(paragraphs(rows)),
}


def text_of(rows: list[dict]) -> list[str]:
    return [row["text"] for row in rows]


def read_texts(*given, **options) -> tuple[list[str], ...]:
    return tuple([text.rstrip(".") for text in part] for part in texts(read(*given, **options)))


@pytest.mark.parametrize("ending", WRITE)
def test_split_files_of_every_format(tmp_path, ending):
    sizes = {"train": 9, "valid": 4, "test": 3}
    for name, count in sizes.items():
        WRITE[ending](tmp_path / f"{name}{ending}", numbered(count, name))
    (tmp_path / "README.md").write_text("# About\n")
    records = read(tmp_path)
    assert read_texts(tmp_path) == tuple(text_of(numbered(count, name)) for name, count in sizes.items())
    assert records.info.split_origins == {
        "train": f"train{ending}", "validation": f"valid{ending}", "test": f"test{ending}",
    }  # fmt: skip
    assert records.info.files == {ending: 3}
    assert files_of(tmp_path) == sorted(f"{name}{ending}" for name in sizes)


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev", "eval", "evaluation", "Valid", "DEV"])
def test_every_name_of_the_validation_split(tmp_path, name):
    write(tmp_path / "train.jsonl", numbered(20, "train"))
    WRITE[".csv"](tmp_path / f"{name}.csv", numbered(4, "held out"))
    records = read(tmp_path)
    assert texts(records)[1] == text_of(numbered(4, "held out"))
    assert records.info.split_origins == {"train": "train.jsonl", "validation": f"{name}.csv", "test": DRAWN}
    assert records.info.records == {"train": 18, "validation": 4, "test": 2}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["train.jsonl", "valid.jsonl", "val.jsonl"], "val.jsonl and valid.jsonl are both the validation split"),
        (["train.jsonl", "dev.jsonl", "eval.csv"], "dev.jsonl and eval.csv are both the validation split"),
        (["train.jsonl", "train.csv"], "train.csv and train.jsonl are both the train split"),
        (
            ["train.jsonl", "train-00000-of-00001.jsonl"],
            "train-00000-of-00001.jsonl and train.jsonl are both the train",
        ),
        (["train.jsonl", "test.jsonl", "test.jsonl.gz"], "test.jsonl and test.jsonl.gz are both the test split"),
        (["train.txt", "valid.txt", "dev.txt"], "dev.txt and valid.txt are both the validation split"),
    ],
)
def test_two_files_of_one_split_are_refused(tmp_path, names, said):
    for name in names:
        WRITE[name[name.index(".") :]](tmp_path / name, numbered(9, name))
    message = complaint(tmp_path)
    assert said in message
    assert message.endswith("keep one of them, or leave one out with the option exclude")
    left = read(tmp_path, exclude=[names[-1]])
    assert {name.partition(".")[0] for name in left.info.split_origins.values()} >= {"train"}


SHARDS = {
    "hub": ["train-00000-of-00003.parquet", "train-00001-of-00003.parquet", "train-00002-of-00003.parquet"],
    "hashed": ["train-00000-of-00002-0a1b2c3d4e5f6a7b.parquet", "train-00001-of-00002-ffffffffffffffff.parquet"],
    "numbers": ["train_2.jsonl", "train_10.jsonl"],
    "from one": ["train-1-of-2.csv", "train-2-of-2.csv"],
    "plain": ["train1.jsonl.gz", "train2.jsonl.gz"],
}


@pytest.mark.parametrize("kind", SHARDS)
def test_shards_are_read_in_their_order(tmp_path, kind):
    for number, name in enumerate(SHARDS[kind]):
        WRITE[name[name.index(".") :]](tmp_path / name, numbered(5, f"shard {number}"))
    WRITE[".jsonl"](tmp_path / "test.jsonl", numbered(3, "test"))
    WRITE[".jsonl"](tmp_path / "dev.jsonl", numbered(3, "dev"))
    records = read(tmp_path)
    assert texts(records)[0] == [f"shard {n} {i}" for n in range(len(SHARDS[kind])) for i in range(5)]
    assert records.info.split_origins["train"] == f"{SHARDS[kind][0]} and {len(SHARDS[kind]) - 1} more"
    assert records.train[6].location.startswith(f"{tmp_path / SHARDS[kind][1]}, ")
    assert len(files_of(tmp_path)) == len(SHARDS[kind]) + 2


def test_a_missing_shard_is_named(tmp_path):
    for number in (0, 2):
        write(tmp_path / f"train-0000{number}-of-00003.jsonl", numbered(5))
    message = complaint(tmp_path)
    assert "train-00000-of-00003.jsonl: of the 3 files of this split, number 1 is missing" in message


@pytest.mark.parametrize("layout", ["data", "subfolders"])
def test_splits_may_be_in_subfolders(tmp_path, layout):
    names = {
        "data": ["data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"],
        "subfolders": ["train/0000.parquet", "validation/0000.parquet"],
    }[layout]
    for name, rows in zip(names, (numbered(10, "train"), numbered(3, "held out")), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        WRITE[".parquet"](tmp_path / name, rows)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / ".gitattributes").write_text("* text\n")
    records = read(tmp_path)
    assert texts(records)[1] == text_of(numbered(3, "held out"))
    assert records.info.split_origins == {"train": names[0], "validation": names[1], "test": DRAWN}
    (tmp_path / "main.py").write_text("x = 1\n" * 9)  # a program beside them: its data are not its text
    assert "records are too few" in complaint(tmp_path)


def test_two_folders_of_one_split_are_refused(tmp_path):
    for name in ("train", "val", "dev"):
        write(tmp_path / name / "a.jsonl", numbered(9, name))
    assert "the folders dev and val are both the validation split" in complaint(tmp_path)


def test_names_of_splits_mean_nothing_in_a_folder_of_programs_or_documents(tmp_path):
    for name in ("train.py", "test.py", "eval.py", "model.py"):
        (tmp_path / "program" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "program" / name).write_text(f"# {name}\n")
    (tmp_path / "program" / "test.json").write_text("[]")
    (tmp_path / "program" / "train").mkdir()
    (tmp_path / "program" / "train" / "config.json").write_text("{}")
    assert sorted(together(texts(read(tmp_path / "program")))) == sorted(
        f"# {name}\n" for name in ("train.py", "test.py", "eval.py", "model.py")
    )
    for name in ("train", "plane", "test", "ship"):
        (tmp_path / "documents" / f"{name}.txt").parent.mkdir(exist_ok=True)
        (tmp_path / "documents" / f"{name}.txt").write_text(f"about a {name}\n")
    assert len(together(texts(read(tmp_path / "documents")))) == 4


def test_the_split_to_train_on_goes_by_any_of_its_names(tmp_path):
    write(tmp_path / "train.jsonl", numbered(10, "train"))
    write(tmp_path / "val.jsonl", numbered(20, "val"))
    write(tmp_path / "extra.jsonl", numbered(30, "extra"))
    for split in ("val", "validation", "dev"):
        assert sorted(together(texts(read(tmp_path, split=split)))) == sorted(text_of(numbered(20, "val")))
    train, validation, _ = texts(read(tmp_path, split="extra"))
    assert {text[:5] for text in train} == {"extra"}
    assert validation == text_of(numbered(20, "val"))
    assert files_of(tmp_path, split="extra") == ["extra.jsonl", "train.jsonl", "val.jsonl"]
    assert f"{tmp_path / 'test.jsonl'}: no such file, the split 'test' of skill 's'" in complaint(
        tmp_path / ".", split="test"
    )


def test_a_folder_with_held_out_files_only_says_what_is_missing(tmp_path):
    WRITE[".csv"](tmp_path / "dev.csv", numbered(9))
    assert f"{tmp_path / 'train.csv'}: no such file, the split 'train'" in complaint(tmp_path / ".")


def test_a_pattern_is_all_its_files(tmp_path):
    for number in range(3):
        write(tmp_path / "data" / f"part-{number}.jsonl", numbered(10, f"part {number}"))
    WRITE[".csv"](tmp_path / "data" / "part-9.csv", numbered(5, "csv"))
    (tmp_path / "data" / "notes.md").write_text("x")
    records = read(tmp_path / "data" / "*.jsonl")
    assert sorted(together(texts(records))) == sorted(
        text for n in range(3) for text in text_of(numbered(10, f"part {n}"))
    )
    assert records.info.split_origins == {"train": "*.jsonl, 3 files", "validation": DRAWN, "test": DRAWN}
    assert len(together(texts(read(tmp_path / "**" / "part-[09]*")))) == 15
    assert len(together(texts(read(tmp_path / "data" / "*.jsonl", exclude=["part-0*"])))) == 20
    assert files_of(tmp_path / "data" / "part-?.*") == ["part-0.jsonl", "part-1.jsonl", "part-2.jsonl", "part-9.csv"]
    assert "matches text, notes.md, and other files, part-0.jsonl" in complaint(tmp_path / "data" / "*")
    assert "no file matches this pattern (skill 's')" in complaint(tmp_path / "data" / "*.parquet")
    assert "no file matches this pattern" in complaint(tmp_path / "dat[x]")
    assert "has no split 'test'" in complaint(tmp_path / "data" / "*.jsonl", split="test")


def test_a_pattern_of_split_files_keeps_the_splits_apart(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test"):
        WRITE[".parquet"](tmp_path / f"{name}.parquet", numbered(6, name))
    records = read(tmp_path / "*.parquet")
    assert texts(records)[2] == text_of(numbered(6, "test"))
    assert [len(part) for part in parts_of(records)] == [11, 1, 6]


def test_a_pattern_of_texts_is_one_document_each(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(f"{number}\n\n" + "x" * 3000)
    assert [row["path"] for row in rows_of(read(tmp_path / "*.txt"))] == [f"{number}.txt" for number in range(5)]


def test_a_path_with_the_characters_of_a_pattern_is_a_path(tmp_path):
    path = write(tmp_path / "a[1]*.jsonl", numbered(9))
    assert rows_of(read(path)) == numbered(9)
    assert read(write(tmp_path / "b[2]" / "train.jsonl", numbered(9)).parent).info.records["train"] == 7


def test_a_folder_of_other_data_says_how_to_name_them(tmp_path):
    write(tmp_path / "a.jsonl", numbered(9))
    WRITE[".csv"](tmp_path / "b.csv", numbered(9))
    message = complaint(tmp_path)
    assert "neither train.jsonl nor text files" in message
    assert "it has a.jsonl, b.csv: name the file, or write a pattern" in message


def test_the_usual_name_comes_first():
    splits = dict.fromkeys(["dev", "valid", "train", "testing", "test"], 0)
    assert {split: name for split, (name, _) in split_files.held_out_splits(splits, "train").items()} == {
        "validation": "valid", "test": "test",
    }  # fmt: skip
    assert split_files.training_split(splits, "evaluation") == "dev"
    assert split_files.training_split(splits, "other") is None


def test_names_of_splits_in_a_saved_dictionary(tmp_path):
    tables = {name: datasets.Dataset.from_list(numbered(9, name)) for name in ("train", "val", "testing")}
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "saved"))
    assert texts(read(tmp_path / "saved")) == tuple(text_of(numbered(9, name)) for name in ("train", "val", "testing"))
