"""Document means of the labels, computed once per shard and cached in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from dylora_mlx.config import Config, Source
from dylora_mlx.data.packing import Segment
from dylora_mlx.model.base.load import load_base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.training.skill.base_pass import load_reference_statistics, text_means, text_segments
from novelty.labels import Label
from novelty.streams import Arrival, Part
from novelty.variants import varied

FORMAT = 1
"""Format version of the cached files."""
ROWS = 4
"""Packed rows per batch (batch size)."""
SOURCE = Source(name="text", source="text", text="{text}")


class Encoder:
    """A base that computes document means of texts, and its reference statistics."""

    def __init__(self, name: str):
        self.base = load_base(name, "auto")
        config = Config(skills=[SOURCE])
        self.max_seq_length = config.data.max_seq_length
        self.model = RoutedDecoder(self.base, config.model.projection_names, "final")
        self.reference = load_reference_statistics(self.base, self.model)

    def means(self, texts: Sequence[str]) -> np.ndarray:
        """Return the mean final-norm states float32 [n, D] of texts, from the cache if present."""
        key = hashlib.sha256(f"{FORMAT} {self.base.fingerprint} {self.max_seq_length}".encode())
        for text in texts:
            key.update(hashlib.sha256(text.encode()).digest())
        path = folder() / f"{key.hexdigest()}.npy"
        with suppress(OSError, ValueError):
            return np.load(path, allow_pickle=False)
        means = self._compute_means(texts)
        _save(path, means)
        return means

    def pieces(self, texts: Sequence[str]) -> list[Segment]:
        """Tokenize texts and split them into segments of at most `max_seq_length` positions."""
        return text_segments(texts, self.base, self.max_seq_length)

    def _compute_means(self, texts: Sequence[str]) -> np.ndarray:
        return text_means(texts, self.base, self.model, self.max_seq_length, ROWS).astype(np.float32)


class Bank:
    """Texts and document means of arrivals, computed on first use."""

    def __init__(self, labels: Sequence[Label], encoder: Encoder):
        self.encoder = encoder
        self._labels = {label.name: label for label in labels}
        self._means: dict[tuple[str, int, str | None], np.ndarray] = {}

    def texts(self, part: Part) -> list[str]:
        """Return the documents of a part."""
        return self._shard(part)[: part.num_documents]

    def means(self, arrival: Arrival) -> tuple[np.ndarray, np.ndarray]:
        """Return the document means float32 [n, D] of an arrival, part by part, and their part indices, int64 [n]."""
        parts = [self._shard_means(part)[: part.num_documents] for part in arrival.parts]
        return np.concatenate(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts])

    def tokens(self, arrival: Arrival) -> list[np.ndarray]:
        """Return the token ids of the documents of an arrival, in the order of `means`."""
        texts = [text for part in arrival.parts for text in self.texts(part)]
        encode = self.encoder.base.tokenizer.encode
        return [np.array(encode(text, add_special_tokens=False), np.int64) for text in texts]

    def _shard(self, part: Part) -> list[str]:
        label = self._labels[part.label]
        texts = label.texts[label.shards[part.shard]]
        if part.variant is None:
            return texts
        seed = hashlib.sha256(f"{part.label} {part.shard} {part.variant}".encode()).digest()
        return varied(texts, part.variant, np.random.default_rng(list(seed[:8])))

    def _shard_means(self, part: Part) -> np.ndarray:
        key = (part.label, part.shard, part.variant)
        if key not in self._means:
            self._means[key] = self.encoder.means(self._shard(part))
        return self._means[key]


def folder() -> Path:
    """Return the cache folder, below $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dylora_mlx" / "novelty"


def _save(path: Path, means: np.ndarray) -> None:
    """Write a cache file atomically, by renaming a partial file. An OSError only means that nothing is cached."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
            np.save(file, means)
        Path(file.name).replace(path)
