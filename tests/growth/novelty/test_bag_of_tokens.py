"""Which tokens documents have, on vocabularies small enough to count by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dylora_mlx.growth.novelty import bag_of_tokens
from dylora_mlx.growth.novelty.bag_of_tokens import BagOfTokens

DOCUMENTS = [np.array(d) for d in ([7, 3, 3, 9], [3, 9], [9, 5], [9, 5, 11])]
"""Token 9 is in all of them, 7 and 11 in one each."""


def drawn(kinds: list[int], seed: int = 0, own: float = 0.3) -> list[np.ndarray]:
    """Documents of 40 tokens, a share of them from their kind's own 30 and the others from 200 that all kinds share."""
    rng = np.random.default_rng(seed)
    found = []
    for kind in kinds:
        mine = rng.random(40) < own
        found.append(np.where(mine, 200 + 30 * kind + rng.integers(0, 30, 40), rng.integers(0, 200, 40)))
    return found


def test_tokens_that_one_document_has_are_left_out():
    found = BagOfTokens.from_documents(DOCUMENTS)
    assert found.vocabulary.tolist() == [3, 5, 9]
    assert found.present.tolist() == [[1, 0, 1], [1, 0, 1], [0, 1, 1], [0, 1, 1]]
    assert found.take(np.array([2, 0])).present.tolist() == [[0, 1, 1], [1, 0, 1]]


def test_presence_in_a_given_vocabulary():
    found = bag_of_tokens.presence([np.array([11, 4, 4]), np.zeros(0, int)], np.array([3, 4, 11]))
    assert found.tolist() == [[0, 1, 1], [0, 0, 0]]


def test_what_all_documents_have_makes_none_alike():
    cosines = BagOfTokens.from_documents(DOCUMENTS).cosines()
    assert np.allclose(cosines, [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]])


def test_rare_tokens_weigh_more():
    """Two documents share a token that half of them have, two one that most have."""
    documents = [np.array(d) for d in ([1, 2, 8], [1, 3, 8], [2, 4], [3, 4], [2, 3], [5, 2, 3], [5, 2, 3])]
    found = BagOfTokens.from_documents(documents)
    idf = np.log(7 / found.present.sum(0))
    weighted = found.present * idf
    expected = weighted[0] @ weighted[1] / np.linalg.norm(weighted[0]) / np.linalg.norm(weighted[1])
    assert found.cosines()[0, 1] == pytest.approx(expected, rel=1e-5)


def test_weights_are_log_probabilities():
    found = BagOfTokens.from_documents(DOCUMENTS)
    weights = found.class_weights(np.array([0, 0, 1, 1]))
    assert np.allclose(np.exp(weights).sum(1), 1)
    prior = bag_of_tokens.SMOOTHING * 3 * (np.array([2, 2, 4]) + 1 / 3) / 9
    assert np.allclose(weights[0], np.log((np.array([2, 0, 2]) + prior) / (4 + prior.sum())))
    assert found.shares().sum(1).tolist() == [1, 1, 1, 1]


def test_others_judge_a_document():
    """Left out by hand."""
    documents = drawn([0] * 8 + [1] * 6)
    found, labels = BagOfTokens.from_documents(documents), np.array([0] * 8 + [1] * 6)
    scores = found._leave_one_out_scores(labels)
    counts = np.stack([found.present[labels == kind].sum(0) for kind in (0, 1)]).astype(float)
    total = counts.sum(0) + 1 / counts.shape[1]
    prior = bag_of_tokens.SMOOTHING * counts.shape[1] * total / total.sum()
    for document in (0, 9):
        mine = found.present[document].astype(bool)
        for kind in (0, 1):
            rest = counts[kind] - (found.present[document] if labels[document] == kind else 0)
            expected = np.log((rest + prior) / (rest.sum() + prior.sum()))[mine].mean()
            assert scores[document, kind] == pytest.approx(expected, rel=1e-5)


def test_documents_in_the_wrong_kind_move():
    truth = np.array([0] * 40 + [1] * 30)
    found = BagOfTokens.from_documents(drawn(truth.tolist()))
    wrong = truth.copy()
    wrong[[3, 8, 20, 44, 60]] ^= 1
    assert np.array_equal(found.reassigned(wrong), truth)
    assert np.array_equal(found.reassigned(truth), truth)


def test_no_kind_is_left_empty():
    found = BagOfTokens.from_documents(drawn([0] * 30))
    labels = np.array([1] + [0] * 29)
    assert set(found.reassigned(labels).tolist()) == {0, 1}


def test_further_documents_go_to_their_kind():
    found, labels = BagOfTokens.from_documents(drawn([0] * 40 + [1] * 30)), np.array([0] * 40 + [1] * 30)
    others = drawn([0] * 50 + [1] * 50, seed=1)
    shares = BagOfTokens(found.vocabulary, bag_of_tokens.presence(others, found.vocabulary)).shares()
    right = (shares @ found.class_weights(labels).T).argmax(1) == np.array([0] * 50 + [1] * 50)
    assert right.mean() >= 0.95
