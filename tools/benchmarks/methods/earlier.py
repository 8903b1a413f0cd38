"""The scheme of the earlier PyTorch attempt that this project began from.

- A routing pass runs with ALL experts on, in a uniform dense mixture. A linear router without a null expert reads its
  last hidden state, so the router's input drifts as experts train.
- A new gate row starts at random. A dense softmax mixes the experts' final logits.
- The language-model loss alone trains the router along with the skill's expert: no rehearsal, no load balancing, no
  closed-form start.
- There is one forward pass per expert in addition to the routing pass.

The head is linear, so mixing the final-norm states, h = sum_e g_e h_e, mixes the logits without storing those of each
expert.
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
from methods.apart import ExpertsByOwner
from methods.bench import Bench, Result, Row
from methods.course import Course
from methods.training import Forward, Learned

INIT_STD = 0.02
"""Standard deviation of a new gate row's weights; its bias is 0."""

Gate = dict[str, mx.array]
"""The router: weight [E, D] and bias [E], float32."""


def earlier(bench: Bench) -> Result:
    """Train one expert per owner, and the router along with it.

    A skill whose owner has an expert trains it further. The other experts are frozen; the router, with its own learning
    rate, never is.
    """
    course, experts_by_owner = Course(bench), ExpertsByOwner()
    gate: Gate = {"weight": mx.zeros((0, bench.base.args.hidden_size)), "bias": mx.zeros((0,))}
    for number, skill in enumerate(bench.skills):
        owner = bench.owners[skill.name]
        if owner not in experts_by_owner:
            experts_by_owner = {**experts_by_owner, owner: bench.expert(bench.config.model.rank, owner)}
            gate = grown(gate, bench.seed, owner)
        index = list(experts_by_owner).index(owner)
        start = {"experts": adapters.weights_of(experts_by_owner[owner]), "router": gate}
        loss = _loss(bench, course.model, list(experts_by_owner.values()), index)
        learned = course.train(start, loss, skill.train, number, bench.steps(skill))
        experts_by_owner, gate = (
            {**experts_by_owner, owner: adapters.with_weights(bench, experts_by_owner[owner], learned["experts"])},
            learned["router"],
        )
        course.measure(mixed_by(course.model, list(experts_by_owner.values()), gate))
    experts = list(experts_by_owner.values())
    test = training.losses(bench, mixed_by(course.model, experts, gate), "test")
    routing = accuracy(course, experts_by_owner, gate)
    return course.result(test, sum(bench.parameters(expert.rank) for expert in experts), routing)


def grown(gate: Gate, seed: int, owner: int) -> Gate:
    """Return the router with one more, random row."""
    row = np.random.default_rng([seed, 23, owner]).normal(0, INIT_STD, (1, gate["weight"].shape[1]))
    weight = mx.concatenate([gate["weight"], mx.array(row.astype(np.float32))])
    grown_gate = {"weight": weight, "bias": mx.concatenate([gate["bias"], mx.zeros((1,))])}
    mx.eval(grown_gate)
    return grown_gate


def route(model: RoutedDecoder, batch: MicroBatch, everything: Stack, gate: Gate) -> mx.array:
    """Run the routing pass and return float32 gates [B, L, E]. No gradient flows through the pass itself."""
    count = len(gate["bias"])
    uniform = [0.0] + [1 / count] * count
    features = mx.stop_gradient(adapters.states(model, batch, everything, uniform))
    return mx.softmax(features.astype(mx.float32) @ gate["weight"].T + gate["bias"], axis=-1)


def mix(model: RoutedDecoder, batch: MicroBatch, each: Sequence[Stack], gates: mx.array) -> mx.array:
    """Return the final-norm states [B, L, D] of separate passes, one per expert, mixed by gates [B, L, E]."""
    states = [adapters.states(model, batch, stack, [0.0, 1.0]) for stack in each]
    parts = [gates[..., e : e + 1].astype(h.dtype) * h for e, h in enumerate(states)]
    return sum(parts[1:], parts[0])


def mixed_by(model: RoutedDecoder, experts: Sequence[Expert], gate: Gate) -> Forward:
    """Return the forward pass of the mixture with its current weights: the routing pass, then one pass per expert."""
    everything, each = adapters.stacked(model, experts), [adapters.stacked(model, [e]) for e in experts]
    return lambda batch: mix(model, batch, each, route(model, batch, everything, gate))


def _loss(
    bench: Bench, model: RoutedDecoder, experts: Sequence[Expert], index: int
) -> Callable[[Learned, MicroBatch], mx.array]:
    """Return the language-model loss as a function of the weights of one expert (`index`, from 0) and of the router."""
    everything: Stacking = adapters.stacking(model, experts, index + 1)
    single_stacks = [adapters.stacked(model, [e]) for e in experts]
    trained_stack: Stacking = adapters.stacking(model, [experts[index]], 1)

    def loss(learned: dict[str, Any], batch: MicroBatch) -> mx.array:
        weights, gate = learned["experts"], learned["router"]
        each = [trained_stack(weights) if e == index else stack for e, stack in enumerate(single_stacks)]
        gates = route(model, batch, everything(weights), gate)
        return training.summed_loss(bench, mix(model, batch, each, gates), batch)

    return loss


def accuracy(course: Course, experts: ExpertsByOwner, gate: Gate) -> Row:
    """Return the share of each skill's validation tokens, padding excluded, whose largest gate is its own expert's."""
    bench, owners, everything = course.bench, list(experts), adapters.stacked(course.model, list(experts.values()))
    shares = {}
    for name in bench.names:
        expert_index, right, total = owners.index(bench.owners[name]), 0.0, 0.0
        for batch in training.on_device(bench, bench.domains("validation")[name]):
            chosen, valid_mask = (
                np.array(mx.argmax(route(course.model, batch, everything, gate), -1)),
                np.array(batch.valid_mask),
            )
            right, total = right + float(((chosen == expert_index) * valid_mask).sum()), total + float(valid_mask.sum())
        shares[name] = right / total
    return shares
