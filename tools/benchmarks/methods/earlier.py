"""The scheme of the earlier PyTorch attempt that this project began from.

A routing pass with ALL experts on, in a uniform dense mixture; a linear router without a null expert reads its last hidden
state, so that what the router reads drifts as experts train; a new gate row starts at random; the experts' final logits
are mixed by a dense softmax. The language-model loss alone trains the router along with the skill's expert: no rehearsal,
no balance, no closed-form start. One forward pass for each expert beside the routing pass.

The head is linear, so mixing final-norm states h = sum_e g_e h_e mixes the logits, and no logits of each expert are held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.experts.lora import Expert, Stack
from dylora_mlx.training.step.losses import MicroBatch
from methods import adapters, training
from methods.adapters import Stacking
from methods.apart import Owned
from methods.bench import Bench, Result, Row
from methods.course import Course
from methods.training import Forward, Learned

SPREAD = 0.02
"""Standard deviation of a new gate row's weights; its bias is 0."""

Gate = dict[str, mx.array]
"""The router: weight [E, D] and bias [E], float32."""


def earlier(bench: Bench) -> Result:
    """An expert for each owner; a skill whose owner has one goes on training it. Other experts are frozen, but the router
    never is, with the router's own learning rate."""
    course, now = Course(bench), Owned()
    gate: Gate = {"weight": mx.zeros((0, bench.base.args.hidden_size)), "bias": mx.zeros((0,))}
    for number, skill in enumerate(bench.skills):
        owner = bench.owners[skill.name]
        if owner not in now:
            now = {**now, owner: bench.expert(bench.config.model.rank, owner)}
            gate = grown(gate, bench.seed, owner)
        own = list(now).index(owner)
        start = {"experts": adapters.weights_of(now[owner]), "router": gate}
        loss = _loss(bench, course.model, list(now.values()), own)
        learned = course.train(start, loss, skill.train, number, bench.steps(skill))
        now, gate = {**now, owner: adapters.with_weights(bench, now[owner], learned["experts"])}, learned["router"]
        course.measure(mixed_by(course.model, list(now.values()), gate))
    experts = list(now.values())
    test = training.losses(bench, mixed_by(course.model, experts, gate), "test")
    routing = accuracy(course, now, gate)
    return course.result(test, sum(bench.parameters(expert.rank) for expert in experts), routing)


def grown(gate: Gate, seed: int, owner: int) -> Gate:
    """The router with one row more, drawn by the seed."""
    drawn = np.random.default_rng([seed, 23, owner]).normal(0, SPREAD, (1, gate["weight"].shape[1]))
    weight = mx.concatenate([gate["weight"], mx.array(drawn.astype(np.float32))])
    found = {"weight": weight, "bias": mx.concatenate([gate["bias"], mx.zeros((1,))])}
    mx.eval(found)
    return found


def route(model: RoutedDecoder, batch: MicroBatch, everything: Stack, gate: Gate) -> mx.array:
    """Gates [B, L, E], float32, after the routing pass. The pass itself carries no gradient."""
    count = len(gate["bias"])
    uniform = [0.0] + [1 / count] * count
    features = mx.stop_gradient(adapters.states(model, batch, everything, uniform))
    return mx.softmax(features.astype(mx.float32) @ gate["weight"].T + gate["bias"], axis=-1)


def mix(model: RoutedDecoder, batch: MicroBatch, each: Sequence[Stack], gates: mx.array) -> mx.array:
    """Final-norm states [B, L, D] of the experts one by one, mixed by gates [B, L, E]."""
    states = [adapters.states(model, batch, stack, [0.0, 1.0]) for stack in each]
    parts = [gates[..., e : e + 1].astype(h.dtype) * h for e, h in enumerate(states)]
    return sum(parts[1:], parts[0])


def mixed_by(model: RoutedDecoder, experts: Sequence[Expert], gate: Gate) -> Forward:
    """The whole mixture as it is."""
    everything, each = adapters.stacked(model, experts), [adapters.stacked(model, [e]) for e in experts]
    return lambda batch: mix(model, batch, each, route(model, batch, everything, gate))


def _loss(
    bench: Bench, model: RoutedDecoder, experts: Sequence[Expert], own: int
) -> Callable[[Learned, MicroBatch], mx.array]:
    """The language-model loss as a function of one expert (from 0) and of the router."""
    everything: Stacking = adapters.stacking(model, experts, own + 1)
    alone = [adapters.stacked(model, [e]) for e in experts]
    learning: Stacking = adapters.stacking(model, [experts[own]], 1)

    def loss(learned: dict[str, Any], batch: MicroBatch) -> mx.array:
        weights, gate = learned["experts"], learned["router"]
        each = [learning(weights) if e == own else stack for e, stack in enumerate(alone)]
        gates = route(model, batch, everything(weights), gate)
        return training.summed_loss(bench, mix(model, batch, each, gates), batch)

    return loss


def accuracy(course: Course, experts: Owned, gate: Gate) -> Row:
    """Share of each skill's real validation tokens whose largest gate is its owner's expert's."""
    bench, owners, everything = course.bench, list(experts), adapters.stacked(course.model, list(experts.values()))
    found = {}
    for name in bench.names:
        own, right, total = owners.index(bench.owners[name]), 0.0, 0.0
        for batch in training.on_device(bench, bench.domains("validation")[name]):
            largest, real = (
                np.array(mx.argmax(route(course.model, batch, everything, gate), -1)),
                np.array(batch.valid_mask),
            )
            right, total = right + float(((largest == own) * real).sum()), total + float(real.sum())
        found[name] = right / total
    return found
