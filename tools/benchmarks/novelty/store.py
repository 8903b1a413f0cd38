"""Document means of labels, kept in a folder: each label is computed once, and more documents are added to it later."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dylora_mlx.errors import UserError
from dylora_mlx.system.files import atomic_write
from dylora_mlx.training.skill.base_pass import document_means
from novelty.labels import Label
from novelty.means import ROWS, Encoder


class Documents(NamedTuple):
    """Documents of one label, as a base sees them. Field names are those of the arrays in the file."""

    means: np.ndarray
    """Mean final-norm state of each document, float32 [n, D]."""
    places: np.ndarray
    """Place of each document in the order of reading, int [n]."""
    ids: np.ndarray
    """Token ids of all documents, one after another, int32."""
    ends: np.ndarray
    """Where each document ends in `ids`, int [n]."""
    digests: np.ndarray
    """Hash of each document's text and of the number of tokens that were read at most, uint64 [n]."""

    def tokens(self) -> list[np.ndarray]:
        """Return the token ids of each document."""
        return np.split(self.ids, self.ends[:-1])


def documents(label: Label, encoder: Encoder, count: int, length: int, folder: Path) -> Documents:
    """Return up to `count` documents of a label, at most `length` tokens of each, from the folder or computed.

    A folder is for one base. A label whose text or length has changed is computed again. Raises UserError for a file of
    another base.
    """
    path = folder / (re.sub(r"\W", "_", label.name.replace("#", "sharp").replace("+", "p")) + ".npz")
    kept = _load(path)
    if kept is not None and kept.means.shape[1] != encoder.base.args.hidden_size:
        raise UserError(f"{path}: for another base; give each base a folder of its own")
    texts, places = label.texts[:count], np.array(label.places[:count])
    digests = np.array([_digest(text, length) for text in texts], np.uint64)
    if kept is not None and not np.array_equal(kept.digests[: len(texts)], digests[: len(kept.digests)]):
        kept = None
    known = 0 if kept is None else len(kept.means)
    if kept is None or known < len(texts):
        found = _compute(texts[known:], places[known:], digests[known:], encoder, length)
        kept = found if kept is None else _joined(kept, found)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **kept._asdict())
    count, end = len(texts), int(kept.ends[len(texts) - 1])
    return Documents(
        kept.means[:count], kept.places[:count], kept.ids[:end], kept.ends[:count], kept.digests[:count]
    )  # fmt: skip


def _digest(text: str, length: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{length} {text}".encode()).digest()[:8], "big")


def _load(path: Path) -> Documents | None:
    if not path.is_file():
        return None
    with np.load(path) as arrays:
        return Documents(*(arrays[name] for name in Documents._fields))


def _joined(first: Documents, second: Documents) -> Documents:
    return Documents(
        np.concatenate([first.means, second.means]),
        np.concatenate([first.places, second.places]),
        np.concatenate([first.ids, second.ids]),
        np.concatenate([first.ends, len(first.ids) + second.ends]),
        np.concatenate([first.digests, second.digests]),
    )


def _compute(texts: Sequence[str], places: np.ndarray, digests: np.ndarray, encoder: Encoder, length: int) -> Documents:
    """Run the base over the beginning of each text."""
    segments = []
    for number, text in enumerate(texts):
        first = encoder.pieces([text])[0]
        tokens, loss_mask = first.tokens[: length + 1], first.loss_mask[: length + 1]
        segments.append(first._replace(tokens=tokens, loss_mask=loss_mask, document=number))
    means = document_means(encoder.model, segments, len(texts), encoder.max_seq_length, ROWS)
    ids = [segment.tokens[1:] for segment in segments]
    ends = np.cumsum([len(tokens) for tokens in ids])
    return Documents(means.astype(np.float32), places, np.concatenate(ids).astype(np.int32), ends, digests)
