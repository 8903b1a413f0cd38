"""Encode rendered text as token ids and a loss mask, for training and for generation.

The ids of a prompt are always a prefix of the ids that were learned from.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from dylora_mlx.errors import UserError


class TextTokenizer(Protocol):
    """The parts of a tokenizer that rendering needs; see `model.base.tokenizer.Tokenizer`."""

    @property
    def bos_token_id(self) -> int: ...

    @property
    def eos_token_id(self) -> int: ...

    @property
    def eos_token_ids(self) -> Sequence[int]: ...

    @property
    def chat_template(self) -> str | None: ...

    @property
    def num_embeddings(self) -> int | None: ...

    def encode_text(self, text: str) -> list[int]: ...

    def token_texts(self, ids: Sequence[int]) -> list[str]: ...

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]] | None: ...

    def apply_template(
        self, template: str, messages: list[dict[str, Any]], tools: list[Any] | None, add_generation_prompt: bool
    ) -> str: ...


class Document(NamedTuple):
    """One tokenized document."""

    tokens: np.ndarray
    """Token ids, int32 [n]. The first is a BOS, unless a chat template writes none."""
    loss_mask: np.ndarray
    """bool [n], true where the token is a target of the loss. Never true for the first."""


@dataclass(frozen=True)
class RenderedText:
    """The text of a document, with the spans that are learned."""

    text: str
    learned: list[tuple[int, int]]
    """Spans [start, end) of characters that are targets of the loss."""
    asked: list[int] = field(default_factory=list)
    """Positions at which generation starts: the text before each is a prompt, and is tokenized alone."""
    special: bool = True
    """Whether a BOS belongs before the text. A chat template writes its own, or none."""
    ends: bool = True
    """Whether the text ends a document: an EOS follows, unless the text has one."""


def encode(rendered: RenderedText, tokenizer: TextTokenizer) -> Document:
    """Tokenize a rendered text.

    The ids are those of the whole text encoded once, unless a token would cross a position in `asked`. The text is
    divided there, because a prompt is tokenized without its answer. A document without a learned token gets no
    learned EOS either. Raises UserError for a token that the base has no embedding of, and UnicodeError or TypeError for text
    that is not valid Unicode.
    """
    ids, offsets = _ids_and_offsets(rendered, tokenizer)
    mask = [any(start <= offset < end for start, end in rendered.learned) for offset in offsets]
    if rendered.special and (not ids or ids[0] != tokenizer.bos_token_id):
        ids, mask = [tokenizer.bos_token_id, *ids], [False, *mask]
    if rendered.ends and ids and ids[-1] not in tokenizer.eos_token_ids:
        ids, mask = [*ids, tokenizer.eos_token_id], [*mask, any(mask)]
    if mask:
        mask[0] = False  # nothing predicts it
    if tokenizer.num_embeddings is not None and max(ids, default=0) >= tokenizer.num_embeddings:
        # MLX would read from beyond the embedding's memory.
        (token,) = tokenizer.token_texts([max(ids)])
        raise UserError(f"the base has no embedding of the token {token!r}; remove it from the text")
    return Document(np.array(ids, np.int32), np.array(mask, bool))


def prompt_ids(text: str, tokenizer: TextTokenizer, special: bool = True) -> np.ndarray:
    """Return the token ids, int32 [L], of a prompt. special: whether a BOS belongs before it, as before all but chats."""
    return encode(RenderedText(text, [], special=special, ends=False), tokenizer).tokens


def _ids_and_offsets(rendered: RenderedText, tokenizer: TextTokenizer) -> tuple[list[int], list[int]]:
    """Return the ids of a text, and for each the position of its first character."""
    text = rendered.text
    encoded = tokenizer.encode_with_offsets(text)
    if encoded is None:  # a tokenizer that does not say where its tokens come from: divide at every border
        borders = {position for span in rendered.learned for position in span} | set(rendered.asked)
    else:
        borders = set(crossed(rendered, tokenizer, encoded[0]))
    cuts = [0, *sorted(p for p in borders if 0 < p < len(text)), len(text)]
    if len(cuts) == 2 and encoded is not None:
        return encoded[0], [start for start, _ in encoded[1]]
    ids: list[int] = []
    offsets: list[int] = []
    for start, end in itertools.pairwise(cuts):
        part, places = _continuation(text[start:end], tokenizer) if start else _with_offsets(text[:end], tokenizer)
        ids += part
        offsets += [start + place for place in places]
    return ids, offsets


def crossed(rendered: RenderedText, tokenizer: TextTokenizer, ids: list[int] | None = None) -> list[int]:
    """Return the positions at which a prompt's ids are not the beginning of the whole text's ids, `ids` if they are known."""
    ids = tokenizer.encode_text(rendered.text) if ids is None else ids
    return [p for p in rendered.asked if not _is_prefix(tokenizer.encode_text(rendered.text[:p]), ids)]


def _is_prefix(prompt: list[int], ids: list[int]) -> bool:
    return ids[: len(prompt)] == prompt


def _with_offsets(text: str, tokenizer: TextTokenizer) -> tuple[list[int], list[int]]:
    encoded = tokenizer.encode_with_offsets(text)
    if encoded is None:
        ids = tokenizer.encode_text(text)
        return ids, [0] * len(ids)
    return encoded[0], [start for start, _ in encoded[1]]


def _continuation(text: str, tokenizer: TextTokenizer) -> tuple[list[int], list[int]]:
    """Encode text that follows other text. Tokenizers of the Llama 2 kind put a blank before a text that begins one."""
    anchor = "\n"
    before = tokenizer.encode_text(anchor)
    ids, offsets = _with_offsets(anchor + text, tokenizer)
    if not _is_prefix(before, ids):
        return _with_offsets(text, tokenizer)
    return ids[len(before) :], [max(place - len(anchor), 0) for place in offsets[len(before) :]]
