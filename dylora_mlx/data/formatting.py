"""Records to documents: token ids with a mask of the tokens to learn."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from dylora_mlx.config import Source
from dylora_mlx.errors import UserError

_COLUMN = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_FORMS = "text, prompt and completion, or messages"


class Document(NamedTuple):
    """One document: BOS, its tokens, EOS.

    tokens: int32 [n]; learn: bool [n], true where a token is a target of the loss (never the BOS).
    """

    tokens: np.ndarray
    loss_mask: np.ndarray


class TextSpan(NamedTuple):
    """A stretch of text and whether it is learned."""

    text: str
    learned: bool


def fill_template(template: str, row: Mapping[str, Any], where: str) -> str:
    """Replace each {column} of the template by the record's value; no other format syntax is understood."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in row:
            raise UserError(f"{where}: no column '{name}', there are {', '.join(row)}")
        if isinstance(row[name], (list, tuple)):
            return "\n".join(map(str, row[name]))
        return "" if row[name] is None else str(row[name])

    return _COLUMN.sub(value, template)


def text_spans(row: Mapping[str, Any], source: Source, tokenizer: Any, where: str) -> list[TextSpan]:
    """Cut a record into turns by the source's mapping, or by the usual column names where it has none."""
    learn_prompt = not source.mask_prompt
    if source.prompt is not None and source.completion is not None:
        return [
            TextSpan(fill_template(source.prompt, row, where), learn_prompt),
            TextSpan(fill_template(source.completion, row, where), True),
        ]
    if source.text is not None:
        return [TextSpan(fill_template(source.text, row, where), True)]
    column = source.messages or "messages"
    if row.get(column) is not None:
        return _chat(row[column], learn_prompt, tokenizer, f"{where}, {column}")
    if source.messages is None and row.get("prompt") is not None and row.get("completion") is not None:
        return [TextSpan(str(row["prompt"]), learn_prompt), TextSpan(str(row["completion"]), True)]
    if source.messages is None and isinstance(row.get("text"), str):
        return [TextSpan(row["text"], True)]
    raise UserError(
        f"{where}: found no {_FORMS} in the columns {', '.join(row)}; name the columns with the options of those names"
    )


def _chat(messages: Any, learn_prompt: bool, tokenizer: Any, where: str) -> list[TextSpan]:
    """Render each message as the tokenizer's chat template does, all assistant turns learned.

    A base without a template gets Gemma's own turn markers.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: a list of messages is needed, each with role and content")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f"{where}, message {number}: role and content are needed")
    clean = [{"role": str(m["role"]), "content": "" if m["content"] is None else str(m["content"])} for m in messages]
    if getattr(tokenizer, "chat_template", None) is None:
        rendered = [f"<start_of_turn>{_gemma_role(m['role'])}\n{m['content']}<end_of_turn>\n" for m in clean]
        return [
            TextSpan(text, learn_prompt or m["role"] in ("assistant", "model"))
            for m, text in zip(clean, rendered, strict=True)
        ]
    found, before = [], ""
    for number, message in enumerate(clean, 1):
        try:
            now = tokenizer.apply_chat_template(clean[:number], tokenize=False)
        except Exception as error:  # a template refuses roles and orders as it likes
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{where}, message {number}: the chat template refuses it ({reason})") from error
        if not now.startswith(before):
            raise UserError(
                f"{where}, message {number}: the chat template rewrites earlier turns, so no loss mask can be made"
            )
        found.append(TextSpan(now[len(before) :], learn_prompt or message["role"] in ("assistant", "model")))
        before = now
    bos = getattr(tokenizer, "bos_token", None)
    if bos and found[0].text.startswith(bos):  # every document gets its BOS below
        found[0] = found[0]._replace(text=found[0].text[len(bos) :])
    return found


def _gemma_role(role: str) -> str:
    return "model" if role == "assistant" else role


def encode(row: Mapping[str, Any], source: Source, tokenizer: Any, where: str) -> Document:
    """Tokenise a record, each turn by itself, as the prompt alone is tokenised when generating."""
    tokens, learn = [tokenizer.bos_token_id], [False]
    for turn in text_spans(row, source, tokenizer, where):
        try:
            ids = tokenizer.encode(turn.text, add_special_tokens=False)
        except (TypeError, UnicodeError) as error:
            raise UserError(f"{where}: holds half a surrogate pair, which is no text; mend the record") from error
        tokens += ids
        learn += [turn.learned] * len(ids)
    tokens.append(tokenizer.eos_token_id)
    learn.append(True)
    if len(tokens) == 2:
        raise UserError(f"{where}: the document is empty")
    return Document(np.array(tokens, np.int32), np.array(learn, bool))


def encode_all(rows: Iterable[Mapping[str, Any]], source: Source, tokenizer: Any, split: str) -> Iterator[Document]:
    """Encode every record of a split; an error names the record's number."""
    for number, row in enumerate(rows, 1):
        yield encode(row, source, tokenizer, f"{source.source} ({split}), record {number}")
