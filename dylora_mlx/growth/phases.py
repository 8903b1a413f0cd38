"""Phases of an expert and the routing they allow. Pure functions of steps and settings."""

from __future__ import annotations

from typing import Literal, NamedTuple

from dylora_mlx.config import Growth

Phase = Literal["young", "warming", "mature", "frozen"]
"""Of an expert: young while routing is dense, warming while it turns sparse, mature, and frozen once its skill is learned.
A mature one may be partly frozen."""


class Schedule(NamedTuple):
    """Routing at one step: the youngest expert's phase, experts per token (None: dense), temperature, and the least
    gate that this expert has while it is trained."""

    phase: Phase
    top_k: int | None
    temperature: float
    floor: float = 0.0


def schedule(step: int, steps: int, growth: Growth, experts: int = 0) -> Schedule:
    """Routing at `step` of a skill that trains a new expert for `steps` steps, in a pool of `experts`.

    Young: dense, until the warm-up is over; of a pool larger than growth.dense_experts the likeliest so many. Warming:
    `final_top_k` experts a token but at least two, the temperature falling to its final value. Mature: `final_top_k`
    experts a token. A short skill gives each phase at most a third.
    """
    warmup = min(growth.warmup_steps, steps // 3)
    top2 = min(growth.top2_steps, steps // 3)
    if step < warmup:
        dense = None if experts <= growth.dense_experts else growth.dense_experts
        return Schedule("young", dense, growth.temperature, growth.floor)
    if step < warmup + top2:
        done = (step - warmup + 1) / top2
        falling = growth.temperature + done * (growth.final_temperature - growth.temperature)
        return Schedule("warming", max(2, growth.final_top_k), falling, growth.floor)
    return settled(growth)._replace(floor=growth.floor)


def settled(growth: Growth) -> Schedule:
    """Routing when every expert is mature."""
    return Schedule("mature", growth.final_top_k, growth.final_temperature)
