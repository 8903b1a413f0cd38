"""Documents as a person reads them: their text, special tokens included, and what of it is learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dylora_mlx.data.encoding import Document

BINS_BELOW = 12
"""Borders of the histogram of lengths below max_seq_length: 3/4 of it, 1/2, 3/8, 1/4 and so on."""


class Part(NamedTuple):
    """Successive tokens of a document that are all learned, or all not."""

    text: str
    learned: bool


class Bin(NamedTuple):
    """One bar of the histogram of lengths."""

    low: int
    """Smallest length in it, in tokens."""
    high: int
    """Largest length in it."""
    documents: int
    """Number of documents with a length in the bin."""


def decode(ids: Sequence[int], tokenizer: Any) -> str:
    """Return the text of token ids, special tokens included."""
    return tokenizer.huggingface.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def parts(document: Document, tokenizer: Any) -> list[Part]:
    """Divide a document's text into what is learned and what is not. The texts of the parts joined are the decoded text."""
    ids, mask = document.tokens.tolist(), document.loss_mask
    text, end = decode(ids, tokenizer), 0
    text_parts = []
    borders = [*(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    for border in borders:
        start = end
        # Tokenizers differ in how they decode a beginning: some leave out a blank, and one in the middle of a character
        # gives U+FFFD. What both texts share is certain, and the rest belongs to the next part.
        end = len(text) if border == len(ids) else max(start, _shared(text, decode(ids[:border], tokenizer)))
        text_parts.append(Part(text[start:end], bool(mask[border - 1])))
    return text_parts


def _shared(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their beginnings."""
    if one.startswith(other):
        return len(other)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def to_json(skill: str, split: str, document: Document, tokenizer: Any) -> dict[str, Any]:
    """Return a document as JSON values: its text, token ids, loss mask, and the parts of its text."""
    divided = parts(document, tokenizer)
    return {
        "skill": skill,
        "split": split,
        "text": "".join(part.text for part in divided),
        "ids": document.tokens.tolist(),
        "learned": document.loss_mask.astype(int).tolist(),
        "segments": [part._asdict() for part in divided],
    }


def length(document: Document) -> int:
    """Return a document's length: the positions that it takes in a row, all tokens but the first."""
    return len(document.tokens) - 1


def histogram(lengths: Sequence[int], max_seq_length: int) -> list[Bin]:
    """Count lengths in bins, two for each doubling, with max_seq_length as a border. The first and the last hold a document.

    Above max_seq_length the borders are multiples of it, so that a bin has the documents of two windows, of three and so on.
    """
    borders = [max_seq_length]
    for below in range(1, BINS_BELOW + 1):
        borders.insert(0, _border(max_seq_length, -below))
    while borders[-1] < max(lengths, default=0):
        borders.append(_border(2 * max_seq_length, len(borders) - BINS_BELOW - 1))
    borders = sorted({border for border in borders if border})
    counts = np.bincount(np.searchsorted(borders, lengths), minlength=len(borders)).tolist()
    lows = [1, *(border + 1 for border in borders[:-1])]
    bins = [Bin(*values) for values in zip(lows, borders, counts, strict=True)]
    filled = [number for number, length_bin in enumerate(bins) if length_bin.documents]
    return bins[filled[0] : filled[-1] + 1] if filled else []


def _border(unit: int, number: int) -> int:
    """Return border `number` from `unit` on: 1, 1.5, 2, 3, 4, 6, 8 ... times as much; below it 3/4, 1/2, 3/8 ..."""
    doublings, half = divmod(number, 2)
    return int(unit * 2.0**doublings * (1.5 if half else 1.0))
