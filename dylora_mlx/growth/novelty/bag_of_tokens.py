"""Binary bag-of-tokens features of documents, to cluster and classify them.

Base states describe a document as far as the base model understands it. For a small base, the tokens of the document
say more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SMOOTHING = 0.1
"""Pseudo-counts of naive Bayes, as a share of the vocabulary's size, distributed over tokens as in all documents."""
ROUNDS = 5
"""Maximum number of rounds that reassign documents."""


class BagOfTokens(NamedTuple):
    """Presence of vocabulary tokens in documents."""

    vocabulary: np.ndarray
    """Token ids, int [W], sorted."""
    present: np.ndarray
    """1 where the document contains the token, else 0; float32 [n, W]."""

    @classmethod
    def from_documents(cls, documents: Sequence[np.ndarray]) -> BagOfTokens:
        """Build the features from each document's token ids; tokens of only one document are dropped."""
        token_ids, counts = np.unique(np.concatenate([np.unique(tokens) for tokens in documents]), return_counts=True)
        vocabulary = token_ids[counts > 1]
        return cls(vocabulary, presence(documents, vocabulary))

    def take(self, chosen: np.ndarray) -> BagOfTokens:
        """Select documents by index."""
        return BagOfTokens(self.vocabulary, self.present[chosen])

    def cosines(self) -> np.ndarray:
        """Return cosines of the documents, float64 [n, n], with inverse document frequencies (Spärck Jones 1972)."""
        counts = self.present.sum(0)
        weighted = self.present * np.where(counts > 1, np.log(len(self.present) / np.maximum(counts, 1)), 0)
        weighted /= np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-12)
        return (weighted @ weighted.T).astype(np.float64)

    def shares(self) -> np.ndarray:
        """Return `present` with each row normalised to a sum of one, float32 [n, W]; an empty row stays zero."""
        return self.present / np.maximum(self.present.sum(1, keepdims=True), 1)

    def class_weights(self, labels: np.ndarray) -> np.ndarray:
        """Return naive Bayes weights of k classes, float64 [k, W], from the classes of these documents, int [n].

        The product of `shares` and these weights is the mean log-probability of a document's tokens in each class.
        """
        counts, prior = self._counts(labels)
        return np.log((counts + prior) / (counts.sum(1, keepdims=True) + prior.sum()))

    def reassigned(self, labels: np.ndarray) -> np.ndarray:
        """Reassign each document to the class that fits best given all other documents, until nothing changes.

        This is hard EM, as in Nigam et al. 2000, for at most ROUNDS rounds. Returns the classes, int [n]. It stops with
        the labels of the last round before a class would become empty.
        """
        for _ in range(ROUNDS):
            updated = self._leave_one_out_scores(labels).argmax(1)
            if len(np.unique(updated)) < labels.max() + 1 or (updated == labels).all():
                return labels
            labels = updated
        return labels

    def _leave_one_out_scores(self, labels: np.ndarray) -> np.ndarray:
        """Return the mean log-probability of each document's tokens in each class, [n, k], without that document."""
        counts, prior = self._counts(labels)
        scores = self.shares() @ self.class_weights(labels).T
        sizes = self.present.sum(1)
        for label in range(len(counts)):
            members = labels == label
            # Only the counts of a document's own class include the document.
            without = np.log(np.maximum(counts[label] - 1, 0) + prior)
            scores[members, label] = self.shares()[members] @ without - np.log(
                counts[label].sum() - sizes[members] + prior.sum()
            )
        return scores

    def _counts(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of documents of each class that contain each token, [k, W], and the pseudo-counts, [W]."""
        counts = np.stack([self.present[labels == label].sum(0) for label in range(labels.max() + 1)]).astype(
            np.float64
        )
        total = counts.sum(0) + 1 / len(self.vocabulary)
        return counts, SMOOTHING * len(self.vocabulary) * total / total.sum()


def presence(documents: Sequence[np.ndarray], vocabulary: np.ndarray) -> np.ndarray:
    """Return which tokens of a sorted vocabulary occur in each document, float32 [n, W] of 0 and 1.

    Each document is an array of token ids.
    """
    present = np.zeros((len(documents), len(vocabulary)), np.float32)
    for row, tokens in zip(present, documents, strict=True):
        row[np.isin(vocabulary, tokens)] = 1
    return present
