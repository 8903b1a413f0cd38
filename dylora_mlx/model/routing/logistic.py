"""Multinomial logistic regression of gate rows with an L2 penalty, a convex problem, for several penalties at once."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.optimizers as optim

from dylora_mlx.model.routing.router import Gate

LEARNING_RATE = 0.02
"""Adam's initial learning rate for standardised features; it decays linearly to zero."""


def fit_rows(
    features: mx.array,
    targets: mx.array,
    weights: mx.array,
    start: Gate,
    penalties: Sequence[float],
    steps: int,
    only: int | None = None,
) -> list[Gate]:
    """Fit gate rows by full-batch Adam steps; return one gate for each penalty.

    The loss is the weighted cross-entropy, plus penalty * the squared distance of the weights from the starting rows.

    Args:
        features: Standardised features, float32 [n, D].
        targets: The expert_id of each row, int32 [n], or its wanted gates, float32 [n, E].
        weights: Weight of each row in the cross-entropy, float32 [n].
        start: Starting rows.
        penalties: Penalties, P of them.
        steps: Optimizer steps. 0 returns the starting rows.
        only: id of the only expert whose row is trained. By default all rows are.
    """
    (experts, dims), count = start.weight.shape, len(penalties)
    penalty = mx.array(list(penalties), mx.float32)[:, None, None]
    start_logits = (features @ start.weight.T + start.bias)[:, None, :]
    trained = mx.ones((experts,)) if only is None else (mx.arange(experts) == only).astype(mx.float32)
    # The change of the rows, so that the penalty is a plain L2 penalty and masked rows stay exactly as they are.
    change = {"weight": mx.zeros((count, experts, dims)), "bias": mx.zeros((count, experts))}

    def loss(change: dict[str, mx.array]) -> mx.array:
        flat = features @ change["weight"].reshape(count * experts, dims).T
        logits = start_logits + flat.reshape(-1, count, experts) + change["bias"]
        if targets.ndim == 1:
            wanted = mx.take_along_axis(logits, mx.broadcast_to(targets[:, None, None], (len(targets), count, 1)), -1)
            wanted_logits = wanted[..., 0]
        else:
            wanted_logits = (targets[:, None, :] * logits).sum(-1)
        cross_entropy = ((mx.logsumexp(logits, axis=-1) - wanted_logits).sum(1) * weights).sum()
        return cross_entropy + (penalty * mx.square(change["weight"])).sum()

    adam = optim.Adam(LEARNING_RATE)
    for step in range(steps):
        adam.learning_rate = mx.array(LEARNING_RATE * (1 - step / steps))
        gradients = mx.grad(loss)(change)
        gradients = {
            "weight": gradients["weight"] * trained[:, None],
            "bias": gradients["bias"] * trained,
        }
        change = adam.apply_gradients(gradients, change)
        # Evaluate at every step: MLX is lazy, and the graph would grow with the number of steps.
        mx.eval(change, adam.state)
    return [Gate(start.weight + change["weight"][i], start.bias + change["bias"][i]) for i in range(count)]
