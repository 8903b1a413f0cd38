"""Bags of tokens: presence, cosines, class weights and reassignment, on vocabularies small enough to count by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dylora_mlx.growth.novelty import bag_of_tokens
from dylora_mlx.growth.novelty.bag_of_tokens import BagOfTokens

DOCUMENTS = [np.array(d) for d in ([7, 3, 3, 9], [3, 9], [9, 5], [9, 5, 11])]
"""Four documents. Token 9 is in all of them, tokens 7 and 11 are in one each."""


def token_documents(labels: list[int], seed: int = 0, class_share: float = 0.3) -> list[np.ndarray]:
    """Return documents of 40 tokens.

    `class_share` of them is from the 30 tokens of the document's class, the rest from 200 shared ones.
    """
    rng = np.random.default_rng(seed)
    token_lists = []
    for label in labels:
        from_class = rng.random(40) < class_share
        token_lists.append(np.where(from_class, 200 + 30 * label + rng.integers(0, 30, 40), rng.integers(0, 200, 40)))
    return token_lists


def test_tokens_that_one_document_has_are_left_out():
    bag = BagOfTokens.from_documents(DOCUMENTS)
    assert bag.vocabulary.tolist() == [3, 5, 9]
    assert bag.present.tolist() == [[1, 0, 1], [1, 0, 1], [0, 1, 1], [0, 1, 1]]
    assert bag.take(np.array([2, 0])).present.tolist() == [[0, 1, 1], [1, 0, 1]]


def test_presence_in_a_given_vocabulary():
    present = bag_of_tokens.presence([np.array([11, 4, 4]), np.zeros(0, int)], np.array([3, 4, 11]))
    assert present.tolist() == [[0, 1, 1], [0, 0, 0]]


def test_tokens_of_every_document_do_not_count_in_cosines():
    cosines = BagOfTokens.from_documents(DOCUMENTS).cosines()
    assert np.allclose(cosines, [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]])


def test_rare_tokens_weigh_more():
    """The reference weights every token by its inverse document frequency."""
    documents = [np.array(d) for d in ([1, 2, 8], [1, 3, 8], [2, 4], [3, 4], [2, 3], [5, 2, 3], [5, 2, 3])]
    bag = BagOfTokens.from_documents(documents)
    idf = np.log(7 / bag.present.sum(0))
    weighted = bag.present * idf
    expected = weighted[0] @ weighted[1] / np.linalg.norm(weighted[0]) / np.linalg.norm(weighted[1])
    assert bag.cosines()[0, 1] == pytest.approx(expected, rel=1e-5)


def test_class_weights_are_log_probabilities():
    bag = BagOfTokens.from_documents(DOCUMENTS)
    weights = bag.class_weights(np.array([0, 0, 1, 1]))
    assert np.allclose(np.exp(weights).sum(1), 1)
    prior = bag_of_tokens.SMOOTHING * 3 * (np.array([2, 2, 4]) + 1 / 3) / 9
    assert np.allclose(weights[0], np.log((np.array([2, 0, 2]) + prior) / (4 + prior.sum())))
    assert bag.shares().sum(1).tolist() == [1, 1, 1, 1]


def test_a_document_is_scored_by_the_other_documents_only():
    """The reference leaves the document out of its class's counts by hand."""
    documents = token_documents([0] * 8 + [1] * 6)
    bag, labels = BagOfTokens.from_documents(documents), np.array([0] * 8 + [1] * 6)
    scores = bag._leave_one_out_scores(labels)
    counts = np.stack([bag.present[labels == label].sum(0) for label in (0, 1)]).astype(float)
    total = counts.sum(0) + 1 / counts.shape[1]
    prior = bag_of_tokens.SMOOTHING * counts.shape[1] * total / total.sum()
    for document in (0, 9):
        tokens = bag.present[document].astype(bool)
        for label in (0, 1):
            rest_counts = counts[label] - (bag.present[document] if labels[document] == label else 0)
            expected = np.log((rest_counts + prior) / (rest_counts.sum() + prior.sum()))[tokens].mean()
            assert scores[document, label] == pytest.approx(expected, rel=1e-5)


def test_mislabelled_documents_are_reassigned():
    truth = np.array([0] * 40 + [1] * 30)
    bag = BagOfTokens.from_documents(token_documents(truth.tolist()))
    mislabelled = truth.copy()
    mislabelled[[3, 8, 20, 44, 60]] ^= 1
    assert np.array_equal(bag.reassigned(mislabelled), truth)
    assert np.array_equal(bag.reassigned(truth), truth)


def test_reassignment_leaves_no_class_empty():
    bag = BagOfTokens.from_documents(token_documents([0] * 30))
    labels = np.array([1] + [0] * 29)
    assert set(bag.reassigned(labels).tolist()) == {0, 1}


def test_further_documents_are_classified():
    bag, labels = BagOfTokens.from_documents(token_documents([0] * 40 + [1] * 30)), np.array([0] * 40 + [1] * 30)
    further_documents = token_documents([0] * 50 + [1] * 50, seed=1)
    shares = BagOfTokens(bag.vocabulary, bag_of_tokens.presence(further_documents, bag.vocabulary)).shares()
    right = (shares @ bag.class_weights(labels).T).argmax(1) == np.array([0] * 50 + [1] * 50)
    assert right.mean() >= 0.95
