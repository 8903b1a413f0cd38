"""The labels of the novelty benchmark: how sources are cut into documents, and near-duplicates of these documents."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pytest
from novelty import cutting, labels, variants

from dylora_mlx.errors import UserError

BODY = "".join(f"    total += os.path.getsize(paths[{i}])  # the size of number {i}\n" for i in range(8))
FUNCTION = (
    f'def sizes(paths):\n    """Add sizes.\n\n    Of all paths.\n    """\n    total = 0\n{BODY}    return total\n'
)
MODULE = f"import os\nimport sys\nfrom math import pi as circle\n\nTABLE = [1, 2, 3]\n\n\n{FUNCTION}"


def records(folder: Path, name: str, count: int, word: str = "word") -> Path:
    path = folder / f"{name}.jsonl"
    rows = [{"id": i, "text": f"{word} number {i} " * 20, "more": ["not", "text"]} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr(labels, "_installed", dict)


def test_a_function_comes_with_its_imports():
    (document,) = cutting.python(MODULE)
    assert document.startswith("import os\n\n\ndef sizes(paths):")
    assert '"""Add sizes."""' in document
    assert "Of all paths" not in document
    assert "TABLE" not in document
    ast.parse(document)


def test_methods_of_a_long_class_follow_its_header():
    method = FUNCTION.replace("def sizes(", "def sizes{}(self, ").replace("\n", "\n    ")
    source = "import os\n\nclass Disk(object, metaclass=type):\n" + "".join(
        f"    {method.format(i)}\n" for i in range(5)
    )
    documents = list(cutting.python(source))
    assert len(documents) == 5
    for i, text in enumerate(documents):
        assert f"import os\n\n\nclass Disk(object):\n    def sizes{i}(self" in text
        ast.parse(text)


def test_short_neighbours_are_joined_and_invalid_python_is_skipped():
    short = "".join(f"def first_{i}(values):\n    return values[{i}] + values[{i + 1}]\n\n\n" for i in range(12))
    documents = list(cutting.python(short))
    assert 1 <= len(documents) < 4
    assert all(len(text) >= cutting.SHORTEST for text in documents)
    assert list(cutting.python("def broken(:\n")) == []


def test_paragraphs_are_joined_cut_and_without_notices():
    text = "Copyright 2020 Somebody. All rights reserved.\n\n" + "\n\n".join(["A short line of prose." * 4] * 5)
    documents = list(cutting.paragraphs(text + "\n\n" + "a long line of words\n" * 200))
    assert all(cutting.SHORTEST <= len(part) <= cutting.LONGEST for part in documents)
    assert "Copyright" not in "".join(documents)
    assert "Copyright" in "".join(cutting.notices(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a line of words\n" * 30, True), ("0x00, 0x01, 0x02,\n" * 30, False), ("short\n", False), ("word " * 80, False)],
)
def test_tables_are_not_readable(text, expected):
    assert cutting.readable(text) == expected


@pytest.mark.usefixtures("nothing_installed")
def test_labels_of_files_and_folders(tmp_path):
    several = tmp_path / "several"
    (several / "split").mkdir(parents=True)
    records(several, "one", 150)
    records(several / "split", "train", 100, "other")
    records(several / "split", "test", 100, "further")
    by_name = {label.name: label for label in labels.collect([several, records(tmp_path, "alone", 400, "third")])}
    assert {"one", "split", "alone", "requests", "sql"} <= by_name.keys()
    assert "requests_more" not in by_name
    assert len(by_name["alone"].shards) == labels.SHARDS
    for label in by_name.values():
        assert len(set(label.texts)) == len(label.texts) == label.shards[-1].stop
        assert all(s.stop - s.start >= labels.FEWEST for s in label.shards)
    again = {label.name: label for label in labels.collect([several])}
    assert again["one"] == by_name["one"], "a label's shards do not depend on the others"


@pytest.mark.usefixtures("nothing_installed")
def test_a_document_of_two_labels_stays_with_the_first(tmp_path):
    first, second = records(tmp_path, "first", 200), records(tmp_path, "second", 400)
    texts = {label.name: label.texts for label in labels.collect([first, second])}
    assert not set(texts["first"]) & set(texts["second"])


@pytest.mark.usefixtures("nothing_installed")
def test_unusable_sources_are_refused(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    cases = [
        ([records(tmp_path, "small", 50)], "too few documents"),
        ([records(tmp_path, "sql", 300)], "name of a label"),
        ([records(tmp_path, "twice", 300), records(tmp_path / "sub", "twice", 300)], "same name"),
        ([tmp_path / "broken.jsonl"], "line 2: not JSON"),
        ([tmp_path / "nowhere"], "no such file"),
    ]
    for sources, message in cases:
        with pytest.raises(UserError, match=message):
            labels.collect(sources)


def test_files_of_packages():
    assert any(path.name == "encoder.py" for path in labels.files("json"))
    assert [path.name for path in labels.files("json/enc*.py")] == ["encoder.py"]
    assert [path.name for path in labels.files("argparse")] == ["argparse.py"]
    assert labels.files("no_such_package_anywhere") == []


def test_renaming_keeps_imported_names():
    texts = [MODULE, "def area(radius):\n    return radius * radius\n", "def other(thing):\n    return thing\n"]
    renamed = variants.varied(texts, "identifiers", np.random.default_rng(0))
    assert "sizes" not in renamed[0]
    assert "os.path.getsize" in renamed[0]
    assert "radius" not in renamed[1]
    for old, new in zip(texts, renamed, strict=True):
        ast.parse(new)
        assert len(new.splitlines()) == len(old.splitlines())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = '# no'  # yes\n# all\ny = 1\n", "x = '# no'\ny = 1\n"),
        ("SELECT a -- why\nFROM b WHERE c = 1;\n", "SELECT a \nFROM b WHERE c = 1;\n"),
        ("int f(int a); /* one\ntwo */ int g(void);\n", "int f(int a);  int g(void);\n"),
    ],
)
def test_comments_are_stripped(text, expected):
    assert variants.varied([text], "comments", np.random.default_rng(0)) == [expected]


def test_lines_move_but_none_is_lost():
    texts = [f"first of {i}\n\nsecond of {i}\nthird of {i}\n" for i in range(30)]
    for variant in ("lines", "comments", "identifiers"):  # these have neither comments nor identifiers
        shuffled = variants.varied(texts, variant, np.random.default_rng(0))
        assert sum(new != old for new, old in zip(shuffled, texts, strict=True)) > 5
        assert sorted("".join(shuffled).splitlines()) == sorted("".join(texts).splitlines())
