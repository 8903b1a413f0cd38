"""Routing phases of a skill: dense, annealing with two experts a token, and mature with the final top-k."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dylora_mlx.config import GrowthConfig
from dylora_mlx.growth.phases import RoutingSchedule, final_schedule, routing_schedule

GROWTH = GrowthConfig(dense_steps=4, anneal_steps=5, top_k=1, temperature=2.0, final_temperature=0.5)


def phases(steps: int, growth: GrowthConfig = GROWTH) -> list[RoutingSchedule]:
    """Return the routing schedule of every step of a skill."""
    return [routing_schedule(step, steps, growth) for step in range(steps)]


def test_the_three_phases_in_order():
    schedules = phases(30)
    assert [s.phase for s in schedules] == ["dense"] * 4 + ["annealing"] * 5 + ["mature"] * 21
    assert [s.top_k for s in schedules] == [None] * 4 + [2] * 5 + [1] * 21
    assert [s.temperature for s in schedules[:9]] == pytest.approx([2.0] * 4 + [1.7, 1.4, 1.1, 0.8, 0.5])
    assert schedules[-1]._replace(min_gate=0.0) == final_schedule(GROWTH) == ("mature", 1, 0.5, 0.0)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 9, 12])
def test_warm_up_phases_take_at_most_a_third_of_a_short_skill_each(steps):
    names = [s.phase for s in phases(steps)]
    assert names.count("dense") == min(4, steps // 3)
    assert names.count("annealing") == min(5, steps // 3)
    assert names[-1] == "mature"
    assert names == sorted(names, key=["dense", "annealing", "mature"].index)


def test_annealing_uses_a_final_top_k_above_two():
    schedules = phases(30, GrowthConfig(dense_steps=4, anneal_steps=5, top_k=3))
    assert [s.top_k for s in schedules] == [None] * 4 + [3] * 26


def test_warm_up_phases_can_be_turned_off():
    assert {s.phase for s in phases(10, GrowthConfig(dense_steps=0, anneal_steps=0))} == {"mature"}
    assert phases(30, GrowthConfig(dense_steps=0, anneal_steps=3))[0].phase == "annealing"


def test_min_gate_holds_during_training_only():
    growth = replace(GROWTH, min_gate=0.3)
    assert {routing_schedule(step, 30, growth).min_gate for step in range(30)} == {0.3}
    assert final_schedule(growth).min_gate == 0.0
