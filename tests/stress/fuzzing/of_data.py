"""Fuzz targets for data: JSONL records of every form, folders of text, the token cache, and code problems."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
import numpy as np
import pyarrow
from pyarrow import parquet

from dylora_mlx import assets
from dylora_mlx.config import Config, DataConfig, Source
from dylora_mlx.data import cache, chat_template, formatting, kept, readers, skills
from dylora_mlx.data.encoding import Document
from dylora_mlx.data.records import Record
from dylora_mlx.data.rendering import BUILTIN_TEMPLATES, SkillFormat, builtin_template
from dylora_mlx.data.tokenized import SPLITS, TokenizedSource
from dylora_mlx.errors import UserError
from dylora_mlx.evaluation import problems
from dylora_mlx.model.base.tokenizer import Tokenizer
from fuzzing.target import Harness, target

ROWS: dict[str, list[dict]] = {
    "text": [{"text": "SELECT 1;"}, {"text": "caf\u00e9 \U0001f600"}, {"text": "a\nb"}],
    "prompt": [
        {"prompt": "Add.", "completion": "1 + 1"},
        {"prompt": "", "completion": "x"},
        {"prompt": "a", "completion": "b"},
    ],
    "chat": [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}] * 3,
    "mbpp": [{"text": "Add.", "code": "def f(): pass", "test_list": ["assert f()"], "task_id": 1}] * 3,
    "code_alpaca": [{"instruction": "Add.", "input": "1 2", "output": "3"}] * 3,
    "alpaca": [{"instruction": "Add.", "input": "", "output": "3"}] * 3,
    "sharegpt": [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}] * 3,
    "columns": [{"title": "a", "parts": ["x", "y"], "n": 3, "nothing": None}] * 3,
}
SOURCES = {
    "text": Source(name="a", source="a.jsonl"),
    "prompt": Source(name="a", source="a.jsonl", mask_prompt=False),
    "chat": Source(name="a", source="a.jsonl", messages="messages"),
    "mbpp": Source(name="a", source="a.jsonl", preset="mbpp"),
    "code_alpaca": Source(name="a", source="a.jsonl", preset="code_alpaca"),
    "alpaca": Source(name="a", source="a.jsonl", preset="alpaca"),
    "sharegpt": Source(name="a", source="a.jsonl", preset="sharegpt"),
    "columns": Source(name="a", source="a.jsonl", text="{title}: {parts} {n} {nothing}", contains="a", limit=3),
}
MBPP = [
    {"task_id": n, "text": "Add.", "code": "def f():\r\n  pass", "test_list": ["assert f()"], "test_setup_code": ""}
    for n in (1, 2)
]
SANITISED = [
    {"task_id": 3, "prompt": "Add.", "code": "x", "test_list": ["assert 1"], "test_imports": ["import math"]}
] * 2
HUMANEVAL = [{"task_id": "HumanEval/0", "prompt": "def f():\n", "test": "def check(f): pass", "entry_point": "f"}] * 2


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def register_file(name: str, form: str, weight: float, about: str, seeds: list[bytes]) -> None:
    """Register the target of one format of files: from bytes to records."""

    @target(name.rpartition(".")[2], form, weight)
    def file(work_dir: Path) -> Harness:
        path = work_dir / name

        def run(data: bytes) -> None:
            path.write_bytes(data)
            records = readers.read_file(path)
            assert records
            assert all(isinstance(record.row, dict) for record in records)
            assert all(record.location.startswith(str(path)) for record in records)

        return seeds, run

    file.__doc__ = f"{about} (data/readers)."


def parquet_bytes(rows: list[dict]) -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    return stream.getvalue()


register_file("a.jsonl", "lines", 4, "The lines of a JSONL source", [lines(rows) for rows in ROWS.values()])
register_file(
    "a.json", "json", 2, "A JSON source: an array of records, an object with one, or lines",
    [json.dumps(rows).encode() for rows in ROWS.values()] + [json.dumps({"data": ROWS["text"]}).encode(), lines(ROWS["text"])],
)  # fmt: skip
register_file(
    "a.csv", "text", 2, "A CSV source", [b"text\na\nb\n", b'prompt,completion\n"a, ""b""\nc",d\n', b"\xef\xbb\xbfa;b\r\n1;2\r\n"]
)  # fmt: skip
register_file(
    "a.txt",
    "text",
    2,
    "A long text, cut at paragraphs",
    [b"One.\n\nTwo.\n" * 200, b"word " * 2000, "caf\u00e9\n\n".encode() * 900],
)
register_file(
    "a.parquet", "raw", 0.5, "A Parquet source", [parquet_bytes(ROWS[form]) for form in ("text", "prompt", "chat")]
)
register_file("a.jsonl.gz", "raw", 0.5, "A compressed JSONL source", [gzip.compress(lines(ROWS["text"]), mtime=0)])


def register_form(form: str) -> None:
    """Register the target of one form: records with any values, as in a data set of the hub, to tokens."""

    @target(f"records-{form}", "lines", 2)
    def records(work_dir: Path) -> Harness:
        tokenizer, source = Tokenizer(assets.BASE), SOURCES[form]
        if source.preset != "none":
            source = replace(source, **skills.PRESETS[source.preset])

        def run(data: bytes) -> None:
            for line in data.split(b"\n"):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(row, dict):
                    check_documents(formatting.encode_record(Record(row, "a.jsonl, line 1"), source, tokenizer)[1])

        return [lines(rows) for rows in (ROWS[form], *ROWS.values())], run

    records.__doc__ = f"Records of the form '{form}', to tokens and loss mask (data/formatting)."


for name in ROWS:
    register_form(name)


def check_documents(documents: Iterable[Document]) -> None:
    """Check tokens and loss masks of documents: the first token is never learned, and another one is."""
    for tokens, loss_mask in documents:
        assert tokens.dtype == np.int32
        assert loss_mask.dtype == bool
        assert len(tokens) == len(loss_mask) >= 2
        assert not loss_mask[0]
        assert loss_mask.any()


@target("source", "lines", 0.5)
def source_file(work_dir: Path) -> Harness:
    """A JSONL source, from the file to tokenised splits (data/skills, data/formatting)."""
    tokenizer, path = Tokenizer(assets.BASE), work_dir / "a.jsonl"
    source_spec = replace(SOURCES["text"], source=str(path))

    def run(data: bytes) -> None:
        path.write_bytes(data)
        loaded = skills.read_source(source_spec, DataConfig(), 0)
        for split in SPLITS:
            for _, documents in formatting.encode_records(getattr(loaded, split), loaded.source, tokenizer):
                check_documents(documents)

    return [lines(ROWS[form] * 2) for form in ("text", "prompt", "chat")], run


@target("text-folder", "text", 0.5)
def text_folder(work_dir: Path) -> Harness:
    """A folder of text files (data/skills)."""
    (work_dir / "a.py").write_text("import flask\n")
    (work_dir / "d.py").write_text("import requests\n")
    (work_dir / "b.md").write_text("# caf\u00e9\n", encoding="utf-8")
    path = work_dir / "c.sql"
    source_spec = Source(name="a", source=str(work_dir))

    def run(data: bytes) -> None:
        path.write_bytes(data)
        loaded = skills.read_source(source_spec, DataConfig(), 0)
        assert 3 <= sum(loaded.info.records.values()) <= 4

    return [b"SELECT 1;\n", "caf\u00e9".encode(), b"\xef\xbb\xbfSELECT 2;\r\n"], run


@target("gitignore", "text", 0.5)
def gitignore(work_dir: Path) -> Harness:
    """A .gitignore file in a folder of text files, and its lines as patterns of a source (data/folders)."""
    for name in ("a.py", "b/c.md", "b/d.sql", "e/f.txt"):
        (work_dir / name).parent.mkdir(exist_ok=True)
        (work_dir / name).write_text(name)

    def run(data: bytes) -> None:
        (work_dir / ".gitignore").write_bytes(data)
        source_spec = Source(name="a", source=str(work_dir))
        found = skills.source_files(source_spec)
        assert found is not None
        assert {path.name for path in found} <= {"a.py", "c.md", "d.sql", "f.txt"}
        try:
            patterns = data.decode("utf-8", errors="replace").splitlines()
            source_spec = replace(source_spec, include=patterns)
        except ValueError:  # refused by the config
            return
        skills.source_files(source_spec)

    return [b"*.py\n", b"/b/\n!c.md\n", b"# x\n\n**/f.*\n[a-c]?/\n"], run


@target("token-cache", "npz", 1)
def token_cache(work_dir: Path) -> Harness:
    """An entry of the token cache; a damaged one is ignored (data/cache)."""
    os.environ["XDG_CACHE_HOME"] = str(work_dir)
    document = Document(np.array([2, 5, 6, 1], np.int32), np.array([False, True, True, True]))
    splits = {"train": [document, document], "validation": [document], "test": [document]}
    cache.store("a", TokenizedSource(splits, "0" * 64, {"plain": 2}))
    path = cache.folder() / "a.npz"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        cached = cache.load("a")
        for documents in cached.splits.values() if cached else ():
            for tokens, loss_mask in documents:
                assert (tokens.dtype, loss_mask.dtype, loss_mask[0]) == (np.int32, bool, False)

    return [path.read_bytes()], run


@target("kept-documents", "npz", 1)
def kept_documents(work_dir: Path) -> Harness:
    """The documents of a skill that a run keeps; damaged ones are read from their source again (data/kept)."""
    document = Document(np.array([2, 5, 6, 1], np.int32), np.array([False, True, True, True]))
    splits = {"train": [document, document], "validation": [document], "test": [document]}
    source = Source(name="a", source="a.jsonl", limit=4)
    documents = TokenizedSource(splits, "0" * 64, {"plain": 2})
    kept.write(work_dir, "a", kept.keep(source, documents, SkillFormat("plain"), Config(skills=[source])))

    def run(data: bytes) -> None:
        try:
            found = kept.read(data, 100)
        except ValueError:
            return
        skill = found.skill(source, DataConfig(), None)
        for name in SPLITS:
            for segment in getattr(skill, name).segments:
                assert segment.tokens.min() >= 0
                assert segment.tokens.max() < 100

    return [kept.path_of(work_dir, "a").read_bytes()], run


@target("chat-template", "text", 1)
def template_text(work_dir: Path) -> Harness:
    """A chat template in data.chat_template, as text and as a file (data/chat_template)."""
    path = work_dir / "chat.jinja"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        text = chat_template.resolve_template(str(path))
        assert text is not None
        assert chat_template.resolve_template(text) == text

    return [builtin_template(name).encode() for name in BUILTIN_TEMPLATES], run


@target("problems", "lines", 4)
def code_problems(work_dir: Path) -> Harness:
    """Problems of MBPP or HumanEval for pass@k, to prompts and programs (evaluation/problems)."""
    path = work_dir / "problems.jsonl"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        for shots in (0, 1):
            try:
                loaded = problems.load_problems(path, shots)
            except UserError:
                if not shots:
                    raise
                continue
            for problem in loaded:
                assert isinstance(problem.program("pass"), str)
                (problem.prompt + problem.program("pass")).encode("utf-8")

    return [lines(rows) for rows in (MBPP, SANITISED, HUMANEVAL)], run
