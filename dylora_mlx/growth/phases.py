"""Phases of an expert and the routing they allow. Pure functions of steps and settings."""

from __future__ import annotations

from typing import Literal, NamedTuple

import mlx.core as mx

from dylora_mlx.config import GrowthConfig
from dylora_mlx.model.routing.router import Routing

ExpertPhase = Literal["dense", "annealing", "mature", "frozen"]
"""Of an expert: young while routing is dense, warming while it turns sparse, mature, and frozen once its skill is learned.
A mature one may be partly frozen."""


class RoutingSchedule(NamedTuple):
    """Routing at one step: the youngest expert's phase, experts per token (None: dense), temperature, and the least
    gate that this expert has while it is trained."""

    phase: ExpertPhase
    top_k: int | None
    temperature: float
    min_gate: float = 0.0

    @property
    def routing(self) -> Routing:
        """For evaluation: without a least gate."""
        return Routing(self.top_k, mx.array(self.temperature))


def routing_schedule(step: int, steps: int, growth: GrowthConfig, experts: int = 0) -> RoutingSchedule:
    """Routing at `step` of a skill that trains a new expert for `steps` steps, in a pool of `experts`.

    Young: dense, until the warm-up is over; of a pool larger than growth.dense_experts the likeliest so many. Warming:
    `top_k` experts a token but at least two, the temperature falling to its final value. Mature: `top_k`
    experts a token. A short skill gives each phase at most a third.
    """
    warmup = min(growth.dense_steps, steps // 3)
    top2 = min(growth.anneal_steps, steps // 3)
    if step < warmup:
        dense = None if experts <= growth.dense_experts else growth.dense_experts
        return RoutingSchedule("dense", dense, growth.temperature, growth.min_gate)
    if step < warmup + top2:
        done = (step - warmup + 1) / top2
        falling = growth.temperature + done * (growth.final_temperature - growth.temperature)
        return RoutingSchedule("annealing", max(2, growth.top_k), falling, growth.min_gate)
    return final_schedule(growth)._replace(min_gate=growth.min_gate)


def final_schedule(growth: GrowthConfig) -> RoutingSchedule:
    """Routing when every expert is mature."""
    return RoutingSchedule("mature", growth.top_k, growth.final_temperature)
