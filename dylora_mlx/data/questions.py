"""Multiple-choice questions: records with a column `options`, and one tokenized document for each option.

A document is the record as it is learned, with one of the options in place of the answer. So the prompt, the template and
the end of the answer are the same for all options of a question, and the same as in training.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dylora_mlx.config import Source
from dylora_mlx.data import formatting
from dylora_mlx.data.encoding import Document
from dylora_mlx.data.records import Record
from dylora_mlx.errors import UserError

OPTIONS, LABEL, COMPLETION = "options", "label", "completion"
"""Columns of a question: its options, the right one, and the text that is learned, which holds it."""


class Question(NamedTuple):
    """One question with its options."""

    location: str
    """Place of the record, such as `test.jsonl, line 3`."""
    options: list[str]
    answer: int
    """Index of the right option."""
    documents: list[Document]
    """The record with each option as its answer; only the answer is learned."""

    @property
    def prompt_ids(self) -> np.ndarray:
        """Token ids before the answer, int32 [n]."""
        document = self.documents[0]
        return document.tokens[: int(np.argmax(document.loss_mask))]


def has_options(records: Sequence[Record]) -> bool:
    """Whether any record is a question."""
    return any(record.row.get(OPTIONS) is not None for record in records)


def read_questions(records: Sequence[Record], source: Source, tokenizer: Any) -> list[Question]:
    """Read records as questions.

    The right option is the column `label`, as text or as an index, or without it the column `completion` apart from blanks.

    Raises UserError that names the record's place: for a record without options, with fewer than two or twice the same,
    with an answer that is none of them, and for one whose document does not depend on the answer.
    """
    return [_read_question(record, source, tokenizer) for record in records]


def _read_question(record: Record, source: Source, tokenizer: Any) -> Question:
    row, place = record.row, record.location
    options = _read_options(row.get(OPTIONS), place)
    completion = row.get(COMPLETION)
    label = row.get(LABEL, completion.strip() if isinstance(completion, str) else None)
    by_index = isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(options)
    if by_index:
        answer = label
    elif label in options:
        answer = options.index(label)
    else:
        raise UserError(f"{place}: the answer {label!r:.60} is none of the options {', '.join(options):.120}")
    documents = []
    for number, option in enumerate(options):
        changed = {**row, LABEL: number if by_index else option}
        if isinstance(completion, str):
            if options[answer] not in completion:
                raise UserError(
                    f"{place}: the completion {completion!r:.60} does not hold the answer {options[answer]!r:.60}"
                )
            before, _, after = completion.rpartition(options[answer])
            changed[COMPLETION] = before + option + after
        _, encoded = formatting.encode_record(Record(changed, place), source, tokenizer)
        if len(encoded) != 1 or not encoded[0].loss_mask.any():
            raise UserError(
                f"{place}: a question is one document with a learned answer, this is {len(encoded)} documents"
            )
        documents.append(encoded[0])
    question = Question(place, options, answer, documents)
    _check_documents(question)
    return question


def _read_options(value: Any, place: str) -> list[str]:
    if isinstance(value, str):  # tables keep lists as JSON text
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, (list, tuple)) or not all(isinstance(option, str) and option for option in value):
        raise UserError(f"{place}: no column '{OPTIONS}' with a list of texts, so it is no multiple-choice question")
    if len(set(value)) < 2 or len(set(value)) < len(value):
        raise UserError(f"{place}: '{OPTIONS}' needs two or more different texts, not {', '.join(value):.80}")
    return list(value)


def _check_documents(question: Question) -> None:
    """Raise UserError if the options do not change the learned part, or change what comes before it."""
    prompt, texts = question.prompt_ids, {document.tokens.tobytes() for document in question.documents}
    if len(texts) < len(question.documents):
        raise UserError(
            f"{question.location}: the options make no difference to the document; the template has to hold the answer "
            f"({{{LABEL}}} or {{{COMPLETION}}})"
        )
    for document in question.documents:
        if not np.array_equal(document.tokens[: int(np.argmax(document.loss_mask))], prompt):
            raise UserError(
                f"{question.location}: the options change the text before the answer; keep the prompt masked "
                "(mask_prompt: true) and the answer out of it"
            )
