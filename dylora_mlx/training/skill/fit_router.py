"""Fit the router's rows to remembered features, a convex problem.

The router's features never depend on an expert. So the router can learn which expert each remembered token belongs to
before that expert is trained, by multinomial logistic regression over the memory of all skills. No adapter can change
this data later.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from dylora_mlx.growth.library import Library
from dylora_mlx.model.routing.router import Router
from dylora_mlx.model.routing.router import cross_entropy as router_loss

RATE, DECAY = 0.05, 3e-4
"""Adam's initial learning rate, which decays linearly to zero, and the L2 penalty. Both are for features of unit
variance."""


Memory = tuple[np.ndarray, int]
"""Features float32 [m, D] of a skill, and the id of the expert they belong to."""


def remembered_features(library: Library) -> list[Memory]:
    """Return the features and the expert of every skill in the library."""
    return [(entry.memory, entry.expert) for entry in library.entries]


def fit(
    router: Router, memories: list[Memory], steps: int, tokens: int, only: int | None = None
) -> tuple[float, float]:
    """Fit gate rows to remembered features by full-batch Adam steps, starting from the current rows.

    Every skill has the same total weight. Returns the mean cross-entropy in nats before and after.

    Args:
        router: the router, updated in place.
        memories: features and expert id of each skill.
        steps: optimizer steps.
        tokens: limit on the features used of each skill.
        only: id of the only expert whose row is trained. By default all rows are.
    """
    groups = [(memory[:tokens], expert) for memory, expert in memories]
    features = np.concatenate([rows for rows, _ in groups]).astype(np.float32)
    expert_ids = np.concatenate([np.full(len(rows), expert_id, np.int32) for rows, expert_id in groups])
    weights = np.concatenate([np.full(len(rows), 1 / (len(rows) * len(groups)), np.float32) for rows, _ in groups])
    # Standardize the features: RATE and DECAY are for unit variance. The initial rows are transformed accordingly and
    # transformed back at the end. The epsilon guards against features that are constant.
    centre, std = features.mean(0), features.std(0) + 1e-6
    x, y, w = mx.array((features - centre) / std), mx.array(expert_ids), mx.array(weights)
    weight, bias = router.gate()
    trainable_mask = mx.ones(bias.shape) if only is None else (mx.arange(len(bias)) == only).astype(mx.float32)
    parameters = {"weight": weight * mx.array(std), "bias": bias + weight @ mx.array(centre)}

    def cross_entropy(p: dict[str, mx.array]) -> mx.array:
        logits = x @ p["weight"].T + p["bias"]
        return (router_loss(logits, y) * w).sum()

    def penalised(p: dict[str, mx.array]) -> mx.array:
        return cross_entropy(p) + DECAY * mx.square(p["weight"]).sum()

    before, adam = float(np.array(cross_entropy(parameters))), optim.Adam(RATE)
    for step in range(steps):
        adam.learning_rate = mx.array(RATE * (1 - step / steps))
        grads = mx.grad(penalised)(parameters)
        masked_grads = {"weight": grads["weight"] * trainable_mask[:, None], "bias": grads["bias"] * trainable_mask}
        parameters = adam.apply_gradients(masked_grads, parameters)
        # Evaluate at every step: MLX is lazy, and the graph would grow with the number of steps.
        mx.eval(parameters, adam.state)
    after = float(np.array(cross_entropy(parameters)))
    weight = parameters["weight"] / mx.array(std)
    bias = parameters["bias"] - weight @ mx.array(centre)
    for i in range(len(router.rows)) if only is None else [only]:
        row = router.rows[i]
        row.weight, row.bias = weight[i], bias[i : i + 1]
    mx.eval(router.parameters())
    return before, after
