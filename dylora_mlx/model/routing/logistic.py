"""Multinomial logistic regression of gate rows with an L2 penalty, a convex problem, for several penalties at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.optimizers as optim

from dylora_mlx.model.routing import router
from dylora_mlx.model.routing.router import Gate

LEARNING_RATE = 0.02
"""Adam's initial learning rate for standardised features; it decays linearly to zero."""


NO_LOGIT = -1e9
"""Stands for minus infinity, whose gradient would not be a number."""


class Problem(NamedTuple):
    """Tokens, and what the rows that are not fitted give them. So each step costs as much as the fitted rows alone."""

    features: mx.array
    """Standardised, float32 [n, D]."""
    targets: mx.array
    """Index of each token's own row among the fitted ones, int32 [n], -1 if its own row is not fitted; or its wanted gates,
    float32 [n, rows], if all rows are fitted."""
    weights: mx.array
    """Weight of each token in the cross-entropy, float32 [n]."""
    rest: mx.array
    """Logarithm of the summed exponentials of the other rows' logits, float32 [n]."""
    own: mx.array
    """Logit of a token's own row where that is not fitted, float32 [n]."""

    @classmethod
    def of_all(cls, features: mx.array, targets: mx.array, weights: mx.array) -> Problem:
        """Return the problem in which all rows are fitted."""
        return cls(features, targets, weights, mx.full(weights.shape, NO_LOGIT), mx.zeros(weights.shape))

    @classmethod
    def of_some(
        cls, features: mx.array, targets: mx.array, weights: mx.array, gate: Gate, fitted: Sequence[int]
    ) -> Problem:
        """Return the problem in which some rows of a gate are fitted. `targets` are expert ids, int32 [n]."""
        place = {expert_id: index for index, expert_id in enumerate(fitted)}
        places = mx.array([place.get(expert_id, -1) for expert_id in range(len(gate.bias))])
        logits = router.logits(features, gate)
        rest = mx.logsumexp(mx.where(places >= 0, NO_LOGIT, logits), axis=-1)
        own = mx.take_along_axis(logits, targets[:, None], -1)[:, 0]
        problem = cls(features, places[targets], weights, rest, own)
        mx.eval(problem)
        return problem

    def losses(self, logits: mx.array) -> mx.array:
        """Return the cross-entropy of each token [n, ...] from the fitted rows' logits [n, ..., rows]."""
        shape = (len(self.rest), *(1,) * (logits.ndim - 2))
        total = mx.logaddexp(self.rest.reshape(shape), mx.logsumexp(logits, axis=-1))
        if self.targets.ndim == 2:
            return total - (self.targets.reshape(*shape, -1) * logits).sum(-1)
        indices = mx.broadcast_to(mx.maximum(self.targets, 0).reshape(*shape, 1), (*logits.shape[:-1], 1))
        wanted = mx.take_along_axis(logits, indices, -1)[..., 0]
        return total - mx.where((self.targets >= 0).reshape(shape), wanted, self.own.reshape(shape))


def fit_rows(problem: Problem, start: Gate, penalties: Sequence[float], steps: int) -> list[Gate]:
    """Fit gate rows by full-batch Adam steps; return one gate of the fitted rows for each penalty.

    The loss is the weighted cross-entropy, plus penalty * the squared distance of the weights from the starting rows.

    Args:
        problem: Tokens, and what the rows that stay as they are give them.
        start: Starting rows of those that are fitted.
        penalties: Penalties, P of them.
        steps: Optimizer steps. 0 returns the starting rows.
    """
    (rows, dims), count = start.weight.shape, len(penalties)
    penalty = mx.array(list(penalties), mx.float32)[:, None, None]
    start_logits = router.logits(problem.features, start)[:, None, :]
    # The change of the rows, so that the penalty is a plain L2 penalty.
    change = {"weight": mx.zeros((count, rows, dims)), "bias": mx.zeros((count, rows))}

    def loss(change: dict[str, mx.array]) -> mx.array:
        flat = problem.features @ change["weight"].reshape(count * rows, dims).T
        logits = start_logits + flat.reshape(-1, count, rows) + change["bias"]
        cross_entropy = (problem.losses(logits).sum(1) * problem.weights).sum()
        return cross_entropy + (penalty * mx.square(change["weight"])).sum()

    adam = optim.Adam(LEARNING_RATE)
    for step in range(steps):
        adam.learning_rate = mx.array(LEARNING_RATE * (1 - step / steps))
        change = adam.apply_gradients(mx.grad(loss)(change), change)
        # Evaluate at every step: MLX is lazy, and the graph would grow with the number of steps.
        mx.eval(change, adam.state)
    return [Gate(start.weight + change["weight"][i], start.bias + change["bias"][i]) for i in range(count)]
