"""From a measurement to a decision and its reason."""

from __future__ import annotations

import json

import pytest

from dylora_mlx.config import GrowthConfig
from dylora_mlx.growth.decide import bandit_log, policy
from dylora_mlx.growth.decide.bandit import Bandit
from dylora_mlx.growth.decide.policy import ExistingLosses, Situation, TrialResult
from dylora_mlx.growth.novelty.measure import Novelty

EXPERTS = {"python": 0, "requests": 1, "sql": 2}


def seen(score: float | None, nearest: str | None, interval=None, threshold: float = 0.75) -> Novelty:
    similarities = {} if nearest is None else {nearest: float(score or 0)}
    around = None if score is None else (score - 0.02, score + 0.02)
    return Novelty(similarities, score, interval or around, threshold, nearest, 48)


EXISTING = ExistingLosses({0: 3.0, 1: 2.6, 2: 2.9}, 0.4, 30)


class Evidence:
    """Evidence made up beforehand; `asked` counts what was asked for."""

    def __init__(self, gain: float = 0.1, interval: tuple[float, float] = (0.05, 0.15)):
        self.found, self.asked = TrialResult(EXISTING.losses[1] - gain, gain, interval, 8), {"existing": 0, "trial": 0}

    def existing(self) -> ExistingLosses:
        self.asked["existing"] += 1
        return EXISTING

    def trial(self) -> TrialResult:
        self.asked["trial"] += 1
        return self.found


def situated(novelty: Novelty, num_experts: int = 2, since: int | None = 100, **more) -> Situation:
    return Situation("flask", novelty, 5000, EXPERTS, num_experts, since, **more)


def decide(novelty: Novelty, num_experts: int = 2, since: int | None = 100, **growth) -> policy.Decision:
    return policy.decide(
        situated(novelty, num_experts, since), GrowthConfig(**{"policy": "threshold", **growth}), Evidence()
    )


def test_a_novel_skill_gets_the_next_column():
    found = decide(seen(0.3, "sql"))
    assert (found.action, found.expert, found.creates) == ("create", 3, True)
    assert "0.300" in found.reason
    assert "sql" in found.reason
    assert "0.750" in found.reason


def test_the_first_skill_of_all_gets_one():
    found = decide(seen(None, None), num_experts=0, since=None)
    assert (found.action, found.expert) == ("create", 1)
    assert "empty" in found.reason


def test_a_known_skill_refines_its_nearest_expert():
    found = decide(seen(0.9, "sql"))
    assert (found.action, found.expert, found.creates) == ("refine", 2, False)
    assert "expert 2" in found.reason
    assert decide(seen(0.75, "sql")).action == "refine", "at the threshold"


def test_what_the_base_knows_is_skipped():
    found = decide(seen(0.9, "python"))
    assert (found.action, found.expert) == ("skip", 0)
    assert "the base itself" in found.reason
    assert decide(seen(0.9, "python"), when_known="reuse").action == "skip", "the base is never trained"


def test_a_known_skill_reuses_its_expert_on_request():
    found = decide(seen(0.9, "sql"), when_known="reuse")
    assert (found.action, found.expert) == ("reuse", 2)


@pytest.mark.parametrize(("nearest", "expert"), [("requests", 1), ("python", 0)])
def test_a_full_pool_creates_nothing(nearest, expert):
    found = decide(seen(0.3, nearest), max_experts=2)
    assert found.action == ("reuse" if expert else "skip")
    assert found.novel
    assert found.expert == expert
    assert "full (2 experts)" in found.reason
    assert decide(seen(0.3, nearest), max_experts=3).creates


@pytest.mark.parametrize(("since", "left"), [(0, 50), (30, 20), (49, 1), (50, 0), (80, 0), (None, 0)])
def test_the_cooldown(since, left):
    found = decide(seen(0.3, "sql"), since=since, cooldown_steps=50)
    assert found.cooldown_left == left
    assert found.creates == (left == 0)
    if left:
        assert (found.action, found.expert) == ("skip", 2)
        assert f"{left} steps" in found.reason


def test_a_close_call_is_said():
    close = decide(seen(0.74, "sql", interval=(0.7, 0.8)))
    assert close.undecided
    assert "a close call)" in close.reason
    assert not decide(seen(0.3, "sql")).undecided
    assert "close call" not in decide(seen(0.3, "sql")).reason


