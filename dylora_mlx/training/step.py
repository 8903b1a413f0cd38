"""One optimisation step: micro-batches, gradients, clipping, two optimizers; compiled on accelerators.

The state of a compiled step is explicit (model, optimizers), a Python value inside it is frozen when it is traced: so a
change of phase or of the pool builds a new step, while temperature and learning rates are arrays and never do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from dylora_mlx.config import Training
from dylora_mlx.model import lanes
from dylora_mlx.model.gemma3 import RoutedGemma3
from dylora_mlx.model.router import Routing
from dylora_mlx.training import objective
from dylora_mlx.training.objective import MicroBatch, Rehearsal, Terms


class StepMetrics(NamedTuple):
    """Arrays that a step returns; reading one waits for the device.

    train_loss: the whole objective; terms: its parts, per token or per batch; tokens: learned tokens; grad_norm: global,
    before clipping; expert_norms: by column, 0 for a frozen expert; router_norm; usage [E]; entropy, in nats.
    """

    train_loss: mx.array
    terms: Terms
    tokens: mx.array
    grad_norm: mx.array
    expert_norms: list[mx.array]
    router_norm: mx.array
    usage: mx.array
    entropy: mx.array


Step = Callable[[list[MicroBatch], Rehearsal, mx.array], StepMetrics]


class Optimizers(NamedTuple):
    """AdamW for the experts and for the router, each with its own learning rate."""

    experts: optim.AdamW
    router: optim.AdamW

    @property
    def state(self) -> list[Any]:
        return [self.experts.state, self.router.state]

    def init(self, model: RoutedGemma3) -> None:
        """Make room for new parameters; moments that exist are kept."""
        self.experts.init({"experts": [expert.trainable_parameters() for expert in model.experts]})
        self.router.init(model.router.trainable_parameters())

    def set_rates(self, factor: float, training: Training) -> None:
        self.experts.learning_rate = mx.array(training.learning_rate * factor)
        self.router.learning_rate = mx.array(training.router_learning_rate * factor)


def make_optimizers(training: Training) -> Optimizers:
    """AdamW (Loshchilov and Hutter 2019). With beta2 = 0.99 an uncorrected first update has Adam's usual size, so an
    expert added late starts like one added early, although the optimizer's step count is shared."""

    def adamw(rate: float) -> optim.AdamW:
        return optim.AdamW(rate, betas=[0.9, 0.99], weight_decay=training.weight_decay)

    return Optimizers(adamw(training.learning_rate), adamw(training.router_learning_rate))


def rate_factor(step: int, steps: int, training: Training) -> float:
    """Share of the peak learning rate at `step` of `steps`: a linear warm-up, then a cosine to final_fraction."""
    warmup = math.ceil(training.warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return training.final_fraction + (1 - training.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


def norm(tree: Any) -> mx.array:
    """Euclidean norm over all arrays of a tree, float32."""
    squares = [mx.sum(mx.square(v.astype(mx.float32))) for v in dict(tree_flatten(tree)).values()]
    return mx.sqrt(sum(squares, mx.array(0.0)))


def build_step(
    model: RoutedGemma3, optimizers: Optimizers, training: Training, top_k: int | None, expert: int, compiled: bool
) -> Step:
    """Build the step for one phase: `top_k` experts a token (None: dense), `expert` the column that is learning.

    The step takes the micro-batches, the rehearsal and the temperature (float32 scalar), and updates model and
    optimizers in place.
    """

    def loss(batch: MicroBatch, memory: Rehearsal, temperature: mx.array, lm_scale: mx.array, share: float):
        _, terms, gates = objective.micro_terms(model, batch, Routing(top_k, temperature), memory, expert, training)
        used = objective.usage(mx.stop_gradient(gates), batch.real)
        return objective.weighted(terms, lm_scale, share, training), terms, used

    gradient = nn.value_and_grad(model, loss)

    def step(batches: list[MicroBatch], memory: Rehearsal, temperature: mx.array) -> StepMetrics:
        zero = mx.array(0.0)
        tokens = sum((b.weights.sum() for b in batches), zero)
        lm_scale, share = 1 / mx.maximum(tokens, 1), 1 / len(batches)
        total, all_terms, all_used, grads = zero, [], [], None
        for number, batch in enumerate(batches):
            with mx.stream(lanes.stream(number)):
                (value, terms, used), new = gradient(batch, memory, temperature, lm_scale, share)
            grads = new if grads is None else tree_map(mx.add, grads, new)
            total, all_terms, all_used = total + value, [*all_terms, terms], [*all_used, used]
        assert grads is not None
        size = norm(grads)
        expert_norms = [norm(g) for g in grads.get("experts", [])]
        router_norm = norm(grads.get("router", {}))
        if training.clip_norm:
            grads = tree_map(lambda g: g * mx.minimum(1.0, training.clip_norm / (size + 1e-6)), grads)
        _update(model, optimizers, grads)
        terms = Terms(*(sum(t, zero) for t in zip(*all_terms, strict=True)))
        terms = Terms(terms[0] * lm_scale, *(t * share for t in terms[1:]))
        usage, entropy = (sum(u, zero) * share for u in zip(*all_used, strict=True))
        return StepMetrics(total, terms, tokens, size, expert_norms, router_norm, usage, entropy)

    if not compiled:
        return step
    state = [model.state, *optimizers.state]
    return partial(mx.compile, inputs=state, outputs=state)(step)


def _update(model: RoutedGemma3, optimizers: Optimizers, grads: dict[str, Any]) -> None:
    if any(grads.get("experts", [])):
        own = {"experts": grads["experts"]}
        held = {"experts": [expert.trainable_parameters() for expert in model.experts]}
        model.update(optimizers.experts.apply_gradients(own, held))
    if grads.get("router"):
        model.router.update(optimizers.router.apply_gradients(grads["router"], model.router.trainable_parameters()))
