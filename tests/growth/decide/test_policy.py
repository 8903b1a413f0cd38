"""The growth policy: from a novelty measurement to a decision and its reason."""

from __future__ import annotations

import json

import pytest

from dylora_mlx.config import GrowthConfig
from dylora_mlx.growth.decide import bandit_log, policy
from dylora_mlx.growth.decide.bandit import Bandit
from dylora_mlx.growth.decide.policy import ExistingLosses, Situation, TrialResult
from dylora_mlx.growth.novelty.measure import Novelty

EXPERTS = {"python": 0, "requests": 1, "sql": 2}


def novelty_of(score: float | None, nearest: str | None, interval=None, threshold: float = 0.75) -> Novelty:
    """Return a novelty measurement."""
    similarities = {} if nearest is None else {nearest: float(score or 0)}
    default_interval = None if score is None else (score - 0.02, score + 0.02)
    return Novelty(similarities, score, interval or default_interval, threshold, nearest, 48)


EXISTING = ExistingLosses({0: 3.0, 1: 2.6, 2: 2.9}, 0.4, 30)


class Evidence:
    """Evidence fixed beforehand; `requests` counts how often each kind is requested."""

    def __init__(self, gain: float = 0.1, interval: tuple[float, float] = (0.05, 0.15)):
        self.trial_result, self.requests = (
            TrialResult(EXISTING.losses[1] - gain, gain, interval, 8),
            {"existing": 0, "trial": 0},
        )

    def existing(self) -> ExistingLosses:
        self.requests["existing"] += 1
        return EXISTING

    def trial(self) -> TrialResult:
        self.requests["trial"] += 1
        return self.trial_result


def situated(novelty: Novelty, num_experts: int = 2, since: int | None = 100, **more) -> Situation:
    """Return the situation of an arriving skill."""
    return Situation("flask", novelty, 5000, EXPERTS, num_experts, since, **more)


def decide(novelty: Novelty, num_experts: int = 2, since: int | None = 100, **growth) -> policy.Decision:
    """Return the decision of the threshold policy."""
    return policy.decide(
        situated(novelty, num_experts, since), GrowthConfig(**{"policy": "threshold", **growth}), Evidence()
    )


@pytest.mark.parametrize(
    ("similarity", "reason"),
    [
        ("max", "novel: max similarity 0.300 to sql is below 0.750"),
        ("median", "novel: median similarity 0.300 to all known skills is below 0.750"),
    ],
)
def test_the_reason_names_what_was_compared(similarity, reason):
    assert decide(novelty_of(0.3, "sql"), similarity=similarity, threshold=0.75).reason == reason


def test_a_novel_skill_gets_the_next_expert_id():
    decision = decide(novelty_of(0.3, "sql"))
    assert (decision.action, decision.expert, decision.creates) == ("create", 3, True)
    assert "0.300" in decision.reason
    assert "sql" in decision.reason
    assert "0.750" in decision.reason


def test_the_first_skill_gets_an_expert():
    decision = decide(novelty_of(None, None), num_experts=0, since=None)
    assert (decision.action, decision.expert) == ("create", 1)
    assert "empty" in decision.reason


def test_a_known_skill_refines_its_nearest_expert():
    decision = decide(novelty_of(0.9, "sql"))
    assert (decision.action, decision.expert, decision.creates) == ("refine", 2, False)
    assert "expert 2" in decision.reason
    assert decide(novelty_of(0.75, "sql")).action == "refine", "at the threshold"


def test_a_skill_known_to_the_base_is_skipped():
    decision = decide(novelty_of(0.9, "python"))
    assert (decision.action, decision.expert) == ("skip", 0)
    assert "the base itself" in decision.reason
    assert decide(novelty_of(0.9, "python"), when_known="reuse").action == "skip", "the base is never trained"


def test_a_known_skill_reuses_its_expert_on_request():
    decision = decide(novelty_of(0.9, "sql"), when_known="reuse")
    assert (decision.action, decision.expert) == ("reuse", 2)


