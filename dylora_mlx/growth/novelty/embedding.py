"""Skill embeddings: mean final-norm states of the base over documents, centred and whitened on a reference text.

The raw means of one model all point in nearly the same direction, whatever the text. Skills differ in the deviation
from the mean of ordinary text, measured relative to how much documents of that text differ.
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
    """Statistics of the mean final-norm states of the documents of a broad text."""

    mean: np.ndarray
    """Float64 [D]."""
    covariance: np.ndarray
    """Float64 [D, D]."""

    def whitener(self, strength: float) -> np.ndarray:
        """Return the matrix (C + strength * mean eigenvalue * I)^(-1/2), [D, D]; the identity for strength 0."""
        dims = len(self.mean)
        if strength == 0:
            return np.eye(dims)
        values, vectors = np.linalg.eigh(self.covariance)
        # Rounding can make small eigenvalues negative.
        values = np.maximum(values, 0) + strength * np.trace(self.covariance) / dims
        return (vectors / np.sqrt(values)) @ vectors.T


def load_reference(path: Path, dims: int) -> Reference:
    """Load reference statistics. Raises UserError if they are damaged or not for a base of hidden size `dims`."""
    try:
        tensor_offsets(path)
        arrays: Any = mx.load(str(path))
        if any(arrays[name].dtype != mx.float32 for name in Reference._fields):
            raise TypeError("not float32")
        reference = Reference(*(np.array(arrays[name], np.float64) for name in Reference._fields))
        if not all(np.isfinite(part).all() for part in reference):
            raise ValueError("not finite")
        if reference.covariance.ndim == 2 and np.diagonal(reference.covariance).min(initial=1) <= 0:
            raise ValueError("a variance is not positive")
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not readable as reference statistics; delete it to compute them again") from error
    if reference.mean.shape != (dims,) or reference.covariance.shape != (dims, dims):
        raise UserError(f"{path}: for another base (hidden size {reference.mean.size}, not {dims})")
    return reference


def compute_reference(means: np.ndarray) -> Reference:
    """Compute the statistics of document means [n, D].

    They are rounded to float32, as they are stored: a run that computes them and one that reads them have the same bits.
    """
    means = means.astype(np.float64)
    return Reference(*(part.astype(np.float32).astype(np.float64) for part in (means.mean(0), np.cov(means.T))))


def save_reference(reference: Reference, path: Path) -> None:
    """Write reference statistics to a safetensors file, as float32."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: mx.array(value.astype(np.float32)) for name, value in reference._asdict().items()}
    mx.save_safetensors(str(path), arrays)


class DocumentMeans:
    """Accumulate the mean states of selected documents, each of which may arrive in several parts.

    `documents` holds the document numbers, [n], in the order of the means.
    """

    def __init__(self, documents: np.ndarray, dims: int):
        self._rows = {int(number): row for row, number in enumerate(documents)}
        self._sums, self._counts = np.zeros((len(documents), dims)), np.zeros((len(documents), 1))

    def add(self, document: int, states: np.ndarray) -> None:
        """Add states [positions, D] of a document; documents that were not selected are ignored."""
        row = self._rows.get(document)
        if row is not None:
            self._sums[row] += states.sum(0, dtype=np.float64)
            self._counts[row] += len(states)

    def means(self) -> np.ndarray:
        """Return the means, float64 [n, D]; NaN for a document without states."""
        with np.errstate(invalid="ignore"):
            return self._sums / self._counts


def sample_documents(documents: np.ndarray, samples: int, batch: int, rng: np.random.Generator) -> np.ndarray:
    """Draw up to `samples` of the documents [n, ...] in random order.

    The draw is cut into batches of size `batch`. An incomplete last batch of less than half of the batch size is
    dropped, unless it is the only one.
    """
    order = rng.permutation(len(documents))[:samples]
    batches = [order[i : i + batch] for i in range(0, len(order), batch)]
    if len(batches) > 1 and len(batches[-1]) < batch / 2:
        batches.pop()
    return documents[np.concatenate(batches)]


class EmbeddingSpace:
    """Map mean states to skill embeddings of unit length, whose dot products are cosines.

    Mean states are centred on the reference, whitened and normalised. An optional projection head then maps unit
    vectors [..., D] to unit vectors [..., K].
    """

    def __init__(self, reference: Reference, whitening: float, head: Callable[[np.ndarray], np.ndarray] | None = None):
        self._mean, self._whitener, self._head = reference.mean, reference.whitener(whitening), head
        self.memo: dict[int, Any] = {}
        """Results of callers by the id of the object that they are of; a caller keeps the object with its result."""

    @property
    def has_head(self) -> bool:
        """Whether a projection head maps the embeddings."""
        return self._head is not None

    def whiten(self, means: np.ndarray) -> np.ndarray:
        """Return mean states [..., D] centred and whitened, float64, without the head."""
        return (means.astype(np.float64) - self._mean) @ self._whitener

    def __call__(self, means: np.ndarray) -> np.ndarray:
        """Return the embeddings of mean states [..., D], float64 of unit length."""
        unit = normalize(self.whiten(means))
        return unit if self._head is None else normalize(self._head(unit).astype(np.float64))


def normalize(vectors: np.ndarray) -> np.ndarray:
    """Scale vectors [..., D] to unit length; zero vectors stay zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def bootstrap_means(means: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Return bootstrap means, [resamples, D], of documents [n, D] drawn with replacement (Efron 1979)."""
    return bootstrap_sums(means.T, resamples, rng).T / len(means)


def bootstrap_sums(values: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Return bootstrap sums, [k, resamples], of values [k, n] over n documents drawn with replacement.

    All k rows use the same draws.
    """
    count = values.shape[1]
    # Multinomial counts are how often each document is drawn, so a resample is one matrix product.
    return values @ rng.multinomial(count, np.full(count, 1 / count), size=resamples).T
