"""The bandit finds the better arm, knows its propensities, and is judged without bias; its records survive a file."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest

from dylora_mlx.growth.decide import bandit
from dylora_mlx.growth.decide.bandit import Bandit, check_off_policy, threshold_rule
from dylora_mlx.growth.decide.bandit_log import ARMS, Arm, BanditContext, BanditTrial

TRUE = {"create": np.array([0.15, -0.5, 0, 0.1, -0.2, 0, 0.2]), "known": np.zeros(7)}
"""Weights of a world in which an expert pays for text that is far from the library, and long."""
SOME = BanditContext(0.4, -0.35, 0.6, 0.2, 3, 12_000)


def context(rng: np.random.Generator) -> BanditContext:
    similarity = rng.uniform(-0.2, 1)
    return BanditContext(
        similarity, similarity - 0.75, rng.uniform(0, 1.2), rng.uniform(-0.1, 0.6), int(rng.integers(0, 12)),
        int(10 ** rng.uniform(3.3, 6)),
    )  # fmt: skip


def expected(seen: BanditContext, action: Arm, world: Mapping[Arm, np.ndarray] = TRUE) -> float:
    return float(seen.features() @ world[action])


def logged(
    n: int, seed: int, create: float = 0.5, probed: float = 0.0, world=TRUE, noise: float = 0.1
) -> list[BanditTrial]:
    """Trials of a policy that creates with a fixed probability; of a share of them both rewards are known."""
    rng = np.random.default_rng([n, seed])
    found = []
    for _ in range(n):
        seen = context(rng)
        rewards = {action: expected(seen, action, world) + noise * rng.normal() for action in ARMS}
        action, propensity = ("create", create) if rng.random() < create else ("known", 1 - create)
        found.append(
            BanditTrial(seen, action, propensity, rewards if rng.random() < probed else {action: rewards[action]})
        )
    return found


def worth(policy, rule=threshold_rule, world=TRUE, n: int = 2000) -> float:
    """True difference between a policy, a probability of creating by context, and a rule, over fresh contexts."""
    rng = np.random.default_rng(5)
    found = []
    for seen in (context(rng) for _ in range(n)):
        other = rule(BanditTrial(seen, "known", None, {})) == "create"
        found.append((policy(seen) - other) * (expected(seen, "create", world) - expected(seen, "known", world)))
    return float(np.mean(found))


RULE = worth(lambda seen: float(seen.margin < 0), rule=lambda trial: "known", n=10_000)
"""True value of the threshold rule, for known is worth 0."""


def test_features_are_of_order_one():
    rng = np.random.default_rng(0)
    features = np.array([context(rng).features() for _ in range(500)])
    assert features.shape == (500, len(BanditContext._fields) + 1)
    assert (np.abs(features) <= 1.5).all()
    assert np.isfinite(BanditContext(0, -0.75, 0, 0, 0, 0).features()).all(), "an empty pool, no text"
    assert np.linalg.matrix_rank(features[:, [0, 1, 3, 4, 5, 6]]) == 6, "no two say the same"


def test_the_posterior_is_that_of_ridge_regression():
    trials = logged(30, 0)
    for action in ARMS:
        own = [t for t in trials if action in t.rewards]
        x, y = np.array([t.context.features() for t in own]), np.array([t.rewards[action] for t in own])
        ridge = np.eye(7) * (bandit.NOISE_STD / bandit.PRIOR_STD) ** 2
        found = Bandit(trials).arms[action]
        assert np.allclose(found.mean, np.linalg.solve(x.T @ x + ridge, x.T @ y))
        assert np.allclose(found.covariance, bandit.NOISE_STD**2 * np.linalg.inv(x.T @ x + ridge))


def test_the_propensity_is_how_often_weights_from_the_posteriors_prefer_to_create():
    learned, rng = Bandit(logged(20, 1)), np.random.default_rng(2)
    drawn = {a: rng.multivariate_normal(*learned.arms[a], size=20_000) @ SOME.features() for a in ARMS}
    assert abs((drawn["create"] > drawn["known"]).mean() - learned.probability(SOME)) < 0.015


@pytest.mark.parametrize("trials", [0, 4, 12, 300])
def test_the_propensity_is_the_frequency(trials):
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


def test_it_finds_the_better_arm():
    learned, rng = Bandit(logged(400, 0)), np.random.default_rng(6)
    clear = [c for c in (context(rng) for _ in range(500)) if abs(expected(c, "create")) > 0.1]
    right = [(learned.probability(c) > 0.5) == (expected(c, "create") > 0) for c in clear]
    assert np.mean(right) > 0.97
    assert worth(learned.probability) > 0.8 * worth(lambda c: expected(c, "create") > 0)


def test_it_learns_while_it_decides():
    """Thompson sampling from nothing: regret falls as trials come in."""
    rng, trials, regret = np.random.default_rng(0), [], []
    for _ in range(200):
        seen = context(rng)
        action, propensity = Bandit(trials).choose(seen, rng)
        gained = expected(seen, action)
        regret.append(max(expected(seen, a) for a in ARMS) - gained)
        trials.append(BanditTrial(seen, action, propensity, {action: gained + 0.1 * rng.normal()}))
    assert np.mean(regret[100:]) < 0.35 * np.mean(regret[:30])


@pytest.mark.parametrize("probed", [0.0, 0.5, 1.0])
def test_the_estimate_is_unbiased(probed):
    """Over simulated logs the errors average out, and intervals cover the truth nearly as often as they say."""
    errors, of_rule, covered = [], [], []
    for seed in range(40):
        trials = logged(40, seed, create=0.3, probed=probed)
        found, truth = check_off_policy(trials, seed=seed, resamples=400), worth(Bandit(trials).probability, n=500)
        errors.append(found.bandit - found.rule - truth)
        of_rule.append(found.rule - RULE)
        covered.append(found.interval[0] <= truth <= found.interval[1])
    for found in (errors, of_rule):
        assert abs(np.mean(found)) < 3 * np.std(found) / math.sqrt(len(found))
    assert np.mean(covered) >= 0.75


def test_the_correction_mends_a_wrong_model():
    """Rewards the linear model cannot express: the model alone is far off, the doubly robust value is not."""
    rng, trials, gains = np.random.default_rng(0), [], []
    for _ in range(1500):
        seen = context(rng)
        gain = math.cos(9 * seen.similarity)
        action, propensity = ("create", 0.2) if rng.random() < 0.2 else ("known", 0.8)
        trials.append(BanditTrial(seen, action, propensity, {action: gain if action == "create" else 0.0}))
        gains.append(gain * (seen.similarity > 0.55))
    found = check_off_policy(trials, rule=lambda t: "create" if t.context.similarity > 0.55 else "known")
    learned = Bandit(trials)
    plain = [learned.mean(t.context, "create") * (t.context.similarity > 0.55) for t in trials]
    assert found.rule == pytest.approx(np.mean(gains), abs=0.04)
    assert abs(np.mean(plain) - np.mean(gains)) > 0.08


def test_what_a_draw_reveals_does_not_bias():
    """A creation tells both rewards, the other arm only its own: to take the former as they are would overrate them."""
    rng, trials, gains = np.random.default_rng(0), [], []
    for _ in range(1500):
        seen = context(rng)
        gain = math.cos(9 * seen.similarity)
        drawn = rng.random() < 0.2
        rewards = {"create": gain, "known": 0.0} if drawn else {"known": 0.0}
        trials.append(BanditTrial(seen, "create" if drawn else "known", 0.2 if drawn else 0.8, rewards))
        gains.append(gain * (seen.similarity > 0.55))
    found = check_off_policy(trials, rule=lambda t: "create" if t.context.similarity > 0.55 else "known")
    assert found.exact == 0
    assert found.rule == pytest.approx(np.mean(gains), abs=0.04)


def certain(trials: list[BanditTrial]) -> list[BanditTrial]:
    return [trial._replace(propensity=None) for trial in trials]


def test_both_rewards_of_a_certain_action_count_exactly():
    trials = certain(logged(60, 0, probed=1.0))
    found = check_off_policy(trials)
    rule = np.mean([t.rewards["create" if t.context.margin < 0 else "known"] for t in trials])
    assert found.rule == pytest.approx(rule)
    assert (found.usable, found.exact, found.effective) == (60, 60, pytest.approx(60))


def test_a_trial_is_never_judged_by_a_posterior_that_saw_it(monkeypatch):
    """Also where trials are alike in everything but their reward."""
    trials, judges = [t._replace(rewards={t.action: float(i)}) for i, t in enumerate(logged(30, 0))], []

    class Spy(Bandit):
        def __init__(self, seen):
            super().__init__(seen)
            self.seen = list(seen)
            judges.append(self)

    monkeypatch.setattr(bandit, "Bandit", Spy)
    original, judged = bandit._value, []

    def value(trial, create, judge):
        assert trial not in judge.seen
        judged.append(trial)
        return original(trial, create, judge)

    monkeypatch.setattr(bandit, "_value", value)
    check_off_policy(trials, folds=7)
    assert len(judges) == 7
    assert all(judged.count(trial) == 2 for trial in trials)
    assert all(sum(trial in judge.seen for judge in judges) == 6 for trial in trials)


def test_trusted_when_it_is_better():
    found = check_off_policy(logged(150, 0, probed=0.3))
    assert found.trusted
    assert found.bandit > found.rule
    assert found.interval[0] > -0.01
    assert found.reason.startswith("trusted: over 150 trials")


def test_refused_when_it_is_worse():
    """The rule is right, but the gain jumps at the threshold and falls towards it: a line cannot follow."""
    rng, trials = np.random.default_rng(0), []
    for _ in range(200):
        seen = context(rng)
        gain = (0.1 + 0.6 * (seen.margin > -0.3)) if seen.margin < 0 else -0.9
        trials.append(BanditTrial(seen, "create", 0.5, {"create": gain + 0.1 * rng.normal(), "known": 0.0}))
    found = check_off_policy(trials)
    assert not found.trusted
    assert found.bandit < found.rule
    assert found.interval[1] < 0
    assert "not trusted: over 200 trials" in found.reason
    assert "not above -0.010" in found.reason


def test_a_wider_tolerance_trusts_sooner():
    trials = logged(25, 3)
    strict, lenient = (check_off_policy(trials, tolerance=t) for t in (-0.2, 0.5))
    assert not strict.trusted
    assert lenient.trusted
    assert strict.interval == lenient.interval


def test_refused_with_too_few():
    found = check_off_policy(logged(19, 0, probed=1.0))
    assert not found.trusted
    assert (found.bandit, found.rule, found.interval, found.usable) == (None, None, None, 19)
    assert found.reason == "not trusted: 19 of 20 usable trials"
    assert check_off_policy(logged(19, 0, probed=1.0), needed=19).interval is not None
    assert check_off_policy([]).reason == "not trusted: 0 of 20 usable trials"


def test_refused_with_one_arm_only():
    found = check_off_policy([t for t in logged(200, 0) if t.action == "create"])
    assert not found.trusted
    assert found.interval is None
    assert found.reason == "not trusted: no reward of known"


@pytest.mark.parametrize("propensity", [None, 1.0])
def test_decisions_that_were_certain_cannot_judge(propensity):
    sure = [t._replace(propensity=propensity) for t in logged(100, 0)]
    found = check_off_policy(sure)
    assert (found.trusted, found.usable, found.unsupported) == (False, 0, 100)
    assert found.reason == "not trusted: 0 of 20 usable trials; 100 more cannot tell, their action was certain"
    known = certain(logged(40, 1, probed=1.0))
    with_them = check_off_policy([*known, *sure])
    assert (with_them.usable, with_them.unsupported) == (40, 100)
    assert with_them.rule == pytest.approx(check_off_policy(known).rule), "they are not judged"
    assert with_them.bandit != check_off_policy(known).bandit, "but they help to fit"


def test_the_reward_of_the_arm_that_was_not_taken_supports_nothing():
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
    """Whatever is not create is known; a rule that the trials never contradict is worth their mean reward."""
    trials = certain(logged(80, 0, probed=1.0))
    assert check_off_policy(trials, rule=lambda t: "reuse").rule == pytest.approx(
        np.mean([t.rewards["known"] for t in trials])
    )