@pytest.mark.parametrize(("nearest", "expert"), [("requests", 1), ("python", 0)])
def test_a_full_pool_creates_nothing(nearest, expert):
    decision = decide(novelty_of(0.3, nearest), max_experts=2)
    assert decision.action == ("reuse" if expert else "skip")
    assert decision.novel
    assert decision.expert == expert
    assert "full (2 experts)" in decision.reason
    assert decide(novelty_of(0.3, nearest), max_experts=3).creates


@pytest.mark.parametrize(("since", "left"), [(0, 50), (30, 20), (49, 1), (50, 0), (80, 0), (None, 0)])
def test_no_expert_is_created_during_the_cooldown(since, left):
    decision = decide(novelty_of(0.3, "sql"), since=since, cooldown_steps=50)
    assert decision.cooldown_left == left
    assert decision.creates == (left == 0)
    if left:
        assert (decision.action, decision.expert) == ("skip", 2)
        assert f"{left} steps" in decision.reason


@pytest.mark.parametrize(
    ("nearest", "gain", "trials"),
    [("sql", (-0.1, 0.02), 0), ("sql", (-0.1, 0.03), 1), ("python", (-0.1, 0.02), 1), ("sql", None, 1)],
)
def test_a_trial_is_trained_only_if_an_expert_may_know_the_skill(nearest, gain, trials):
    """Without a gain of any expert over the base none knows it. If the base is the nearest, only a trial can tell."""
    evidence = Evidence()
    evidence.existing = lambda: EXISTING._replace(gain=gain)  # type: ignore[method-assign]
    close = novelty_of(0.74, nearest, interval=(0.7, 0.8))
    decision = policy.decide(situated(close), GrowthConfig(policy="probe"), evidence)
    assert evidence.requests["trial"] == trials
    assert decision.creates
    assert (decision.trial is None) == (trials == 0)
    assert ("no expert gains more than 0.020 nats" in decision.reason) == (trials == 0)
    assert policy.Decision.from_json(json.loads(json.dumps(decision.to_json()))) == decision


def test_between_the_limits_the_probe_measures():
    between = novelty_of(0.74, "sql")._replace(limits=(0.7, 0.8), threshold=0.75)
    evidence = Evidence()
    decision = policy.decide(situated(between), GrowthConfig(policy="probe"), evidence)
    assert (evidence.requests["trial"], decision.undecided, decision.limits) == (1, True, (0.7, 0.8))
    assert "similarity cannot tell (0.740 against 0.700 to 0.800)" in decision.reason
    for score, action, limit in ((0.6, "create", "is below 0.700"), (0.9, "refine", "reaches 0.800")):
        decision = decide(between._replace(score=score))
        assert (decision.action, decision.undecided) == (action, False)
        assert limit in decision.reason


def test_a_close_call_is_named_in_the_reason():
    close = decide(novelty_of(0.74, "sql", interval=(0.7, 0.8)))
    assert close.undecided
    assert "a close call)" in close.reason
    assert not decide(novelty_of(0.3, "sql")).undecided
    assert "close call" not in decide(novelty_of(0.3, "sql")).reason


def test_the_record_has_the_documented_fields():
    record = json.loads(json.dumps(decide(novelty_of(0.3, "sql")).to_json()))
    promised = {"skill", "action", "expert", "similarities", "interval", "threshold", "samples", "tokens", "reason"}
    assert promised <= record.keys()
    assert record["skill"] == "flask"
    assert record["samples"] == 48
    assert record["tokens"] == 5000
    assert record["num_experts"] == 2
    assert record["interval"] == pytest.approx([0.28, 0.32])


CLOSE = novelty_of(0.74, "sql", interval=(0.7, 0.8))