def test_the_record_has_what_decisions_jsonl_promises():
    record = json.loads(json.dumps(decide(seen(0.3, "sql")).to_json()))
    promised = {"skill", "action", "expert", "similarities", "interval", "threshold", "samples", "tokens", "reason"}
    assert promised <= record.keys()
    assert record["skill"] == "flask"
    assert record["samples"] == 48
    assert record["tokens"] == 5000
    assert record["num_experts"] == 2
    assert record["interval"] == pytest.approx([0.28, 0.32])


CLOSE = seen(0.74, "sql", interval=(0.7, 0.8))


@pytest.mark.parametrize(
    ("gain", "interval", "action", "expert"),
    [(0.1, (0.05, 0.15), "create", 3), (0.1, (0.01, 0.2), "refine", 1), (-0.2, (-0.3, -0.1), "refine", 1)],
)
def test_the_probe_decides_a_close_call(gain, interval, action, expert):
    evidence = Evidence(gain, interval)
    found = policy.decide(situated(CLOSE), GrowthConfig(policy="probe"), evidence)
    assert (found.action, found.expert) == (action, expert), "the best existing expert serves it, not the most similar"
    assert found.policy == "probe"
    assert found.to_json()["probe"] == {
        "losses": {"0": 3.0, "1": 2.6, "2": 2.9}, "entropy": 0.4, "documents": 30, "trial": evidence.found._asdict(),
    }  # fmt: skip
    assert f"{gain:+.3f}" in found.reason


def test_a_decision_comes_back_from_json():
    evidence = Evidence(0.1, (0.05, 0.15))
    plain = decide(seen(0.3, "sql"))
    probed = policy.decide(situated(CLOSE), GrowthConfig(policy="probe"), evidence)
    asked = policy.decide(situated(CLOSE), GrowthConfig(policy="bandit"), evidence)
    assert probed.trial == evidence.trial()
    assert asked.bandit is not None
    for decision in (plain, probed, asked):
        assert policy.Decision.from_json(json.loads(json.dumps(decision.to_json()))) == decision


@pytest.mark.parametrize(("score", "action"), [(0.3, "create"), (0.9, "refine")])
def test_a_clear_case_is_not_probed(score, action):
    evidence = Evidence()
    found = policy.decide(situated(seen(score, "sql")), GrowthConfig(policy="probe"), evidence)
    assert (found.action, found.policy, found.existing, found.trial) == (action, "threshold", None, None)
    assert evidence.asked == {"existing": 0, "trial": 0}


def taught(better: bandit_log.Arm) -> Bandit:
    """A bandit that has seen this arm win thirty times, in situations like the one at hand."""
    seen_before = policy.bandit_context(situated(seen(0.5, "sql")), EXISTING)
    rewards: dict[bandit_log.Arm, float] = {"create": 0.0, "known": 0.0}
    rewards[better] = 0.5
    return Bandit([bandit_log.BanditTrial(seen_before, better, None, rewards)] * 30)


@pytest.mark.parametrize(("better", "action", "expert"), [("create", "create", 3), ("known", "refine", 1)])
def test_a_trusted_bandit_decides_against_the_threshold(better, action, expert):
    score = 0.9 if better == "create" else 0.5
    evidence, situation = Evidence(), situated(seen(score, "sql"), bandit=taught(better), seed=3)
    found = policy.decide(situation, GrowthConfig(policy="bandit"), evidence)
    assert (found.action, found.expert, found.policy) == (action, expert, "bandit")
    assert found.bandit is not None
    assert found.bandit.action == better
    assert found.bandit.propensity > 0.9
    assert found.bandit.context.loss_gap == pytest.approx(0.4)
    assert evidence.asked["trial"] == 0


def test_without_trust_the_probe_decides_and_the_context_is_noted():
    situation = situated(CLOSE, doubt="3 of 20 usable trials")
    found = policy.decide(situation, GrowthConfig(policy="bandit"), Evidence())
    assert (found.action, found.policy) == ("create", "probe")
    assert "3 of 20 usable trials" in found.reason
    assert found.bandit is not None
    assert (found.bandit.action, found.bandit.propensity) == ("create", None)


def test_a_first_skill_needs_no_bandit():
    found = policy.decide(situated(seen(None, None)), GrowthConfig(policy="bandit"), Evidence())
    assert (found.action, found.bandit) == ("create", None)


@pytest.mark.parametrize(("expert", "action"), [(0, "skip"), (2, "reuse")])
def test_what_cannot_be_created_is_served(expert, action):
    found = policy.withhold(decide(seen(0.3, "sql")), expert, "the budget is full")
    assert (found.action, found.expert, found.novel) == (action, expert, True)
    assert "the budget is full" in found.reason
