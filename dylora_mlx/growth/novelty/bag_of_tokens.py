"""Which tokens documents have: how alike that makes them, and which of several kinds of documents one belongs to.

States say what a document is about as far as the base understands it; a small base understands less than the document's
own words tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SMOOTHING = 0.1
"""Tokens added to a kind of documents, spread as in all of them, as a share of the vocabulary's size."""
ROUNDS = 5
"""Of reassigning documents, at most."""


class BagOfTokens(NamedTuple):
    """vocabulary: token ids int [W], sorted; present: which document has which, float32 [n, W] of 0 and 1."""

    vocabulary: np.ndarray
    present: np.ndarray

    @classmethod
    def from_documents(cls, documents: Sequence[np.ndarray]) -> BagOfTokens:
        """From the token ids of each document; a token that only one of them has is left out."""
        found, counts = np.unique(np.concatenate([np.unique(tokens) for tokens in documents]), return_counts=True)
        vocabulary = found[counts > 1]
        return cls(vocabulary, presence(documents, vocabulary))

    def take(self, chosen: np.ndarray) -> BagOfTokens:
        """Some of the documents."""
        return BagOfTokens(self.vocabulary, self.present[chosen])

    def cosines(self) -> np.ndarray:
        """Cosines [n, n] of the documents' tokens, weighted by inverse document frequency (Spärck Jones 1972)."""
        counts = self.present.sum(0)
        weighted = self.present * np.where(counts > 1, np.log(len(self.present) / np.maximum(counts, 1)), 0)
        weighted /= np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-12)
        return (weighted @ weighted.T).astype(np.float64)

    def shares(self) -> np.ndarray:
        """Each document's tokens, float32 [n, W], that sum to one."""
        return self.present / np.maximum(self.present.sum(1, keepdims=True), 1)

    def kinds(self, labels: np.ndarray) -> np.ndarray:
        """Weights float64 [k, W] of naive Bayes: `shares` times them are the mean log-probabilities of a document's
        tokens in each kind; labels int [n], the kinds of the documents at hand."""
        counts, prior = self._counts(labels)
        return np.log((counts + prior) / (counts.sum(1, keepdims=True) + prior.sum()))

    def reassigned(self, labels: np.ndarray) -> np.ndarray:
        """The kind int [n] of each document by all the others, again and again until none changes (hard EM, as in Nigam
        et al. 2000). The labels themselves if a kind would be left empty."""
        for _ in range(ROUNDS):
            found = self._by_the_others(labels).argmax(1)
            if len(np.unique(found)) < labels.max() + 1 or (found == labels).all():
                return labels
            labels = found
        return labels

    def _by_the_others(self, labels: np.ndarray) -> np.ndarray:
        """Mean log-probability [n, k] of each document's tokens in each kind without the document itself."""
        counts, prior = self._counts(labels)
        scores = self.shares() @ self.kinds(labels).T
        sizes = self.present.sum(1)
        for kind in range(len(counts)):
            own = labels == kind
            without = np.log(np.maximum(counts[kind] - 1, 0) + prior)
            scores[own, kind] = self.shares()[own] @ without - np.log(counts[kind].sum() - sizes[own] + prior.sum())
        return scores

    def _counts(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many documents of each kind have each token [k, W], and what is added to that [W]."""
        counts = np.stack([self.present[labels == kind].sum(0) for kind in range(labels.max() + 1)]).astype(np.float64)
        total = counts.sum(0) + 1 / len(self.vocabulary)
        return counts, SMOOTHING * len(self.vocabulary) * total / total.sum()


def presence(documents: Sequence[np.ndarray], vocabulary: np.ndarray) -> np.ndarray:
    """Which document, given by its token ids, has which token of a sorted vocabulary: float32 [n, W] of 0 and 1."""
    found = np.zeros((len(documents), len(vocabulary)), np.float32)
    for row, tokens in zip(found, documents, strict=True):
        row[np.isin(vocabulary, tokens)] = 1
    return found
