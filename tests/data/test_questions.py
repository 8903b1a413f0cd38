"""Multiple-choice records: one document for each option, equal to training's but for the answer."""

from __future__ import annotations

import numpy as np
import pytest

from dylora_mlx.config import Source
from dylora_mlx.data import formatting, questions
from dylora_mlx.data.records import Record
from dylora_mlx.errors import UserError

SOURCE = Source(name="quiz", source="quiz.jsonl")
ROW = {"prompt": "Is 7 even?\nAnswer:", "completion": " no\n", "label": "no", "options": ["yes", "no", "who knows"]}


def read(base, row: dict, source: Source = SOURCE) -> questions.Question:
    (question,) = questions.read_questions([Record(row, "quiz.jsonl, line 3")], source, base.tokenizer)
    return question


def learned(document, base) -> str:
    return base.tokenizer.decode(document.tokens[document.loss_mask].tolist())


def test_each_option_takes_the_place_of_the_answer(base):
    question = read(base, ROW)
    assert (question.answer, question.location) == (1, "quiz.jsonl, line 3")
    eos = base.tokenizer.decode([base.tokenizer.eos_token_id])
    texts = [learned(document, base) for document in question.documents]
    assert [text.removesuffix(eos) for text in texts] == [" yes\n", " no\n", " who knows\n"]
    assert base.tokenizer.decode(question.prompt_ids.tolist()).endswith("Is 7 even?\nAnswer:")


def test_the_right_option_is_the_record_as_it_is_learned(base):
    question = read(base, ROW)
    _, (document,) = formatting.encode_record(Record(ROW, "x"), SOURCE, base.tokenizer)
    right = question.documents[question.answer]
    assert np.array_equal(right.tokens, document.tokens)
    assert np.array_equal(right.loss_mask, document.loss_mask)


@pytest.mark.parametrize(
    "row",
    [
        {name: value for name, value in ROW.items() if name != "label"},
        {**ROW, "label": 1},
        {**ROW, "options": '["yes", "no", "who knows"]'},
        {**ROW, "completion": " I say no, no\n"},
    ],
    ids=["without a label", "label as an index", "options as JSON", "answer twice"],
)
def test_other_ways_to_write_a_question(base, row):
    question = read(base, row)
    assert question.answer == 1
    assert len({document.tokens.tobytes() for document in question.documents}) == 3
    if "I say" in row["completion"]:
        assert " I say no, who knows\n" in learned(question.documents[2], base)


def test_a_template_may_hold_the_label(base):
    source = Source(name="quiz", source="quiz.jsonl", prompt="{question}", completion=" {label}.")
    question = read(base, {"question": "Even?", "label": "no", "options": ["yes", "no"]}, source)
    assert [" yes." in learned(document, base) for document in question.documents] == [True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": None}, "no column 'options' with a list of texts"),
        ({"options": "yes, no"}, "no column 'options' with a list of texts"),
        ({"options": ["yes", 3]}, "no column 'options' with a list of texts"),
        ({"options": ["no"]}, "two or more different texts, not no"),
        ({"options": ["no", "no"]}, "two or more different texts, not no, no"),
        ({"label": "maybe"}, "the answer 'maybe' is none of the options yes, no, who knows"),
        ({"label": 3}, "the answer 3 is none of the options"),
        ({"label": True}, "the answer True is none of the options"),
        ({"label": "yes"}, "the completion ' no\\n' does not hold the answer 'yes'"),
        ({"completion": None, "label": "no"}, "quiz.jsonl, line 3"),
    ],
)
def test_a_malformed_question_is_named(base, changes, message):
    with pytest.raises(UserError) as error:
        read(base, {**ROW, **changes})
    assert str(error.value).startswith("quiz.jsonl, line 3")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Source(name="q", source="q", prompt="{prompt}", completion="{other}"), "make no difference to the document"),
        (
            Source(name="q", source="q", prompt="{prompt} {label}", completion=" {label}"),
            "change the text before the answer",
        ),
        (Source(name="q", source="q", text="{prompt}{completion}"), ""),
    ],
)
def test_a_template_that_gives_no_question(base, source, message):
    row = {**ROW, "other": "x"}
    if not message:  # plain text: everything is learned, and the answer is the only difference
        assert len(read(base, row, source).prompt_ids) == 1
        return
    with pytest.raises(UserError, match=message):
        read(base, row, source)


def test_questions_are_found_among_records():
    assert questions.has_options([Record({"text": "a"}, "x"), Record(ROW, "y")])
    assert not questions.has_options([Record({"text": "a", "options": None}, "x")])
