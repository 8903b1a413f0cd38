"""tools/benchmarks/similarity_matrix.py: labels by word, kept document means, relations, and one small matrix."""

from __future__ import annotations

import json

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
import numpy as np
import pytest
import similarity_matrix as tool
from novelty import labels, store
from novelty.labels import Label
from novelty.means import Encoder

from dylora_mlx.errors import UserError


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder("embedded")


def records(path, lines: list[str]) -> None:
    text = "and enough of an answer to be a document that is not too short, " * 2
    path.write_text("".join(json.dumps({"instruction": line, "output": f"{text}{line}"}) + "\n" for line in lines))


def test_a_record_counts_for_the_first_word_that_its_first_line_has(tmp_path):
    path = tmp_path / "tasks.jsonl"
    records(
        path, ["C# one", "java and c# two", "JavaScript three", "javascript four", "a C five", "c six", "c++ seven"]
    )
    found = {label.name: label.texts for label in labels.by_word(path, ["c#", "java", "javascript", "c"], 2)}
    lines = {name: sorted(text.partition("\n")[0] for text in texts) for name, texts in found.items()}
    assert lines == {
        "tasks/c#": ["C# one", "java and c# two"],
        "tasks/javascript": ["JavaScript three", "javascript four"],
        "tasks/c": ["a C five", "c six"],
    }
    assert labels.by_word(path, ["c#", "java"], 3) == []


def test_kept_means_are_extended_and_not_computed_again(tmp_path, encoder, monkeypatch):
    label = Label("c#", [f"text number {i} of a few words\n" for i in range(6)], [], [5, 4, 3, 2, 1, 0])
    all_at_once = store.documents(label, encoder, 6, 5, tmp_path / "whole")
    first = store.documents(label, encoder, 2, 5, tmp_path / "parts")
    extended = store.documents(label, encoder, 6, 5, tmp_path / "parts")
    assert len(first.means) == 2
    np.testing.assert_allclose(extended.means, all_at_once.means, atol=1e-4)
    assert [list(tokens) for tokens in extended.tokens()] == [list(tokens) for tokens in all_at_once.tokens()]
    assert {len(tokens) for tokens in extended.tokens()} == {5}
    assert list(extended.places) == [5, 4, 3, 2, 1, 0]

    def fail(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(store, "document_means", fail)
    again = store.documents(label, encoder, 4, 5, tmp_path / "parts")
    assert np.array_equal(again.means, extended.means[:4])
    assert list(again.ends) == [5, 10, 15, 20]
    with pytest.raises(AssertionError, match="computed again"):
        store.documents(label._replace(texts=["another text\n"] * 6), encoder, 6, 5, tmp_path / "parts")
    with pytest.raises(AssertionError, match="computed again"):
        store.documents(label, encoder, 6, 4, tmp_path / "parts")


def test_means_of_another_base_are_refused(tmp_path, encoder):
    label = Label("c#", ["some text\n"] * 2, [], [0, 1])
    store.documents(label, encoder, 2, 5, tmp_path)
    (path,) = tmp_path.glob("*.npz")
    with np.load(path) as arrays:
        np.savez(path, **{**arrays, "means": arrays["means"][:, :4]})
    with pytest.raises(UserError, match=r"csharp\.npz: for another base; give each base a folder of its own"):
        store.documents(label, encoder, 2, 5, tmp_path)


def test_the_matrix_of_two_packaged_skills(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(labels, "_installed", dict)
    names = ["requests", "requests_more", "sql"]
    options = ["--only", *names, "--documents", "20", "--tokens", "48", "--out", str(tmp_path / "out")]
    assert tool.main(options) == 0
    result = json.loads((tmp_path / "out" / "matrix.json").read_text())
    assert list(result["skills"]) == names
    assert {skill["documents"] for skill in result["skills"].values()} == {20}
    assert result["relations"] == [["same", "kin", "new"], ["kin", "same", "new"], ["new", "new", "same"]]
    corrected = np.array(result["measures"]["corrected cosine"]["pairs"])
    assert corrected[2, 2] > 0.85
    assert corrected[0, 1] > 0.75
    assert max(corrected[2, 0], corrected[0, 2], corrected[2, 1], corrected[1, 2]) < 0.6
    assert min(result["measures"]["corrected cosine"]["halves"]) > 0.8
    lines = (tmp_path / "out" / "matrix.md").read_text().splitlines()
    assert f"| 1 requests_more | {' | '.join(f'{value:.2f}' for value in corrected[1])} |" in lines
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "out" / f"matrix.{end}") for end in ("json", "md")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--documents", "3"], "--documents: 3 is not at least 20"),
        (["--tokens", "2"], "--tokens: 2 is not at least 8"),
        (["--words", "a.jsonl"], "--words a.jsonl: name at least one word after the file"),
        (["--kin", "a"], "--kin: a is no pair NAME=NAME"),
        (["--words", "missing.jsonl", "java"], "--words: missing.jsonl: no such file or folder"),
        (["--only", "sql", "nothing"], "--only: no skill 'nothing'; there are "),
        (["--only", "sql"], "--only: name at least two skills"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setattr(labels, "_installed", dict)
    assert tool.main([*options, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
