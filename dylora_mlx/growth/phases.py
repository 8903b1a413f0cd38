"""Phases of an expert's training and the routing schedule that goes with them.

The functions are pure: they depend on step numbers and settings only.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import mlx.core as mx

from dylora_mlx.config import GrowthConfig
from dylora_mlx.model.routing.router import Routing

ExpertPhase = Literal["dense", "annealing", "mature", "frozen"]
"""Phase of an expert.

`dense`: new, every token is routed to all experts (or to the top growth.dense_experts). `annealing`: routing turns
sparse and the temperature falls. `mature`: routing is final. `frozen`: the skill is learned and the weights are fixed.
Some projections of a mature expert may be frozen already.
"""


class RoutingSchedule(NamedTuple):
    """Routing at one training step."""

    phase: ExpertPhase
    """Phase of the newest expert."""
    top_k: int | None
    """Experts per token; None for dense routing."""
    temperature: float
    """Softmax temperature of the router."""
    min_gate: float = 0.0
    """Lower bound of the newest expert's gate while it is trained."""

    @property
    def routing(self) -> Routing:
        """The routing for evaluation, without `min_gate`."""
        return Routing(self.top_k, mx.array(self.temperature))


def routing_schedule(step: int, steps: int, growth: GrowthConfig, experts: int = 0) -> RoutingSchedule:
    """Return the routing at `step` of the `steps` steps that train a new expert in a pool of `experts`.

    1. Dense, for growth.dense_steps: all experts, or the top growth.dense_experts of a larger pool.
    2. Annealing, for growth.anneal_steps: `top_k` experts per token but at least two, while the temperature falls
       linearly to its final value.
    3. Mature: `top_k` experts per token.

    In a short skill the first two phases take at most a third of the steps each.
    """
    dense_steps = min(growth.dense_steps, steps // 3)
    anneal_steps = min(growth.anneal_steps, steps // 3)
    if step < dense_steps:
        top_k = None if experts <= growth.dense_experts else growth.dense_experts
        return RoutingSchedule("dense", top_k, growth.temperature, growth.min_gate)
    if step < dense_steps + anneal_steps:
        progress = (step - dense_steps + 1) / anneal_steps
        temperature = growth.temperature + progress * (growth.final_temperature - growth.temperature)
        return RoutingSchedule("annealing", max(2, growth.top_k), temperature, growth.min_gate)
    return final_schedule(growth)._replace(min_gate=growth.min_gate)


def final_schedule(growth: GrowthConfig) -> RoutingSchedule:
    """Return the routing once every expert is mature."""
    return RoutingSchedule("mature", growth.top_k, growth.final_temperature)
