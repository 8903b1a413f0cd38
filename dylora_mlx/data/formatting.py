"""Format and tokenize records: each record becomes a document, token ids with a loss mask."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from dylora_mlx.config import Source
from dylora_mlx.errors import UserError

_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_RECORD_FORMS = "text, prompt and completion, or messages"


class Document(NamedTuple):
    """One tokenized document: BOS, its tokens, EOS."""

    tokens: np.ndarray
    """Token ids, int32 [n]."""
    loss_mask: np.ndarray
    """bool [n], true where the token is a target of the loss. Never true for the BOS."""


class TextSpan(NamedTuple):
    """Part of a document's text that is either entirely in the loss or entirely masked."""

    text: str
    learned: bool
    """Whether the span's tokens are targets of the loss."""


def fill_template(template: str, row: Mapping[str, Any], location: str) -> str:
    """Replace each {column} of a template by the record's value.

    No other format syntax is interpreted. A list is joined by newlines, and None becomes an empty string. Raises
    UserError, prefixed with `location`, for a column that the record lacks.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in row:
            raise UserError(f"{location}: no column '{name}', there are {', '.join(row)}")
        if isinstance(row[name], (list, tuple)):
            return "\n".join(map(str, row[name]))
        return "" if row[name] is None else str(row[name])

    return _PLACEHOLDER.sub(value, template)


def text_spans(row: Mapping[str, Any], source: Source, tokenizer: Any, location: str) -> list[TextSpan]:
    """Split a record into text spans by the source's field mapping, or by the usual column names if it has none.

    The usual columns are `messages`, then `prompt` with `completion`, then `text`. With `source.mask_prompt` only
    completions and assistant turns are in the loss; plain text always is. Raises UserError, prefixed with `location`,
    for a record that has none of these forms.
    """
    learn_prompt = not source.mask_prompt
    if source.prompt is not None and source.completion is not None:
        return [
            TextSpan(fill_template(source.prompt, row, location), learn_prompt),
            TextSpan(fill_template(source.completion, row, location), True),
        ]
    if source.text is not None:
        return [TextSpan(fill_template(source.text, row, location), True)]
    column = source.messages or "messages"
    if row.get(column) is not None:
        return _chat(row[column], learn_prompt, tokenizer, f"{location}, {column}")
    if source.messages is None and row.get("prompt") is not None and row.get("completion") is not None:
        return [TextSpan(str(row["prompt"]), learn_prompt), TextSpan(str(row["completion"]), True)]
    if source.messages is None and isinstance(row.get("text"), str):
        return [TextSpan(row["text"], True)]
    raise UserError(
        f"{location}: found no {_RECORD_FORMS} in the columns {', '.join(row)}; "
        "name the columns with the options of those names"
    )


def _chat(messages: Any, learn_prompt: bool, tokenizer: Any, location: str) -> list[TextSpan]:
    """Render chat messages with the tokenizer's chat template, one span per message.

    Assistant turns are in the loss, the others only with `learn_prompt`. A tokenizer without a template gets Gemma's
    turn markers.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{location}: a list of messages is needed, each with role and content")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f"{location}, message {number}: role and content are needed")
    normalized = [
        {"role": str(m["role"]), "content": "" if m["content"] is None else str(m["content"])} for m in messages
    ]
    if getattr(tokenizer, "chat_template", None) is None:
        rendered = [f"<start_of_turn>{_gemma_role(m['role'])}\n{m['content']}<end_of_turn>\n" for m in normalized]
        return [
            TextSpan(text, learn_prompt or m["role"] in ("assistant", "model"))
            for m, text in zip(normalized, rendered, strict=True)
        ]
    spans, previous = [], ""
    # A template renders whole conversations only. Rendering ever longer prefixes gives the text that each message adds.
    for number, message in enumerate(normalized, 1):
        try:
            current = tokenizer.apply_chat_template(normalized[:number], tokenize=False)
        except Exception as error:  # Templates raise errors of their own for roles and orders they do not support.
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{location}, message {number}: the chat template refuses it ({reason})") from error
        if not current.startswith(previous):
            raise UserError(
                f"{location}, message {number}: the chat template rewrites earlier turns, so no loss mask can be made"
            )
        spans.append(TextSpan(current[len(previous) :], learn_prompt or message["role"] in ("assistant", "model")))
        previous = current
    bos = getattr(tokenizer, "bos_token", None)
    if bos and spans[0].text.startswith(bos):  # `encode` adds the BOS of every document.
        spans[0] = spans[0]._replace(text=spans[0].text[len(bos) :])
    return spans


def _gemma_role(role: str) -> str:
    return "model" if role == "assistant" else role


def encode(row: Mapping[str, Any], source: Source, tokenizer: Any, location: str) -> Document:
    """Tokenize a record into a document.

    Each span is tokenized separately, because generation also tokenizes the prompt without its completion: no token may
    cross the boundary. Raises UserError, prefixed with `location`, for text that is not valid Unicode and for an empty
    document.
    """
    tokens, loss_mask = [tokenizer.bos_token_id], [False]
    for span in text_spans(row, source, tokenizer, location):
        try:
            ids = tokenizer.encode(span.text, add_special_tokens=False)
        except (TypeError, UnicodeError) as error:
            raise UserError(
                f"{location}: contains half a surrogate pair, which is not valid text; correct the record"
            ) from error
        tokens += ids
        loss_mask += [span.learned] * len(ids)
    tokens.append(tokenizer.eos_token_id)
    loss_mask.append(True)
    if len(tokens) == 2:
        raise UserError(f"{location}: the document is empty")
    return Document(np.array(tokens, np.int32), np.array(loss_mask, bool))


def encode_all(rows: Iterable[Mapping[str, Any]], source: Source, tokenizer: Any, split: str) -> Iterator[Document]:
    """Tokenize every record of a split. The UserError for a bad record names its number, from 1."""
    for number, row in enumerate(rows, 1):
        yield encode(row, source, tokenizer, f"{source.source} ({split}), record {number}")
