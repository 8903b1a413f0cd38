"""Tokenised sources are kept: a hit is what would have been made, and whatever documents follow from makes a miss."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from dylora_mlx import assets
from dylora_mlx.config import DataConfig, Source
from dylora_mlx.data import cache, skills, stream
from dylora_mlx.data.stream import Skill, prepare_skill
from dylora_mlx.data.tokenized import SPLITS
from dylora_mlx.errors import UserError
from dylora_mlx.model.base.tokenizer import RenderingTokenizer, Tokenizer

DATA = DataConfig(max_seq_length=64)
PAIRS = [{"prompt": f"-- {n} of them\n", "completion": f"SELECT {n} FROM numbers;", "kind": "ab"[n % 2]} for n in range(40)]  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """An empty cache of the test's own; the folder of the token files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dylora_mlx" / "tokens"


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(assets.BASE)


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The sources that were read, one entry for each time."""
    seen, read = [], skills.read_source

    def counted(source: Source, data: DataConfig, seed: int) -> Any:
        seen.append(source.source)
        return read(source, data, seed)

    monkeypatch.setattr(skills, "read_source", counted)
    return seen


def write(path: Path, rows: list[dict] = PAIRS) -> Source:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(name="s", source=str(path))


def assert_same(one: Skill, other: Skill) -> None:
    assert one.digest == other.digest
    for split in SPLITS:
        ours, theirs = getattr(one, split), getattr(other, split)
        assert ours.num_documents == theirs.num_documents
        for a, b in zip(ours.segments, theirs.segments, strict=True):
            assert np.array_equal(a.tokens, b.tokens)
            assert np.array_equal(a.loss_mask, b.loss_mask)
            assert (a.tokens.dtype, a.loss_mask.dtype) == (np.int32, bool)
            assert (a.document, a.start) == (b.document, b.start)


def files(home: Path) -> list[Path]:
    return sorted(home.iterdir()) if home.is_dir() else []


def test_a_hit_is_what_was_made_and_reads_nothing(tmp_path, tokenizer, reads, monkeypatch):
    source = write(tmp_path / "s.jsonl")
    made = prepare_skill(source, DATA, tokenizer, 0)
    monkeypatch.setattr(skills, "read_source", None)
    fresh = Tokenizer(assets.BASE)
    assert_same(prepare_skill(source, DATA, fresh, 0), made)
    assert "wrapped" not in vars(fresh)  # nor is the tokenizer loaded
    assert len(reads) == 1


@pytest.mark.parametrize("name", ["packaged/sql", "texts"])
def test_folders_are_kept_too(tmp_path, tokenizer, reads, name):
    for number in range(12):
        write(tmp_path / "texts" / "deep" / f"{number}.txt", PAIRS[number:])
    source = Source(name="s", source=name if name == "packaged/sql" else str(tmp_path / name), limit=20)
    made = prepare_skill(source, DATA, tokenizer, 0)
    assert_same(prepare_skill(source, DATA, tokenizer, 0), made)
    assert len(reads) == 1


def test_a_hit_in_another_process_imports_no_datasets(tmp_path, tokenizer, home):
    source = write(tmp_path / "s.jsonl")
    made = prepare_skill(source, DATA, tokenizer, 0)
    code = (
        "import sys\n"
        "from dylora_mlx import assets\n"
        "from dylora_mlx.config import DataConfig, Source\n"
        "from dylora_mlx.data.stream import prepare_skill\n"
        "from dylora_mlx.model.base.tokenizer import Tokenizer\n"
        "source = Source(name='s', source=sys.argv[1])\n"
        "print(prepare_skill(source, DataConfig(max_seq_length=64), Tokenizer(assets.BASE), 0).digest)\n"
        "print([name for name in ('datasets', 'pandas', 'transformers', 'mlx_lm') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, source.source], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == [made.digest, "[]"]
    assert len(files(home)) == 1


def test_what_no_document_depends_on_hits(tmp_path, tokenizer, reads):
    source = write(tmp_path / "s.jsonl")
    made = prepare_skill(source, DATA, tokenizer, 0)
    elsewhere = str(shutil.copytree(tmp_path, tmp_path / "copy") / "s.jsonl")
    assert_same(prepare_skill(replace(source, name="t", rank=3, alpha=1.0, source=elsewhere), DATA, tokenizer, 0), made)
    packed = prepare_skill(source, replace(DATA, max_seq_length=16, packing_window=2, feature_cache_mb=1), tokenizer, 0)
    assert packed.train.num_tokens == made.train.num_tokens
    assert len(packed.train.segments) > len(made.train.segments)
    assert len(reads) == 1


CHANGED = {
    "preset": "mbpp", "text": "{prompt}", "prompt": "{kind}", "completion": "{kind}", "messages": "chat",
    "contains": "1", "subset": "main", "split": "validation", "limit": 9, "mask_prompt": False,
    "include": ["*.jsonl"], "exclude": ["*.md"],
}  # fmt: skip


def test_every_option_that_documents_follow_from_makes_another_key(tmp_path, tokenizer):
    for split in ("train", "validation"):
        write(tmp_path / "folder" / f"{split}.jsonl")
    assert {*CHANGED, "name", "source", "rank", "alpha"} == {entry.name for entry in fields(Source)}
    base = Source(name="s", source=str(tmp_path / "folder"), prompt="{prompt}", completion="{completion}")
    changed = [replace(base, **{name: value}) for name, value in CHANGED.items()]
    datas = [replace(DATA, **{name: 0.2}) for name in ("validation_fraction", "test_fraction")]
    keys = [cache.cache_key(one, DATA, tokenizer, 0) for one in (base, *changed)]
    keys += [cache.cache_key(base, data, tokenizer, 0) for data in datas] + [cache.cache_key(base, DATA, tokenizer, 1)]
    assert None not in keys
    assert len(set(keys)) == len(keys)


def test_a_changed_option_seed_or_file_is_read_again(tmp_path, tokenizer, reads):
    source = write(tmp_path / "s.jsonl")
    made = prepare_skill(source, DATA, tokenizer, 0)
    assert prepare_skill(source, DATA, tokenizer, 1).digest != made.digest
    assert prepare_skill(replace(source, limit=12), DATA, tokenizer, 0).digest != made.digest
    assert prepare_skill(source, replace(DATA, test_fraction=0.3), tokenizer, 0).digest != made.digest
    write(tmp_path / "s.jsonl", [*PAIRS[:-1], {"prompt": "a", "completion": "b", "kind": "c"}])
    assert prepare_skill(source, DATA, tokenizer, 0).digest != made.digest
    write(tmp_path / "s.jsonl")
    assert_same(prepare_skill(source, DATA, tokenizer, 0), made)
    assert len(reads) == 5


def test_files_of_a_folder_count_by_name_and_content(tmp_path, tokenizer):
    for split in SPLITS:
        write(tmp_path / "split" / f"{split}.jsonl")
        write(tmp_path / "text" / f"{split}.txt")

    def keys() -> list[str | None]:
        sources = [Source(name="s", source=str(tmp_path / name)) for name in ("split", "text")]
        return [cache.cache_key(source, DATA, tokenizer, 0) for source in sources]

    before = keys()
    (tmp_path / "split" / "notes.md").write_text("not read")
    (tmp_path / "text" / "picture.png").write_text("not read")
    assert keys() == before
    write(tmp_path / "split" / "validation.jsonl", PAIRS[:-1])
    (tmp_path / "text" / "test.txt").rename(tmp_path / "text" / "other.txt")
    assert all(now != old for now, old in zip(keys(), before, strict=True))
    one, folder = write(tmp_path / "one" / "train.jsonl"), Source(name="s", source=str(tmp_path / "one"))
    assert cache.cache_key(one, DATA, tokenizer, 0) != cache.cache_key(folder, DATA, tokenizer, 0)


def write_format(folder: Path, name: str, rows: list[dict]) -> Source:
    """Write the rows as a source of another format than JSON lines."""
    source = Source(name="s", source=str(folder / name), prompt="{prompt}", completion="{completion}")
    if name == "saved":
        shutil.rmtree(folder / name, ignore_errors=True)
        datasets.Dataset.from_list(rows).save_to_disk(source.source)
    elif name == "*.jsonl":
        for number in range(2):
            write(folder / f"part-{number}.jsonl", rows[number::2])
    elif name == "shards":
        for number in range(2):
            write(folder / name / f"train-0000{number}-of-00002.jsonl", rows[number::2])
    elif name == "s.parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), source.source)
    elif name == "s.json.gz":
        Path(source.source).write_bytes(gzip.compress(json.dumps({"data": rows}).encode(), mtime=0))
    elif name == "s.csv":
        lines = [",".join(f'"{value}"' for value in row.values()) + "\n" for row in rows]
        Path(source.source).write_text("prompt,completion,kind\n" + "".join(lines))
    return source


@pytest.mark.parametrize("name", ["saved", "*.jsonl", "shards", "s.parquet", "s.json.gz", "s.csv"])
def test_every_format_is_kept_and_a_changed_file_read_again(tmp_path, tokenizer, reads, name):
    source = write_format(tmp_path, name, PAIRS)
    made = prepare_skill(source, DATA, tokenizer, 0)
    again = prepare_skill(source, DATA, tokenizer, 0)
    assert_same(again, made)
    assert again.info == made.info
    assert made.info.split_origins["validation"] == "drawn from train"
    assert len(reads) == 1
    write_format(tmp_path, name, [*PAIRS[:-1], {"prompt": "a", "completion": "b", "kind": "c"}])
    assert prepare_skill(source, DATA, tokenizer, 0).digest != made.digest
    assert len(reads) == 2


def test_what_was_found_comes_from_the_cache_too(tmp_path, tokenizer, reads):
    write(tmp_path / "s" / "train.jsonl", PAIRS * 2)
    write(tmp_path / "s" / "dev.jsonl", PAIRS[:5])
    source = Source(name="s", source=str(tmp_path / "s"))
    made = prepare_skill(source, DATA, tokenizer, 0).info
    assert (made.duplicates, made.leaked["validation"]) == (45, 5)
    assert prepare_skill(source, DATA, tokenizer, 0).info == made
    assert len(reads) == 1


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_changed_tokenizer_is_another_key(tmp_path, tokenizer, name):
    source, folder = write(tmp_path / "s.jsonl"), tmp_path / "base"
    shutil.copytree(assets.BASE, folder)
    same = Tokenizer(folder)
    assert cache.cache_key(source, DATA, same, 0) == cache.cache_key(source, DATA, tokenizer, 0)
    with (folder / name).open("a") as file:
        file.write(" ")
    assert cache.cache_key(source, DATA, Tokenizer(folder), 0) != cache.cache_key(source, DATA, same, 0)


def test_what_cannot_be_identified_is_not_kept(tmp_path, tokenizer, home, reads):
    source = write(tmp_path / "s.jsonl")
    # Any tokenizer will do, but nothing tells this one from another.
    for _ in range(2):
        prepare_skill(
            source, DATA, RenderingTokenizer(tokenizer.wrapped._tokenizer), 0
        )  # any tokenizer will do, but nothing tells it from another
    assert len(reads) == 2
    assert files(home) == []
    assert cache.cache_key(Source(name="s", source="some/hub"), DATA, tokenizer, 0) is None
    write(tmp_path / "folder" / "train.jsonl")
    lacking = Source(name="s", source=str(tmp_path / "folder"), split="validation")
    assert cache.cache_key(lacking, DATA, tokenizer, 0) is None
    with pytest.raises(UserError, match="no such file"):
        cache.cache_key(Source(name="s", source="nowhere.jsonl"), DATA, tokenizer, 0)


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path, tokenizer, home, monkeypatch):
    source, read = write(tmp_path / "s.jsonl"), skills.read_source

    def interrupted(*given: Any) -> Any:
        found = read(*given)
        write(tmp_path / "s.jsonl", PAIRS[:-1])
        return found

    monkeypatch.setattr(skills, "read_source", interrupted)
    prepare_skill(source, DATA, tokenizer, 0)
    assert files(home) == []


def test_bad_data_is_not_kept(tmp_path, tokenizer, home):
    source = write(tmp_path / "s.jsonl", [{"prompt": "p", "completion": ""}] * 40)
    for _ in range(2):
        with pytest.raises(UserError, match=r"line \d+: the document is empty"):
            prepare_skill(replace(source, text="{completion}"), DATA, tokenizer, 0)
    assert files(home) == []


def damages(whole: bytes) -> list[bytes]:
    """Files cut short, of something else, and with one wrong byte in each tenth."""
    flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(200, len(whole), len(whole) // 10)]
    return [b"", b"PK", whole[:50], whole[: len(whole) // 2], whole[:-1], b"\x93NUMPY" + whole, b"x" * 500, *flipped]


def test_damage_is_noticed_and_written_over(tmp_path, tokenizer, home):
    source = write(tmp_path / "s.jsonl")
    made = prepare_skill(source, DATA, tokenizer, 0)
    (path,) = files(home)
    for content in damages(path.read_bytes()):
        path.write_bytes(content)
        assert_same(prepare_skill(source, DATA, tokenizer, 0), made)
        assert cache.load(path.stem) is not None
    assert files(home) == [path]


@pytest.mark.parametrize(
    "wrong",
    [
        {"train_ends": np.array([3, 4, 9])},
        {"train_ends": np.array([3, 8])},
        {"train_tokens": np.zeros(9, np.int64)},
        {"train_loss_mask": np.zeros(8, bool)},
        {"train_loss_mask": np.zeros(9, np.uint8)},
        {"train_tokens": np.array([{}] * 9)},
        {"info": np.array("[]")},
        {"info": np.array('{"digest": 1, "kinds": {}, "unlearned": 0}')},
    ],
)
def test_arrays_that_are_no_documents_are_refused(home, wrong):
    right = {}
    for split in SPLITS:
        right[f"{split}_tokens"], right[f"{split}_loss_mask"] = np.zeros(9, np.int32), np.zeros(9, bool)
        right[f"{split}_ends"] = np.array([3, 9])
    right["info"] = np.array('{"digest": "0", "kinds": {"plain": 2}, "unlearned": 0}')
    home.mkdir(parents=True)
    np.savez(home / "right.npz", **right)
    np.savez(home / "wrong.npz", **(right | wrong))
    assert cache.load("right") is not None
    assert cache.load("wrong") is None


@pytest.mark.parametrize("place", ["a file in the way", "a folder for the file", "no home"])
def test_an_unwritable_cache_keeps_nothing_and_says_nothing(tmp_path, tokenizer, monkeypatch, home, capfd, place):
    source = write(tmp_path / "s.jsonl")
    if place == "a file in the way":
        home.parent.parent.write_text("")
    elif place == "a folder for the file":
        (home / f"{cache.cache_key(source, DATA, tokenizer, 0)}.npz" / "x").mkdir(parents=True)
    else:
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
        monkeypatch.delenv("XDG_CACHE_HOME")
    made = prepare_skill(source, DATA, tokenizer, 0)
    assert_same(prepare_skill(source, DATA, tokenizer, 0), made)
    assert capfd.readouterr().err == ""
    assert not list(tmp_path.rglob("*.partial"))


def test_the_files_unused_for_longest_go_first(home, monkeypatch):
    documents = stream.tokenize(Source(name="s", source="packaged/sql", limit=9), DATA, Tokenizer(assets.BASE), 0)
    for number, name in enumerate("abcd"):
        cache.store(name, documents)
        os.utime(home / f"{name}.npz", (number, number))
    size = (home / "a.npz").stat().st_size
    assert cache.load("a") is not None  # used now
    left = home / ".a.4711.partial.npz"  # of a process that was killed
    left.write_bytes(b"x")
    os.utime(left, (0, 0))
    (home / "foreign.txt").write_text("x" * size)
    monkeypatch.setattr(cache, "MAX_BYTES", 3 * size)
    cache.store("e", documents)
    assert [path.name for path in files(home)] == ["a.npz", "d.npz", "e.npz", "foreign.txt"]
    monkeypatch.setattr(cache, "MAX_BYTES", 100)
    cache.store("f", documents)  # larger than all that may be kept: it takes nobody's place
    assert [path.name for path in files(home)] == ["a.npz", "d.npz", "e.npz", "foreign.txt"]


def test_the_default_place_is_the_users_cache(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache.folder() == Path.home() / ".cache" / "dylora_mlx" / "tokens"
