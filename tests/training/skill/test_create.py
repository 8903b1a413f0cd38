"""The judgement on a new expert, from losses of the same documents before and after."""

from __future__ import annotations

import numpy as np
import pytest

from dylora_mlx.config import GrowthConfig
from dylora_mlx.training.skill.create import compare
from dylora_mlx.training.step.evaluate import Evaluation

GROWTH = GrowthConfig(epsilon=0.02, bootstrap=200)
TOKENS = 50


def evaluation(loss: float, spread: float = 0.0, documents: int = 16, seed: int = 0) -> Evaluation:
    """Return an evaluation whose documents' losses per token have this mean and standard deviation."""
    noise = np.random.default_rng(seed).normal(size=documents)
    losses = np.full(documents, loss)
    if spread:
        losses += spread * (noise - noise.mean()) / noise.std()
    sums = tuple((float(each * TOKENS), TOKENS) for each in losses)
    return Evaluation(loss, TOKENS * documents, [1.0], 0.0, sums)


def judge(own: tuple[Evaluation, Evaluation], **others: tuple[Evaluation, Evaluation]):
    """Judge by pairs of evaluations before and after: of the skill, and of guarded domains."""
    pairs = {"skill": own, **others}
    before, after = ({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))
    return compare(before, after, "skill", list(others), GROWTH, 0)


GAIN = evaluation(3.0), evaluation(2.5)


def test_a_sure_gain_without_harm_is_kept():
    verdict = judge(GAIN, python=(evaluation(2.0), evaluation(2.01)))
    assert verdict.kept
    assert verdict.gain == pytest.approx(0.5)
    assert verdict.interval == pytest.approx((0.5, 0.5))
    assert (verdict.worst_domain, verdict.worst_rise) == ("python", pytest.approx(0.01))


def test_without_other_domains_the_gain_decides():
    verdict = judge(GAIN)
    assert verdict.kept
    assert verdict.worst_domain is None


@pytest.mark.parametrize(
    ("after", "kept"),
    [(evaluation(2.9, 0.01), True), (evaluation(2.9, 1.0), False), (evaluation(3.0), False), (evaluation(3.1), False)],
)
def test_a_gain_counts_only_if_the_whole_interval_is_above_zero(after, kept):
    verdict = judge((evaluation(3.0), after))
    assert verdict.kept is kept
    assert verdict.interval[0] - 1e-9 <= verdict.gain <= verdict.interval[1] + 1e-9
    assert ("does not surely gain" in verdict.reason) is not kept


def test_the_intervals_are_paired():
    """Documents differ by a lot, but each gains the same: that is sure."""
    assert judge((evaluation(3.0, 1.0), evaluation(2.98, 1.0))).kept


@pytest.mark.parametrize(
    ("rise", "gain", "kept"),
    [(0.015, 0.05, True), (0.03, 0.05, False), (0.03, 0.5, True), (0.06, 0.5, False), (2.7, 0.5, False)],
)
def test_a_domain_may_lose_epsilon_or_a_tenth_of_the_gain(rise, gain, kept):
    verdict = judge((evaluation(3.0), evaluation(3.0 - gain)), python=(evaluation(2.0), evaluation(2.0 + rise)))
    assert verdict.kept is kept
    assert "python loses" in verdict.reason
    if not kept:
        assert f"{max(0.02, gain / 10):.3f} allowed" in verdict.reason


def test_a_rise_that_may_be_allowed_is_kept_and_named():
    verdict = judge((evaluation(3.0), evaluation(2.9)), python=(evaluation(2.0), evaluation(2.03, 0.05)))
    assert verdict.kept
    assert "python loses 0.030 nats" in verdict.reason


def test_small_rises_of_many_domains_count_together():
    others = {f"d{i}": (evaluation(2.0), evaluation(2.018)) for i in range(6)}
    verdict = judge((evaluation(3.0), evaluation(2.9)), **others)
    assert not verdict.kept
    assert "lose 0.108 nats together" in verdict.reason
    assert judge((evaluation(3.0), evaluation(2.8)), **others).kept


def test_a_loss_that_is_not_finite_is_no_gain():
    assert not judge((evaluation(3.0), evaluation(float("nan")))).kept
    assert not judge((evaluation(3.0), evaluation(float("inf")))).kept


def test_a_single_document_has_no_interval():
    verdict = judge((evaluation(3.0, documents=1), evaluation(2.9, documents=1)))
    assert verdict.kept
    assert verdict.interval == pytest.approx((0.1, 0.1))
