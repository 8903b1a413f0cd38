"""Targets of data: JSONL records of every form, folders of text, the token cache, and code problems."""

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
from fuzzing.target import Made, target

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
def jsonl(place: Path) -> Made:
    """The lines of a JSONL source (data/skills)."""
    path = place / "a.jsonl"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        assert all(isinstance(row, dict) for row in skills._json_lines(path))

    return [lines(rows) for rows in ROWS.values()], run


def formatted(form: str) -> None:
    """Register the target of one form: records as a hub data set may hold them, to tokens."""

    @target(f"records-{form}", "lines", 2)
    def records(place: Path) -> Made:
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
                    checked(formatting.encode(row, source, tokenizer, "a.jsonl, record 1"))

        return [lines(rows) for rows in (ROWS[form], *ROWS.values())], run

    records.__doc__ = f"Records of the form '{form}', to tokens and the mask of what is learned (data/formatting)."


for name in ROWS:
    formatted(name)


def checked(document: Document) -> None:
    tokens, learn = document
    assert tokens.dtype == np.int32
    assert learn.dtype == bool
    assert len(tokens) == len(learn) >= 3
    assert not learn[0]


@target("source", "lines", 0.5)
def source_file(place: Path) -> Made:
    """A JSONL source from the file to splits of tokens, through Arrow (data/skills, data/formatting)."""
    tokenizer, path = Tokenizer(assets.BASE), place / "a.jsonl"
    wanted = replace(SOURCES["text"], source=str(path))

    def run(data: bytes) -> None:
        path.write_bytes(data)
        found = skills.read_source(wanted, DataConfig(), 0)
        for split in skills.SPLITS:
            for document in formatting.encode_all(getattr(found, split), found.source, tokenizer, split):
                checked(document)

    return [lines(ROWS[form] * 2) for form in ("text", "prompt", "chat")], run


@target("text-folder", "text", 0.5)
def text_folder(place: Path) -> Made:
    """A folder of text files (data/skills)."""
    (place / "a.py").write_text("import flask\n")
    (place / "b.md").write_text("# caf\u00e9\n", encoding="utf-8")
    path = place / "c.sql"
    wanted = Source(name="a", source=str(place))

    def run(data: bytes) -> None:
        path.write_bytes(data)
        rows = skills._splits(wanted)["train"]
        assert 2 <= len(rows) <= 3

    return [b"SELECT 1;\n", "caf\u00e9".encode(), b"\xef\xbb\xbfSELECT 2;\r\n"], run


@target("token-cache", "npz", 1)
def token_cache(place: Path) -> Made:
    """An entry of the token cache; a damaged one counts as none (data/cache)."""
    os.environ["XDG_CACHE_HOME"] = str(place)
    document = Document(np.array([2, 5, 6, 1], np.int32), np.array([False, True, True, True]))
    cache.store("a", {"train": [document, document], "validation": [document], "test": [document]})
    path = cache.folder() / "a.npz"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        found = cache.load("a")
        for kept in (kept for split in (found or {}).values() for kept in split):
            checked(kept)

    return [path.read_bytes()], run


@target("problems", "lines", 4)
def code_problems(place: Path) -> Made:
    """Problems of MBPP or HumanEval for pass@k, to prompts and programs (evaluation/problems)."""
    path = place / "problems.jsonl"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        for shots in (0, 1):
            try:
                found = problems.load_problems(path, shots)
            except UserError:
                if not shots:
                    raise
                continue
            for problem in found:
                assert isinstance(problem.program("pass"), str)
                (problem.prompt + problem.program("pass")).encode("utf-8")

    return [lines(rows) for rows in (MBPP, SANITISED, HUMANEVAL)], run
