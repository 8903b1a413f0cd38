"""A source after tokenization: documents by split and what they came from, as arrays for a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dylora_mlx.data.encoding import Document
from dylora_mlx.data.rendering import FormatKind
from dylora_mlx.data.source_info import SourceInfo

SPLITS = ("train", "validation", "test")
"""Names of the splits."""


@dataclass
class TokenizedSource:
    """The documents of one source."""

    splits: dict[str, list[Document]]
    """Documents by split."""
    digest: str
    """sha256 of the records, before any template was applied."""
    kinds: dict[FormatKind, int] = field(default_factory=dict)
    """Training records by the form that they were read in."""
    unlearned: int = 0
    """Records of all splits that were left out because nothing of them is learned."""
    info: SourceInfo = field(default_factory=SourceInfo)
    """Facts from reading the source: files, origins of the splits, copies."""

    @property
    def kind(self) -> FormatKind:
        """The form of most training records."""
        return max(self.kinds, key=lambda kind: self.kinds[kind]) if self.kinds else "plain"

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return arrays for a .npz file."""
        info = {"digest": self.digest, "kinds": self.kinds, "unlearned": self.unlearned, "source": self.info.to_dict()}
        arrays = {"info": np.array(json.dumps(info))}
        for split, documents in self.splits.items():
            arrays[f"{split}_tokens"] = np.concatenate([document.tokens for document in documents])
            arrays[f"{split}_loss_mask"] = np.concatenate([document.loss_mask for document in documents])
            arrays[f"{split}_ends"] = np.cumsum([len(document.tokens) for document in documents], dtype=np.int64)
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> TokenizedSource:
        """Rebuild a source. Raises KeyError, TypeError or ValueError for arrays that `to_arrays` did not make."""
        splits = {
            split: _split_documents(*(arrays[f"{split}_{part}"] for part in ("tokens", "loss_mask", "ends")))
            for split in SPLITS
        }
        info: dict[str, Any] = json.loads(str(arrays["info"]))
        if not isinstance(info["digest"], str) or not isinstance(info["kinds"], dict):
            raise TypeError("info")
        source_info = SourceInfo.from_dict(info.get("source", {}))
        return cls(splits, info["digest"], info["kinds"], int(info["unlearned"]), source_info)


def _split_documents(tokens: np.ndarray, loss_mask: np.ndarray, ends: np.ndarray) -> list[Document]:
    """Split flat arrays into documents.

    Raises ValueError for arrays that cannot be documents: a wrong dtype or length, a negative token id, fewer than
    two tokens in a document, or a first token that is a target of the loss.

    Args:
        tokens: int32 [N], all documents one after the other.
        loss_mask: bool [N].
        ends: int64 [documents], the end of each document in the other two arrays.
    """
    lengths = np.diff(ends, prepend=0)
    if tokens.dtype != np.int32 or loss_mask.dtype != bool or (lengths < 2).any():
        raise ValueError("not documents")
    if not tokens.shape == loss_mask.shape == (lengths.sum(),):
        raise ValueError("lengths do not agree")
    if tokens.min(initial=0) < 0 or loss_mask[ends - lengths].any():
        raise ValueError("a negative token id, or a first token that is a target")
    return [Document(*parts) for parts in zip(np.split(tokens, ends[:-1]), np.split(loss_mask, ends[:-1]), strict=True)]
