"""Fuzz targets for data: JSONL records of every form, folders of text, the token cache, and code problems."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
import numpy as np

from dylora_mlx import assets
from dylora_mlx.config import DataConfig, Source
from dylora_mlx.data import cache, formatting, skills
from dylora_mlx.data.formatting import Document
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
    "columns": [{"title": "a", "parts": ["x", "y"], "n": 3, "nothing": None}] * 3,
}
SOURCES = {
    "text": Source(name="a", source="a.jsonl"),
    "prompt": Source(name="a", source="a.jsonl", mask_prompt=False),
    "chat": Source(name="a", source="a.jsonl", messages="messages"),
    "mbpp": Source(name="a", source="a.jsonl", preset="mbpp"),
    "code_alpaca": Source(name="a", source="a.jsonl", preset="code_alpaca"),
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


@target("jsonl", "lines", 4)
def jsonl(work_dir: Path) -> Harness:
    """The lines of a JSONL source (data/skills)."""
    path = work_dir / "a.jsonl"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        assert all(isinstance(row, dict) for row in skills._read_json_lines(path))

    return [lines(rows) for rows in ROWS.values()], run


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
                    check_document(formatting.encode(row, source, tokenizer, "a.jsonl, record 1"))

        return [lines(rows) for rows in (ROWS[form], *ROWS.values())], run

    records.__doc__ = f"Records of the form '{form}', to tokens and loss mask (data/formatting)."


for name in ROWS:
    register_form(name)


def check_document(document: Document) -> None:
    """Check tokens and loss mask of a document. The first token, BOS, must not be learned."""
    tokens, loss_mask = document
    assert tokens.dtype == np.int32
    assert loss_mask.dtype == bool
    assert len(tokens) == len(loss_mask) >= 3
    assert not loss_mask[0]


@target("source", "lines", 0.5)
def source_file(work_dir: Path) -> Harness:
    """A JSONL source, from the file to tokenised splits, through Arrow (data/skills, data/formatting)."""
    tokenizer, path = Tokenizer(assets.BASE), work_dir / "a.jsonl"
    source_spec = replace(SOURCES["text"], source=str(path))

    def run(data: bytes) -> None:
        path.write_bytes(data)
        loaded = skills.read_source(source_spec, DataConfig(), 0)
        for split in skills.SPLITS:
            for document in formatting.encode_all(getattr(loaded, split), loaded.source, tokenizer, split):
                check_document(document)

    return [lines(ROWS[form] * 2) for form in ("text", "prompt", "chat")], run


@target("text-folder", "text", 0.5)
def text_folder(work_dir: Path) -> Harness:
    """A folder of text files (data/skills)."""
    (work_dir / "a.py").write_text("import flask\n")
    (work_dir / "b.md").write_text("# caf\u00e9\n", encoding="utf-8")
    path = work_dir / "c.sql"
    source_spec = Source(name="a", source=str(work_dir))

    def run(data: bytes) -> None:
        path.write_bytes(data)
        rows = skills._read_splits(source_spec)["train"]
        assert 2 <= len(rows) <= 3

    return [b"SELECT 1;\n", "caf\u00e9".encode(), b"\xef\xbb\xbfSELECT 2;\r\n"], run


@target("token-cache", "npz", 1)
def token_cache(work_dir: Path) -> Harness:
    """An entry of the token cache; a damaged one is ignored (data/cache)."""
    os.environ["XDG_CACHE_HOME"] = str(work_dir)
    document = Document(np.array([2, 5, 6, 1], np.int32), np.array([False, True, True, True]))
    cache.store("a", {"train": [document, document], "validation": [document], "test": [document]})
    path = cache.folder() / "a.npz"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        splits = cache.load("a")
        for cached in (cached for split in (splits or {}).values() for cached in split):
            check_document(cached)

    return [path.read_bytes()], run


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
