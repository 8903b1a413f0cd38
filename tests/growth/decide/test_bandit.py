"""The create-or-known bandit: learning the better arm, propensities, and unbiased off-policy evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest

from dylora_mlx.growth.decide import bandit
from dylora_mlx.growth.decide.bandit import Bandit, check_off_policy, threshold_rule
from dylora_mlx.growth.decide.bandit_log import ARMS, Arm, BanditContext, BanditTrial

TRUE = {"create": np.array([0.15, -0.5, 0, 0.1, -0.2, 0, 0.2]), "known": np.zeros(7)}
"""Reward weights for which a new expert pays off on long text that is far from the library."""
SOME = BanditContext(0.4, -0.35, 0.6, 0.2, 3, 12_000)


def context(rng: np.random.Generator) -> BanditContext:
    """Return a random context."""
    similarity = rng.uniform(-0.2, 1)
    return BanditContext(
        similarity, similarity - 0.75, rng.uniform(0, 1.2), rng.uniform(-0.1, 0.6), int(rng.integers(0, 12)),
        int(10 ** rng.uniform(3.3, 6)),
    )  # fmt: skip


def expected(bandit_context: BanditContext, action: Arm, world: Mapping[Arm, np.ndarray] = TRUE) -> float:
    """Return the expected reward of an action in a context."""
    return float(bandit_context.features() @ world[action])


def logged(
    n: int, seed: int, create: float = 0.5, probed: float = 0.0, world=TRUE, noise: float = 0.1
) -> list[BanditTrial]:
    """Return trials of a policy that creates with a fixed probability.

    For a share `probed` of them both rewards are known.
    """
    rng = np.random.default_rng([n, seed])
    trials = []
    for _ in range(n):
        bandit_context = context(rng)
        rewards = {action: expected(bandit_context, action, world) + noise * rng.normal() for action in ARMS}
        action, propensity = ("create", create) if rng.random() < create else ("known", 1 - create)
        trials.append(
            BanditTrial(
                bandit_context, action, propensity, rewards if rng.random() < probed else {action: rewards[action]}
            )
        )
    return trials


def worth(policy, rule=threshold_rule, world=TRUE, n: int = 2000) -> float:
    """Return the true mean reward of a policy minus that of a rule, over fresh contexts.

    The policy maps a context to its probability of creating an expert.
    """
    rng = np.random.default_rng(5)
    advantages = []
    for bandit_context in (context(rng) for _ in range(n)):
        rule_creates = rule(BanditTrial(bandit_context, "known", None, {})) == "create"
        advantages.append(
            (policy(bandit_context) - rule_creates)
            * (expected(bandit_context, "create", world) - expected(bandit_context, "known", world))
        )
    return float(np.mean(advantages))


RULE = worth(lambda bandit_context: float(bandit_context.margin < 0), rule=lambda trial: "known", n=10_000)
"""True value of the threshold rule; the action known has reward 0."""


def test_features_are_of_order_one():
    rng = np.random.default_rng(0)
    features = np.array([context(rng).features() for _ in range(500)])
    assert features.shape == (500, len(BanditContext._fields) + 1)
    assert (np.abs(features) <= 1.5).all()
    assert np.isfinite(BanditContext(0, -0.75, 0, 0, 0, 0).features()).all(), "an empty pool, no text"
    assert np.linalg.matrix_rank(features[:, [0, 1, 3, 4, 5, 6]]) == 6, "no two are collinear"


def test_the_posterior_equals_ridge_regression():
    trials = logged(30, 0)
    for action in ARMS:
        arm_trials = [t for t in trials if action in t.rewards]
        x, y = np.array([t.context.features() for t in arm_trials]), np.array([t.rewards[action] for t in arm_trials])
        ridge = np.eye(7) * (bandit.NOISE_STD / bandit.PRIOR_STD) ** 2
        posterior = Bandit(trials).arms[action]
        assert np.allclose(posterior.mean, np.linalg.solve(x.T @ x + ridge, x.T @ y))
        assert np.allclose(posterior.covariance, bandit.NOISE_STD**2 * np.linalg.inv(x.T @ x + ridge))


def test_the_propensity_is_the_probability_that_create_samples_higher():
    learned, rng = Bandit(logged(20, 1)), np.random.default_rng(2)
    sampled_rewards = {a: rng.multivariate_normal(*learned.arms[a], size=20_000) @ SOME.features() for a in ARMS}
    assert abs((sampled_rewards["create"] > sampled_rewards["known"]).mean() - learned.probability(SOME)) < 0.015


@pytest.mark.parametrize("trials", [0, 4, 12, 300])
def test_the_propensity_is_the_frequency_of_the_action(trials):
    learned, rng = Bandit(logged(trials, 3)), np.random.default_rng(4)
    chosen = [learned.choose(SOME, rng) for _ in range(5000)]
    share = np.mean([action == "create" for action, _ in chosen])
    create = learned.probability(SOME)
    assert abs(share - create) < 4 * math.sqrt(create * (1 - create) / 5000)
    assert {propensity for action, propensity in chosen if action == "create"} <= {create}
    assert {propensity for action, propensity in chosen if action == "known"} <= {1 - create}


def test_without_trials_both_arms_are_alike():
    assert Bandit([]).probability(SOME) == pytest.approx(0.5)


def test_no_arm_is_ever_certain():
    trials = [
        BanditTrial(SOME, "create", 0.5, {"create": sign * 5.0, "known": 0.0}) for sign in (1, -1) for _ in range(50)
    ]
    assert Bandit(trials[:50]).probability(SOME) == 1 - bandit.MIN_PROBABILITY
    assert Bandit(trials[50:]).probability(SOME) == bandit.MIN_PROBABILITY


def test_the_bandit_finds_the_better_arm():
    learned, rng = Bandit(logged(400, 0)), np.random.default_rng(6)
    clear = [c for c in (context(rng) for _ in range(500)) if abs(expected(c, "create")) > 0.1]
    right = [(learned.probability(c) > 0.5) == (expected(c, "create") > 0) for c in clear]
    assert np.mean(right) > 0.97
    assert worth(learned.probability) > 0.8 * worth(lambda c: expected(c, "create") > 0)


def test_regret_falls_while_the_bandit_decides():
    """Thompson sampling without prior trials: the regret falls as trials come in."""
    rng, trials, regret = np.random.default_rng(0), [], []
    for _ in range(200):
        bandit_context = context(rng)
        action, propensity = Bandit(trials).choose(bandit_context, rng)
        reward = expected(bandit_context, action)
        regret.append(max(expected(bandit_context, a) for a in ARMS) - reward)
        trials.append(BanditTrial(bandit_context, action, propensity, {action: reward + 0.1 * rng.normal()}))
    assert np.mean(regret[100:]) < 0.35 * np.mean(regret[:30])


@pytest.mark.parametrize("probed", [0.0, 0.5, 1.0])
def test_the_off_policy_estimate_is_unbiased(probed):
    """Over simulated logs the errors average out, and the intervals cover the truth nearly as often as their level."""
    errors, rule_errors, covered = [], [], []
    for seed in range(40):
        trials = logged(40, seed, create=0.3, probed=probed)
        result, truth = check_off_policy(trials, seed=seed, resamples=400), worth(Bandit(trials).probability, n=500)
        errors.append(result.bandit - result.rule - truth)
        rule_errors.append(result.rule - RULE)
        covered.append(result.interval[0] <= truth <= result.interval[1])
    for result in (errors, rule_errors):
        assert abs(np.mean(result)) < 3 * np.std(result) / math.sqrt(len(result))
    assert np.mean(covered) >= 0.75


def test_the_doubly_robust_correction_repairs_a_wrong_model():
    """The linear model cannot express these rewards. Alone it is far off, but the doubly robust value is not."""
    rng, trials, gains = np.random.default_rng(0), [], []
    for _ in range(1500):
        bandit_context = context(rng)
        gain = math.cos(9 * bandit_context.similarity)
        action, propensity = ("create", 0.2) if rng.random() < 0.2 else ("known", 0.8)
        trials.append(BanditTrial(bandit_context, action, propensity, {action: gain if action == "create" else 0.0}))
        gains.append(gain * (bandit_context.similarity > 0.55))
    verdict = check_off_policy(trials, rule=lambda t: "create" if t.context.similarity > 0.55 else "known")
    learned = Bandit(trials)
    model_values = [learned.mean(t.context, "create") * (t.context.similarity > 0.55) for t in trials]
    assert verdict.rule == pytest.approx(np.mean(gains), abs=0.04)
    assert abs(np.mean(model_values) - np.mean(gains)) > 0.08


def test_rewards_revealed_by_the_action_do_not_bias():
    """A creation reveals both rewards, the other arm only its own.

    Counting the former exactly would overrate creations.
    """
    rng, trials, gains = np.random.default_rng(0), [], []
    for _ in range(1500):
        bandit_context = context(rng)
        gain = math.cos(9 * bandit_context.similarity)
        creates = rng.random() < 0.2
        rewards = {"create": gain, "known": 0.0} if creates else {"known": 0.0}
        trials.append(BanditTrial(bandit_context, "create" if creates else "known", 0.2 if creates else 0.8, rewards))
        gains.append(gain * (bandit_context.similarity > 0.55))
    verdict = check_off_policy(trials, rule=lambda t: "create" if t.context.similarity > 0.55 else "known")
    assert verdict.exact == 0
    assert verdict.rule == pytest.approx(np.mean(gains), abs=0.04)


def certain(trials: list[BanditTrial]) -> list[BanditTrial]:
    """Return the trials as decisions whose action was certain."""
    return [trial._replace(propensity=None) for trial in trials]


def test_both_rewards_of_a_certain_action_count_exactly():
    trials = certain(logged(60, 0, probed=1.0))
    verdict = check_off_policy(trials)
    rule = np.mean([t.rewards["create" if t.context.margin < 0 else "known"] for t in trials])
    assert verdict.rule == pytest.approx(rule)
    assert (verdict.usable, verdict.exact, verdict.effective) == (60, 60, pytest.approx(60))


def test_a_trial_is_never_judged_by_a_posterior_that_saw_it(monkeypatch):
    """Each trial has a reward of its own, which identifies it even if the rest is equal."""
    trials, judges = [t._replace(rewards={t.action: float(i)}) for i, t in enumerate(logged(30, 0))], []

    class Spy(Bandit):
        def __init__(self, seen):
            super().__init__(seen)
            self.seen = list(seen)
            judges.append(self)

    monkeypatch.setattr(bandit, "Bandit", Spy)
    original_value, judged = bandit._value, []

    def value(trial, create, judge):
        assert trial not in judge.seen
        judged.append(trial)
        return original_value(trial, create, judge)

    monkeypatch.setattr(bandit, "_value", value)
    check_off_policy(trials, folds=7)
    assert len(judges) == 7
    assert all(judged.count(trial) == 2 for trial in trials)
    assert all(sum(trial in judge.seen for judge in judges) == 6 for trial in trials)


def test_a_better_bandit_is_trusted():
    verdict = check_off_policy(logged(150, 0, probed=0.3))
    assert verdict.trusted
    assert verdict.bandit > verdict.rule
    assert verdict.interval[0] > -0.01
    assert verdict.reason.startswith("trusted: over 150 trials")


def test_a_worse_bandit_is_not_trusted():
    """The rule is right. The gain jumps at the threshold and falls towards it, which a linear model cannot follow."""
    rng, trials = np.random.default_rng(0), []
    for _ in range(200):
        bandit_context = context(rng)
        gain = (0.1 + 0.6 * (bandit_context.margin > -0.3)) if bandit_context.margin < 0 else -0.9
        trials.append(BanditTrial(bandit_context, "create", 0.5, {"create": gain + 0.1 * rng.normal(), "known": 0.0}))
    verdict = check_off_policy(trials)
    assert not verdict.trusted
    assert verdict.bandit < verdict.rule
    assert verdict.interval[1] < 0
    assert "not trusted: over 200 trials" in verdict.reason
    assert "not above -0.010" in verdict.reason


def test_a_wider_tolerance_trusts_earlier():
    trials = logged(25, 3)
    strict, lenient = (check_off_policy(trials, tolerance=t) for t in (-0.2, 0.5))
    assert not strict.trusted
    assert lenient.trusted
    assert strict.interval == lenient.interval


def test_too_few_trials_are_not_trusted():
    verdict = check_off_policy(logged(19, 0, probed=1.0))
    assert not verdict.trusted
    assert (verdict.bandit, verdict.rule, verdict.interval, verdict.usable) == (None, None, None, 19)
    assert verdict.reason == "not trusted: 19 of 20 usable trials"
    assert check_off_policy(logged(19, 0, probed=1.0), needed=19).interval is not None
    assert check_off_policy([]).reason == "not trusted: 0 of 20 usable trials"


def test_trials_of_one_arm_are_not_trusted():
    verdict = check_off_policy([t for t in logged(200, 0) if t.action == "create"])
    assert not verdict.trusted
    assert verdict.interval is None
    assert verdict.reason == "not trusted: no reward of known"


@pytest.mark.parametrize("propensity", [None, 1.0])
def test_certain_decisions_with_one_reward_are_unsupported(propensity):
    certain_trials = [t._replace(propensity=propensity) for t in logged(100, 0)]
    verdict = check_off_policy(certain_trials)
    assert (verdict.trusted, verdict.usable, verdict.unsupported) == (False, 0, 100)
    assert verdict.reason == "not trusted: 0 of 20 usable trials; 100 more cannot tell, their action was certain"
    known = certain(logged(40, 1, probed=1.0))
    combined = check_off_policy([*known, *certain_trials])
    assert (combined.usable, combined.unsupported) == (40, 100)
    assert combined.rule == pytest.approx(check_off_policy(known).rule), "they are not evaluated"
    assert combined.bandit != check_off_policy(known).bandit, "but they help to fit"


def test_a_reward_of_the_arm_not_taken_is_unsupported():
    trials = [t._replace(action="known" if t.action == "create" else "create") for t in logged(50, 0)]
    assert check_off_policy(trials).unsupported == 50


def test_the_effective_sample_size_falls_with_uneven_propensities():
    even, uneven = (check_off_policy(logged(200, 0, create=create)) for create in (0.5, 0.05))
    assert uneven.effective < even.effective < 200
    assert uneven.interval[1] - uneven.interval[0] > even.interval[1] - even.interval[0]


def test_the_seed_decides_the_verdict():
    trials = logged(50, 0)
    assert check_off_policy(trials, seed=1) == check_off_policy(trials, seed=1)
    assert check_off_policy(trials, seed=1).interval != check_off_policy(trials, seed=2).interval


def test_another_rule():
    """Every action but create counts as known. A rule that the trials never contradict has their mean reward."""
    trials = certain(logged(80, 0, probed=1.0))
    assert check_off_policy(trials, rule=lambda t: "reuse").rule == pytest.approx(
        np.mean([t.rewards["known"] for t in trials])
    )
