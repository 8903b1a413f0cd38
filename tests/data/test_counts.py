"""Counts of a skill's data, with exact values for each form, and the remarks on what is wrong with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dylora_mlx.config import DataConfig, Source
from dylora_mlx.data.counts import DataCounts, SplitCounts, in_other_forms, is_harmful, remarks, summarize
from dylora_mlx.data.source_info import SourceInfo
from dylora_mlx.data.stream import prepare_skill
from dylora_mlx.model.base.tokenizer import Tokenizer

PLAIN = {"text": "SELECT 1;"}
PROMPT = {"prompt": "Count the orders.\n", "completion": "SELECT COUNT(*);"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}


def write(folder: Path, **splits: list[dict]) -> Source:
    """Write a source with its own splits, and return it."""
    folder.mkdir(exist_ok=True)
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(name="s", source=str(folder))


def counted(tokenizer: Tokenizer, source: Source, max_seq_length: int = 640) -> DataCounts:
    data = DataConfig(max_seq_length=max_seq_length)
    return summarize(prepare_skill(source, data, tokenizer, 0), data, tokenizer)


def numbered(row: dict, count: int, start: int = 0) -> list[dict]:
    """Return copies of a record with a number in every text, so that no two are the same. Numbers have one digit."""
    assert start + count <= 10
    return [
        json.loads(json.dumps(row).replace("1", str(n)).replace("Hi", f"Hi{n}").replace("orders", f"orders{n}"))
        for n in range(start, start + count)
    ]


@pytest.mark.parametrize(
    ("row", "form", "context", "learned"),
    [
        (PLAIN, "plain text", "", "SELECT 1;<eos>"),
        (PROMPT, "prompts and completions", "Count the orders1.\n", "SELECT COUNT(*);<eos>"),
        (CHAT, "chats in the gemma template that comes with the package",
         "<start_of_turn>user\nHi1<end_of_turn>\n<start_of_turn>model\n", "Hello!<end_of_turn><eos>"),
    ],
)  # fmt: skip
def test_counts_of_each_form(tokenizer, tmp_path, row, form, context, learned):
    source = write(tmp_path / "s", train=numbered(row, 5), validation=numbered(row, 2, 5), test=numbered(row, 1, 7))
    counts = counted(tokenizer, source)
    given, target = (len(tokenizer.encode_text(text)) for text in (context, learned))
    assert (counts.name, counts.form, counts.other_forms, counts.max_seq_length) == ("s", form, {}, 640)
    for name, documents in (("train", 5), ("validation", 2), ("test", 1)):
        found = counts.splits[name]
        assert (found.records, found.documents) == (documents, documents)
        assert (found.tokens, found.learned) == (documents * (given + target), documents * target)
        assert (found.cut, found.windows, found.dropped, found.leaked) == (0, 0, 0, 0)
    assert remarks(counts) == []
    assert not is_harmful(counts)


def test_cut_documents_and_dropped_windows(tokenizer, tmp_path):
    """A prompt of 40 tokens and a short answer in rows of 16: three windows, the first two of the prompt alone."""
    word = "x" + " x" * 39
    long = {"prompt": word, "completion": "y"}
    size = len(tokenizer.encode_text(word))
    assert size == 40
    source = write(
        tmp_path / "s",
        train=[long, *numbered(PLAIN, 9)],
        validation=[{"text": "SELECT a;"}],
        test=[{"text": "SELECT b;"}],
    )
    counts = counted(tokenizer, source, 16)
    found, short = counts.splits["train"], len(tokenizer.encode_text("SELECT 1;<eos>"))
    answer = len(tokenizer.encode_text("y")) + 1
    assert (found.documents, found.cut, found.windows, found.dropped) == (10, 1, 3, 2)
    assert (found.tokens, found.learned) == (9 * short + (size - 32) + answer, 9 * short + answer)
    assert remarks(counts)[0] == (
        "1 of 12 documents longer than 16 tokens (data.max_seq_length): cut into 3 windows, 2 of them dropped because "
        "nothing in them is learned"
    )
    assert not is_harmful(counts)


def test_a_document_that_just_fits_is_not_cut(tokenizer, tmp_path):
    words = ["x" + " x" * 14, "x" + " x" * 15]
    lengths = [len(tokenizer.encode_text(text)) + 1 for text in words]  # with EOS; BOS takes no position
    assert lengths[0] == 16 < lengths[1]
    for text, cut in zip(words, (0, 1), strict=True):
        source = write(tmp_path / str(cut), train=[{"text": text}, PLAIN], validation=[PLAIN], test=[PLAIN])
        found = counted(tokenizer, source, 16).splits["train"]
        assert (found.cut, found.windows, found.dropped) == (cut, 2 * cut, 0)


def test_records_without_an_answer_are_counted(tokenizer, tmp_path):
    """Empty completions, a chat of user turns alone, and one whose only answer has no weight."""
    unlearned = [
        {**PROMPT, "completion": ""},
        {"messages": CHAT["messages"][:1]},
        {"messages": [CHAT["messages"][0], {**CHAT["messages"][1], "weight": 0}]},
    ]
    source = write(tmp_path / "s", train=[*numbered(PROMPT, 7), *unlearned], validation=[PROMPT], test=[PROMPT])
    counts = counted(tokenizer, source)
    assert counts.unlearned == 3
    assert counts.splits["train"].documents == 7
    assert counts.other_forms == {"chats": 2}
    assert remarks(counts)[:2] == [
        "3 records left out because nothing would be learned: an empty completion, or a chat without an answer",
        "read as prompts and completions, but 2 records as chats: generate asks in the form of most records",
    ]
    assert is_harmful(counts)


def test_plain_text_and_prompts_are_asked_alike(tokenizer, tmp_path):
    source = write(tmp_path / "s", train=[*numbered(PROMPT, 3), PLAIN], validation=[{"text": "b"}], test=[PROMPT])
    counts = counted(tokenizer, source)
    assert in_other_forms(counts) == "1 record as plain text"
    assert remarks(counts) == []


def test_counts_are_the_same_from_the_cache(tokenizer, tmp_path):
    source = write(
        tmp_path / "s", train=[*numbered(PROMPT, 6), {**PROMPT, "completion": ""}], validation=[PLAIN], test=[CHAT]
    )
    assert counted(tokenizer, source) == counted(tokenizer, source)


def test_what_was_found_in_the_source_is_passed_on(tokenizer, tmp_path):
    source = write(tmp_path / "s", train=numbered(PLAIN, 5), validation=[PLAIN], test=[PLAIN])
    data = DataConfig()
    info = SourceInfo(
        files={".jsonl": 3}, left_out={"in .venv": 240}, split_origins={"train": "train.jsonl", "validation": "valid.jsonl"},
        records={"train": 5, "validation": 1, "test": 1}, duplicates=2, leaked={"validation": 1},
    )  # fmt: skip
    counts = summarize(replace(prepare_skill(source, data, tokenizer, 0), info=info), data, tokenizer)
    assert counts.info == info
    assert [split.origin for split in counts.splits.values()] == ["train.jsonl", "valid.jsonl", ""]
    assert [split.leaked for split in counts.splits.values()] == [0, 1, 0]
    assert remarks(counts) == [
        "2 of 7 records copies of an earlier one",
        "1 of 1 validation record also in train: the validation loss does not measure what is new",
    ]
    assert is_harmful(counts)
    assert json.loads(json.dumps(counts.to_dict()))["remarks"] == remarks(counts)


def test_copies_alone_are_no_fault():
    split = SplitCounts("", 9, 9, 90, 90, 0, 0, 0, 0)
    counts = DataCounts(
        "s", "plain text", {}, 640, {"train": split, "validation": split, "test": split}, 0, SourceInfo(duplicates=4)
    )
    assert remarks(counts) == ["4 of 27 records copies of an earlier one"]
    assert not is_harmful(counts)
