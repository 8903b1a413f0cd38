"""Document means of the labels, each shard computed once and kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from dylora_mlx.config import Config, Source
from dylora_mlx.data import formatting, packing
from dylora_mlx.data.packing import Segment
from dylora_mlx.growth.novelty.embedding import DocumentMeans
from dylora_mlx.model.base.load import load_base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.training.skill.base_pass import base_states, load_reference_statistics
from novelty.labels import Label
from novelty.streams import Arrival, Part
from novelty.variants import varied

FORMAT = 1
"""Of the files kept."""
ROWS = 4
"""Packed rows in a batch."""
SOURCE = Source(name="text", source="text", text="{text}")


class Encoder:
    """A base that turns texts into document means, and its reference."""

    def __init__(self, name: str):
        self.base = load_base(name, "auto")
        config = Config(skills=[SOURCE])
        self.max_seq_length = config.data.max_seq_length
        self.model = RoutedDecoder(self.base, config.model.projections, "final")
        self.reference = load_reference_statistics(self.base, self.model, config)

    def means(self, texts: Sequence[str]) -> np.ndarray:
        """Mean final-norm states float32 [n, D] of texts, from the cache if they were there before."""
        key = hashlib.sha256(f"{FORMAT} {self.base.fingerprint} {self.max_seq_length}".encode())
        for text in texts:
            key.update(hashlib.sha256(text.encode()).digest())
        path = folder() / f"{key.hexdigest()}.npy"
        with suppress(OSError, ValueError):
            return np.load(path, allow_pickle=False)
        found = self._computed(texts)
        _keep(path, found)
        return found

    def pieces(self, texts: Sequence[str]) -> list[Segment]:
        rows = ({"text": text} for text in texts)
        documents = list(formatting.encode_all(rows, SOURCE, self.base.tokenizer, "train"))
        return packing.split_documents(documents, self.max_seq_length)

    def _computed(self, texts: Sequence[str]) -> np.ndarray:
        pieces = self.pieces(texts)
        means = DocumentMeans(np.arange(len(texts)), self.base.args.hidden_size)
        for found in base_states(self.model, pieces, self.max_seq_length, ROWS):
            at = 0
            for piece in (pieces[i] for row in found.batch.rows for i in row):
                means.add(piece.document, found.final[at : at + piece.positions])
                at += piece.positions
        return means.means().astype(np.float32)


class Bank:
    """Texts and document means of arrivals, computed when they are asked for."""

    def __init__(self, labels: Sequence[Label], encoder: Encoder):
        self.encoder = encoder
        self._labels = {label.name: label for label in labels}
        self._means: dict[tuple[str, int, str | None], np.ndarray] = {}

    def texts(self, part: Part) -> list[str]:
        """The documents of a part."""
        return self._shard(part)[: part.num_documents]

    def means(self, arrival: Arrival) -> tuple[np.ndarray, np.ndarray]:
        """Document means float32 [n, D] of an arrival, its parts one after the other, and the part of each, int64 [n]."""
        parts = [self._shard_means(part)[: part.num_documents] for part in arrival.parts]
        return np.concatenate(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts])

    def tokens(self, arrival: Arrival) -> list[np.ndarray]:
        """The token ids of the same documents."""
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
    """Where the means lie, below $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dylora_mlx" / "novelty"


def _keep(path: Path, found: np.ndarray) -> None:
    """Write beside and rename; where nothing can be written, nothing is kept."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
            np.save(file, found)
        Path(file.name).replace(path)
