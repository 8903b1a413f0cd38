"""What ships with the package: enough documents, none of them twice, all of them well-formed."""

from __future__ import annotations

import ast
import json
import sqlite3
from collections import Counter

import pytest

from dylora_mlx import assets

SPLITS = {"train": 96, "validation": 16, "test": 16}


def documents(skill: str, split: str) -> list[str]:
    lines = (assets.SKILLS / skill / f"{split}.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert all(row.keys() == {"text"} for row in rows)
    return [row["text"] for row in rows]


def everything(skill: str) -> list[str]:
    return [text for split in SPLITS for text in documents(skill, split)]


def normal(text: str) -> str:
    """The text without differences of white space."""
    return " ".join(text.split())


def test_the_packaged_skills():
    assert assets.packaged_skills() == ["flask", "python", "requests", "requests_more", "sql", "stripe"]


@pytest.mark.parametrize("skill", assets.packaged_skills())
def test_a_skill_has_enough_documents(skill):
    for split, least in SPLITS.items():
        assert len(documents(skill, split)) >= least
    assert all(normal(text) for text in everything(skill))


@pytest.mark.parametrize("skills", [*([name] for name in assets.packaged_skills()), ["requests", "requests_more"]])
def test_no_document_occurs_twice(skills):
    counts = Counter(normal(text) for skill in skills for text in everything(skill))
    assert [text for text, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("skill", [name for name in assets.packaged_skills() if name != "sql"])
def test_python_documents_parse(skill):
    for text in everything(skill):
        ast.parse(text)


def test_sql_documents_are_complete_statements():
    assert [text for text in everything("sql") if not sqlite3.complete_statement(text)] == []


def test_the_embedded_base_is_small_and_whole():
    names = {path.name for path in assets.BASE.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert sum(path.stat().st_size for path in assets.BASE.rglob("*") if path.is_file()) <= 12_000_000