@pytest.mark.parametrize(
    ("gain", "interval", "action", "expert"),
    [(0.1, (0.05, 0.15), "create", 3), (0.1, (0.01, 0.2), "refine", 1), (-0.2, (-0.3, -0.1), "refine", 1)],
)
def test_the_probe_decides_a_close_call(gain, interval, action, expert):
    evidence = Evidence(gain, interval)
    decision = policy.decide(situated(CLOSE), GrowthConfig(policy="probe"), evidence)
    assert (decision.action, decision.expert) == (action, expert), (
        "the best existing expert serves it, not the most similar"
    )
    assert decision.policy == "probe"
    assert decision.to_json()["probe"] == {
        "losses": {"0": 3.0, "1": 2.6, "2": 2.9}, "entropy": 0.4, "documents": 30, "gain": None, "trial": evidence.trial_result._asdict(),
    }  # fmt: skip
    assert f"{gain:+.3f}" in decision.reason


def test_a_decision_round_trips_through_json():
    evidence = Evidence(0.1, (0.05, 0.15))
    by_threshold = decide(novelty_of(0.3, "sql"))
    by_probe = policy.decide(situated(CLOSE), GrowthConfig(policy="probe"), evidence)
    by_bandit = policy.decide(situated(CLOSE), GrowthConfig(policy="bandit"), evidence)
    assert by_probe.trial == evidence.trial()
    assert by_bandit.bandit is not None
    for decision in (by_threshold, by_probe, by_bandit):
        assert policy.Decision.from_json(json.loads(json.dumps(decision.to_json()))) == decision


@pytest.mark.parametrize(("score", "action"), [(0.3, "create"), (0.9, "refine")])
def test_a_clear_case_is_not_probed(score, action):
    evidence = Evidence()
    decision = policy.decide(situated(novelty_of(score, "sql")), GrowthConfig(policy="probe"), evidence)
    assert (decision.action, decision.policy, decision.existing, decision.trial) == (action, "threshold", None, None)
    assert evidence.requests == {"existing": 0, "trial": 0}


def trained_bandit(better: bandit_log.Arm) -> Bandit:
    """Return a bandit that has seen this arm win thirty times in similar situations."""
    context = policy.bandit_context(situated(novelty_of(0.5, "sql")), EXISTING)
    rewards: dict[bandit_log.Arm, float] = {"create": 0.0, "known": 0.0}
    rewards[better] = 0.5
    return Bandit([bandit_log.BanditTrial(context, better, None, rewards)] * 30)


@pytest.mark.parametrize(("better", "action", "expert"), [("create", "create", 3), ("known", "refine", 1)])
def test_a_trusted_bandit_decides_against_the_threshold(better, action, expert):
    score = 0.9 if better == "create" else 0.5
    evidence, situation = Evidence(), situated(novelty_of(score, "sql"), bandit=trained_bandit(better), seed=3)
    decision = policy.decide(situation, GrowthConfig(policy="bandit"), evidence)
    assert (decision.action, decision.expert, decision.policy) == (action, expert, "bandit")
    assert decision.bandit is not None
    assert decision.bandit.action == better
    assert decision.bandit.propensity > 0.9
    assert decision.bandit.context.loss_gap == pytest.approx(0.4)
    assert evidence.requests["trial"] == 0


def test_an_untrusted_bandit_leaves_the_decision_to_the_probe():
    situation = situated(CLOSE, doubt="3 of 20 usable trials")
    decision = policy.decide(situation, GrowthConfig(policy="bandit"), Evidence())
    assert (decision.action, decision.policy) == ("create", "probe")
    assert "3 of 20 usable trials" in decision.reason
    assert decision.bandit is not None
    assert (decision.bandit.action, decision.bandit.propensity) == ("create", None)


def test_a_first_skill_needs_no_bandit():
    decision = policy.decide(situated(novelty_of(None, None)), GrowthConfig(policy="bandit"), Evidence())
    assert (decision.action, decision.bandit) == ("create", None)


@pytest.mark.parametrize(("expert", "action"), [(0, "skip"), (2, "reuse")])
def test_a_withheld_creation_uses_an_existing_expert(expert, action):
    decision = policy.withhold(decide(novelty_of(0.3, "sql")), expert, "the budget is full")
    assert (decision.action, decision.expert, decision.novel) == (action, expert, True)
    assert "the budget is full" in decision.reason
