"""Read records as samples by a source's field mapping, and tokenize them into documents."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from dylora_mlx.config import Source
from dylora_mlx.data import encoding, messages, rendering
from dylora_mlx.data.encoding import Document, RenderedText
from dylora_mlx.data.messages import Chat
from dylora_mlx.data.records import Record
from dylora_mlx.data.rendering import FormatKind, Plain, PromptCompletion, Sample
from dylora_mlx.errors import UserError

_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
MAX_EMPTY_TOKENS = 16
"""Learned tokens up to which a document may be nothing but blanks and ends of text."""
_RECORD_FORMS = "text, prompt and completion, messages, conversations, or instruction and output"


class EncodedSplit(NamedTuple):
    """The documents of one split of a source."""

    documents: list[Document]
    kinds: Counter[FormatKind]
    """Records by the form that they were read in."""
    unlearned: int
    """Records that were left out because nothing of them is learned: an empty completion, or a chat without an answer."""


def as_text(value: Any) -> str:
    """Return a record's value as text: text as it is, nothing for null, a list of texts by lines, anything else as JSON."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    return json.dumps(value, ensure_ascii=False)


def fill_template(template: str, row: Mapping[str, Any], location: str) -> str:
    """Replace each {column} of a template by the record's value, see `as_text`.

    No other format syntax is interpreted. Raises UserError, prefixed with `location`, for a column that the record lacks.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in row:
            raise UserError(f"{location}: no column '{name}', there are {', '.join(row)}")
        return as_text(row[name])

    return _PLACEHOLDER.sub(value, template)


def read_sample(row: Mapping[str, Any], source: Source, location: str) -> Sample:
    """Read a record by the source's field mapping, or by the usual column names if it has none.

    The usual columns are `messages` or `conversations` (chats), then `prompt` with `completion` or `response` (each text or
    messages), then `instruction` with `output` (Alpaca), then `text`. Raises UserError, prefixed with `location`, for a
    record that has none of these forms.
    """
    learn_prompt = not source.mask_prompt
    if source.prompt is not None and source.completion is not None:
        prompt, completion = (fill_template(part, row, location) for part in (source.prompt, source.completion))
        return PromptCompletion(prompt, completion, learn_prompt)
    if source.text is not None:
        return Plain(fill_template(source.text, row, location))
    if source.preset == "alpaca":
        if row.get("instruction") is None or row.get("output") is None:
            raise UserError(
                f"{location}: preset alpaca needs instruction and output, found the columns {', '.join(row)}"
            )
        return _alpaca(row, learn_prompt, location)
    column = source.messages or "messages"
    if row.get(column) is not None:
        return _chat(row[column], row, learn_prompt, f"{location}, {column}")
    if source.messages is None:
        if row.get("conversations") is not None:
            return _chat(row["conversations"], row, learn_prompt, f"{location}, conversations")
        completion = next((name for name in ("completion", "response") if row.get(name) is not None), None)
        if row.get("prompt") is not None and completion is not None:
            return _prompt_and_completion(row["prompt"], row[completion], row, learn_prompt, location)
        if row.get("instruction") is not None and row.get("output") is not None:
            return _alpaca(row, learn_prompt, location)
        if isinstance(row.get("text"), str):
            return Plain(row["text"])
    raise UserError(
        f"{location}: found no {_RECORD_FORMS} in the columns {', '.join(row)}; "
        "name the columns with the options text, prompt, completion or messages"
    )


def _alpaca(row: Mapping[str, Any], learn_prompt: bool, location: str) -> PromptCompletion:
    """Return the sample of a record of Alpaca's form: system, instruction and input, those there are, each on a line.

    Raises UserError for a record with earlier turns in `history`: it is a chat.
    """
    if row.get("history"):
        raise UserError(
            f"{location}: history holds earlier turns, which this form does not; write the record as messages"
        )
    parts = (as_text(row.get("system")), as_text(row["instruction"]), as_text(row.get("input")))
    return PromptCompletion("\n".join(filter(None, parts)) + "\n", as_text(row["output"]) + "\n", learn_prompt)


def _chat(turns: Any, row: Mapping[str, Any], learn_prompt: bool, location: str) -> Chat:
    if isinstance(turns, str):  # data sets often keep nested columns as JSON text
        try:
            turns = json.loads(turns)
        except ValueError as error:
            raise UserError(f"{location}: text that is not JSON; a list of messages is needed") from error
    is_sharegpt = isinstance(turns, list) and any(isinstance(turn, Mapping) and "from" in turn for turn in turns)
    if is_sharegpt:
        turns = messages.from_sharegpt(turns, location)
    system = row.get("system")
    if isinstance(system, str) and system and isinstance(turns, list) and turns:
        first = turns[0]
        if isinstance(first, Mapping) and first.get("role") not in ("system", "developer"):
            turns = [{"role": "system", "content": system}, *turns]
    return messages.read_chat(turns, row.get("tools") or row.get("functions"), learn_prompt, location)


def _prompt_and_completion(
    prompt: Any, completion: Any, row: Mapping[str, Any], learn_prompt: bool, location: str
) -> Sample:
    def is_chat(value: Any) -> bool:
        return isinstance(value, list) and any(isinstance(item, Mapping) for item in value)

    prompt, completion = _as_messages(prompt), _as_messages(completion)
    if is_chat(prompt) or is_chat(completion):
        return messages.read_prompt_and_completion(prompt, completion, row.get("tools"), learn_prompt, location)
    return PromptCompletion(as_text(prompt), as_text(completion), learn_prompt)


def _as_messages(value: Any) -> Any:
    """Return one message, or messages as JSON text (as a CSV file holds them), as a list of messages; else the value."""
    if isinstance(value, Mapping) and {"role", "content"} <= value.keys():
        return [value]
    if isinstance(value, str) and value.lstrip().startswith(("[{", "[ {")) and '"role"' in value:
        try:
            decoded = json.loads(value)
        except ValueError:
            return value
        if isinstance(decoded, list) and all(isinstance(item, Mapping) and "role" in item for item in decoded):
            return decoded
    return value


def encode_record(record: Record, source: Source, tokenizer: Any) -> tuple[FormatKind, list[Document]]:
    """Tokenize a record into its documents, those without a learned token left out.

    Raises UserError that names the record's place: for text that is not valid Unicode, for an empty text, and for a token
    that the base has no embedding of.
    """
    sample = read_sample(record.row, source, record.location)
    if isinstance(sample, Plain) and not sample.text:
        raise UserError(f"{record.location}: the document is empty")
    if record.row.get("train") is False or (record.row.get("weight") == 0 and record.row.get("weight") is not False):
        return rendering.kind_of(sample), []  # a record may be left out as a message may
    try:
        texts = rendering.render(sample, tokenizer, record.location)
        documents = [_encode(text, tokenizer, record.location) for text in texts]
    except (TypeError, UnicodeError) as error:  # tokenizers raises either for half a surrogate pair
        if not _has_surrogates(record.row):
            raise
        raise UserError(
            f"{record.location}: contains half a surrogate pair, which is not valid text; correct the record"
        ) from error
    return rendering.kind_of(sample), [
        document for document in documents if _says_anything(document, sample, tokenizer)
    ]


def _encode(text: RenderedText, tokenizer: Any, location: str) -> Document:
    try:
        return encoding.encode(text, tokenizer)
    except UserError as error:
        raise UserError(f"{location}: {error}") from error


def _has_surrogates(row: Mapping[str, Any]) -> bool:
    try:
        json.dumps(dict(row), ensure_ascii=False, default=str).encode()
    except UnicodeError:
        return True
    return False


def _says_anything(document: Document, sample: Sample, tokenizer: Any) -> bool:
    """Whether anything but blanks and ends of text is learned of a document."""
    learned = document.tokens[document.loss_mask]
    if len(learned) > MAX_EMPTY_TOKENS or not len(learned):
        return bool(len(learned))
    ends = {tokenizer.bos_token_id, *tokenizer.eos_token_ids}
    text = tokenizer.huggingface.decode([int(i) for i in learned if int(i) not in ends])
    if isinstance(sample, Chat) and (marker := rendering.end_marker(tokenizer)):
        text = text.replace(marker, "")
    return bool(text.strip())


def encode_records(
    records: Iterable[Record], source: Source, tokenizer: Any
) -> Iterator[tuple[FormatKind, list[Document]]]:
    """Tokenize every record of a split, in order."""
    for record in records:
        yield encode_record(record, source, tokenizer)


def collect(encoded: Iterable[tuple[FormatKind, list[Document]]]) -> EncodedSplit:
    """Put together what `encode_records` yields."""
    documents: list[Document] = []
    kinds: Counter[FormatKind] = Counter()
    unlearned = 0
    for kind, of_record in encoded:
        documents += of_record
        kinds[kind] += 1
        unlearned += not of_record
    return EncodedSplit(documents, kinds, unlearned)
