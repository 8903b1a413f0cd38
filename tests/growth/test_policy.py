"""From a measurement to a decision and its reason."""

from __future__ import annotations

import json

import pytest

from dylora_mlx.config import Growth
from dylora_mlx.growth import policy
from dylora_mlx.growth.novelty import Novelty
from dylora_mlx.growth.policy import Situation

EXPERTS = {"python": 0, "requests": 1, "sql": 2}


def seen(score: float | None, nearest: str | None, interval=None, threshold: float = 0.75) -> Novelty:
    similarities = {} if nearest is None else {nearest: float(score or 0)}
    around = None if score is None else (score - 0.02, score + 0.02)
    return Novelty(similarities, score, interval or around, threshold, nearest, 48)


def decide(novelty: Novelty, num_experts: int = 2, since: int | None = 100, **growth) -> policy.Decision:
    situation = Situation("flask", novelty, 5000, EXPERTS, num_experts, since)
    return policy.by_threshold(situation, Growth(**growth))


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


def test_a_known_skill_reuses_its_nearest_expert():
    found = decide(seen(0.9, "sql"))
    assert (found.action, found.expert, found.creates) == ("reuse", 2, False)
    assert "expert 2" in found.reason
    assert decide(seen(0.75, "sql")).action == "reuse", "at the threshold"


def test_what_the_base_knows_is_skipped():
    found = decide(seen(0.9, "python"))
    assert (found.action, found.expert) == ("skip", 0)
    assert "the base itself" in found.reason


@pytest.mark.parametrize(("nearest", "expert"), [("requests", 1), ("python", 0)])
def test_a_full_pool_creates_nothing(nearest, expert):
    found = decide(seen(0.3, nearest), max_experts=2)
    assert not found.creates
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
    assert close.reason.endswith("a close call)")
    assert not decide(seen(0.3, "sql")).undecided
    assert "close call" not in decide(seen(0.3, "sql")).reason


def test_the_record_has_what_decisions_jsonl_promises():
    record = json.loads(json.dumps(decide(seen(0.3, "sql")).record()))
    promised = {"skill", "action", "expert", "similarities", "interval", "threshold", "samples", "tokens", "reason"}
    assert promised <= record.keys()
    assert record["skill"] == "flask"
    assert record["samples"] == 48
    assert record["tokens"] == 5000
    assert record["num_experts"] == 2
    assert record["interval"] == pytest.approx([0.28, 0.32])
