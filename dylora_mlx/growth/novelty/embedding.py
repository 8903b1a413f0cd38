"""Skill embeddings: the mean of base final-norm states over documents, centred (and whitened) on a reference text.

Raw means of one model all point the same way, whatever the text; what tells skills apart is the difference from the
mean of ordinary text, measured in units of that text's own spread.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx.errors import UserError
from dylora_mlx.system.files import tensor_offsets


class Reference(NamedTuple):
    """Statistics of the base's final-norm states on ordinary text: mean float64 [D], covariance float64 [D, D]."""

    mean: np.ndarray
    covariance: np.ndarray

    def whitener(self, strength: float) -> np.ndarray:
        """[D, D] matrix (C + strength * mean eigenvalue * I)^(-1/2); the identity for strength 0."""
        dims = len(self.mean)
        if strength == 0:
            return np.eye(dims)
        values, vectors = np.linalg.eigh(self.covariance)
        values = np.maximum(values, 0) + strength * np.trace(self.covariance) / dims
        return (vectors / np.sqrt(values)) @ vectors.T


def load_reference(path: Path, dims: int) -> Reference:
    """Read reference statistics. Raises UserError when they do not fit a base of hidden size `dims`."""
    try:
        tensor_offsets(path)
        arrays: Any = mx.load(str(path))
        if any(arrays[name].dtype != mx.float32 for name in Reference._fields):
            raise TypeError("not float32")
        reference = Reference(*(np.array(arrays[name], np.float64) for name in Reference._fields))
        if not all(np.isfinite(part).all() for part in reference):
            raise ValueError("not finite")
        if reference.covariance.ndim == 2 and np.diagonal(reference.covariance).min(initial=1) <= 0:
            raise ValueError("a variance that is none")
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not readable as reference statistics; delete it to compute them again") from error
    if reference.mean.shape != (dims,) or reference.covariance.shape != (dims, dims):
        raise UserError(f"{path}: for another base (hidden size {reference.mean.size}, not {dims})")
    return reference


def compute_reference(states: list[np.ndarray]) -> Reference:
    """Statistics of states, a list of [positions, D]."""
    joined = np.concatenate(states).astype(np.float64)
    return Reference(joined.mean(0), np.cov(joined.T))


def save_reference(reference: Reference, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: mx.array(value.astype(np.float32)) for name, value in reference._asdict().items()}
    mx.save_safetensors(str(path), arrays)


class DocumentMeans:
    """Mean states of some documents, each of which may come in several parts.

    documents: their numbers [n], in the order of the means.
    """

    def __init__(self, documents: np.ndarray, dims: int):
        self._places = {int(number): place for place, number in enumerate(documents)}
        self._sums, self._counts = np.zeros((len(documents), dims)), np.zeros((len(documents), 1))

    def add(self, document: int, states: np.ndarray) -> None:
        """Add states [positions, D] of a document; one whose mean is not wanted is ignored."""
        place = self._places.get(document)
        if place is not None:
            self._sums[place] += states.sum(0, dtype=np.float64)
            self._counts[place] += len(states)

    def means(self) -> np.ndarray:
        """The means, float64 [n, D]; NaN for a document that never came."""
        with np.errstate(invalid="ignore"):
            return self._sums / self._counts


def sample_documents(documents: np.ndarray, samples: int, batch: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `samples` of the documents [n, ...] in random batches; a last batch of less than half its size is left out."""
    order = rng.permutation(len(documents))[:samples]
    batches = [order[i : i + batch] for i in range(0, len(order), batch)]
    if len(batches) > 1 and len(batches[-1]) < batch / 2:
        batches.pop()
    return documents[np.concatenate(batches)]


class EmbeddingSpace:
    """Where skills are compared: means of states, centred on the reference and whitened, then, if there is a
    projection head, moved by it; always of unit length.

    head: [..., D] unit vectors to [..., K] unit vectors.
    """

    def __init__(self, reference: Reference, whitening: float, head: Callable[[np.ndarray], np.ndarray] | None = None):
        self._mean, self._whitener, self._head = reference.mean, reference.whitener(whitening), head

    def __call__(self, means: np.ndarray) -> np.ndarray:
        """Embeddings of unit length, float64, of means of states [..., D]."""
        unit = normalize((means.astype(np.float64) - self._mean) @ self._whitener)
        return unit if self._head is None else normalize(self._head(unit).astype(np.float64))


def normalize(vectors: np.ndarray) -> np.ndarray:
    """Vectors [..., D] at unit length; zero stays zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def bootstrap_means(means: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Bootstrap means [resamples, D] of documents [n, D] drawn with replacement (Efron 1979)."""
    return bootstrap_sums(means.T, resamples, rng).T / len(means)


def bootstrap_sums(values: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Bootstrap sums [k, resamples] of values [k, n] over documents drawn with replacement, the same for all k."""
    count = values.shape[1]
    return values @ rng.multinomial(count, np.full(count, 1 / count), size=resamples).T
