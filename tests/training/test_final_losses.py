"""Bootstrap intervals of losses: whole documents, the same draws for losses that are compared."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dylora_mlx.training import final_losses
from dylora_mlx.training.final_losses import FinalLosses, loss_intervals
from dylora_mlx.training.step.domains import Coverage
from dylora_mlx.training.step.evaluate import Evaluation


def evaluation(sums, counts) -> Evaluation:
    return Evaluation(sum(sums) / sum(counts), sum(counts), [1.0], 0.0, tuple(zip(sums, counts, strict=True)))


def test_intervals_of_three_documents_are_those_of_all_resamples():
    sums, counts = [4.0, 30.0, 9.0], [4, 10, 6]
    losses = sorted(
        sum(sums[i] for i in draw) / sum(counts[i] for i in draw) for draw in itertools.product(range(3), repeat=3)
    )
    # The lowest and the highest of 27 resamples have a share of 1 / 27 each, more than the tail of 2.5%.
    assert loss_intervals({"mixture": evaluation(sums, counts)}, 0) == {"mixture": (losses[0], losses[-1])}
    assert (losses[0], losses[-1]) == (1.0, 3.0)


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    counts = rng.integers(20, 60, 40).tolist()
    base = [count * loss for count, loss in zip(counts, rng.normal(3, 0.5, 40), strict=True)]
    mixture = [each - 0.25 * count for each, count in zip(base, counts, strict=True)]
    own = [each + 0.01 * count for each, count in zip(mixture, counts, strict=True)]
    found = loss_intervals(
        {
            "base": evaluation(base, counts),
            "mixture": evaluation(mixture, counts),
            "own_expert": evaluation(own, counts),
        },
        0,
    )
    assert found["change"] == pytest.approx((-0.25, -0.25)), "the same for every document, so without any doubt"
    assert found["regret"] == pytest.approx((-0.01, -0.01))
    low, high = found["mixture"]
    # The ratio's standard error by the delta method.
    loss = sum(mixture) / sum(counts)
    error = np.sqrt(np.sum((np.array(mixture) - loss * np.array(counts)) ** 2)) / sum(counts)
    assert low == pytest.approx(loss - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(loss + 1.96 * error, abs=0.15 * error)


def test_a_single_document_has_no_interval():
    assert loss_intervals({"mixture": evaluation([3.0], [2])}, 0) == {}


def test_the_draw_follows_the_seed():
    many = {"mixture": evaluation(list(np.random.default_rng(1).normal(9, 3, 30)), [3] * 30)}
    assert loss_intervals(many, 5) == loss_intervals(many, 5) != loss_intervals(many, 6)


def test_an_entry_of_results_json():
    assert final_losses.CONFIDENCE == 0.95
    whole = FinalLosses(2.0, 1.5, 1.4, {"mixture": (1.0, 2.0)}, Coverage(3, 9, 300, 1000))
    assert whole.to_json() == {
        "base": 2.0, "mixture": 1.5, "own_expert": 1.4, "intervals": {"mixture": [1.0, 2.0]},
        "documents": 3, "of_documents": 9, "tokens": 300, "of_tokens": 1000,
    }  # fmt: skip
    assert whole._replace(own_expert=None, coverage=None).to_json().keys() == {"base", "mixture", "intervals"}
