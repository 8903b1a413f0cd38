"""Fit the router to remembered features: a convex problem whose data no adapter can change.

Because the router's features never depend on an expert, which expert each remembered token belongs to can be learned
before the expert itself is trained, by multinomial logistic regression over the memory of all skills.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from dylora_mlx.growth.library import Library
from dylora_mlx.model.routing.router import Router
from dylora_mlx.model.routing.router import cross_entropy as router_loss

RATE, DECAY = 0.05, 3e-4
"""Adam's first learning rate (it falls to zero in a straight line) and the squared-weight penalty, for features of
unit variance."""


Memory = tuple[np.ndarray, int]
"""Features float32 [m, D] of a skill, and the column they belong to."""


def remembered_features(library: Library) -> list[Memory]:
    return [(entry.memory, entry.expert) for entry in library.entries]


def fit(
    router: Router, memories: list[Memory], steps: int, tokens: int, only: int | None = None
) -> tuple[float, float]:
    """Fit all rows for `steps` full-batch steps, from where they are, to `tokens` features of each skill at most.

    Every skill counts alike. only: the one row that may move. Returns the mean cross-entropy in nats before and after.
    """
    groups = [(memory[:tokens], expert) for memory, expert in memories]
    features = np.concatenate([found for found, _ in groups]).astype(np.float32)
    expert_ids = np.concatenate([np.full(len(found), expert_id, np.int32) for found, expert_id in groups])
    weights = np.concatenate([np.full(len(found), 1 / (len(found) * len(groups)), np.float32) for found, _ in groups])
    centre, spread = features.mean(0), features.std(0) + 1e-6
    x, y, w = mx.array((features - centre) / spread), mx.array(expert_ids), mx.array(weights)
    weight, bias = router.gate()
    moves = mx.ones(bias.shape) if only is None else (mx.arange(len(bias)) == only).astype(mx.float32)
    parameters = {"weight": weight * mx.array(spread), "bias": bias + weight @ mx.array(centre)}

    def cross_entropy(p: dict[str, mx.array]) -> mx.array:
        logits = x @ p["weight"].T + p["bias"]
        return (router_loss(logits, y) * w).sum()

    def penalised(p: dict[str, mx.array]) -> mx.array:
        return cross_entropy(p) + DECAY * mx.square(p["weight"]).sum()

    before, adam = float(np.array(cross_entropy(parameters))), optim.Adam(RATE)
    for step in range(steps):
        adam.learning_rate = mx.array(RATE * (1 - step / steps))
        grads = mx.grad(penalised)(parameters)
        held = {"weight": grads["weight"] * moves[:, None], "bias": grads["bias"] * moves}
        parameters = adam.apply_gradients(held, parameters)
        mx.eval(parameters, adam.state)
    after = float(np.array(cross_entropy(parameters)))
    weight = parameters["weight"] / mx.array(spread)
    bias = parameters["bias"] - weight @ mx.array(centre)
    for i in range(len(router.rows)) if only is None else [only]:
        row = router.rows[i]
        row.weight, row.bias = weight[i], bias[i : i + 1]
    mx.eval(router.parameters())
    return before, after
