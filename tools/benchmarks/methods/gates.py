"""Kinds of gates, trained skill after skill on remembered features: their routing accuracy and their forgetting.

- softmax: the package's gate.
- cosine: softmax over normalised features and rows, with a fixed scale (LUCIR: Hou et al. 2019, section 3.2).
- sigmoid: one independent detector per expert; the base receives the gate that the detectors leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from dylora_mlx.model.routing import router

KINDS = ("softmax", "cosine", "sigmoid")
RATE, DECAY = 0.05, 3e-4
"""Adam's initial learning rate, which decays linearly to zero, and the L2 penalty. Both are for features of unit
variance."""
COSINE_SCALE = 20.0
"""Scale of the cosines, of the magnitude that LUCIR learns; it lets the softmax give gates close to 1."""


class Remembered(NamedTuple):
    """Remembered router features of a skill."""

    name: str
    learned: np.ndarray
    """Features to train on, float32 [m, D]."""
    held_out: np.ndarray
    """Features to evaluate on, float32 [m, D]."""
    expert_id: int
    """expert_id that serves the skill."""


class GateResult(NamedTuple):
    """Results after the whole stream, as means over its skills. Field names are keys of the JSON file."""

    right: float
    """Routing accuracy: share of held-out tokens whose largest gate is that of their own expert."""
    lost: float
    """Drop of a skill's routing accuracy since it was learned (forgetting)."""
    own: float
    """Gate of a token's own expert."""


def course(kind: str, skills: Sequence[Remembered], frozen: bool, steps: int, seed: int) -> GateResult:
    """Train the rows of a gate as skills arrive, and evaluate it after each.

    Args:
        kind: One of KINDS.
        skills: Features of the skills in order of arrival. The first is the base skill, after which no fit is made.
        frozen: Whether to fit only the row of the newest skill's expert; otherwise all rows are fitted. Either uses the
            features of all skills so far.
        steps: Optimizer steps per skill.
        seed: Seed of the initial rows.
    """
    width, key = skills[0].learned.shape[1], mx.random.key(seed)
    weight, bias = mx.zeros((0, width)), mx.zeros((0,))
    initial: dict[str, float] = {}
    accuracies, all_gates = {}, []
    for number, newcomer in enumerate(skills):
        so_far = skills[: number + 1]
        if newcomer.expert_id == len(bias):
            key, row_key = mx.random.split(key)
            weight = mx.concatenate([weight, 0.01 * mx.random.normal((1, width), key=row_key)])
            bias = mx.concatenate([bias, mx.zeros((1,))])
        if number:
            weight, bias = _fit(kind, so_far, weight, bias, newcomer.expert_id if frozen else None, steps)
        all_gates = [gates(kind, logits(kind, mx.array(skill.held_out), weight, bias)) for skill in so_far]
        accuracies = {
            s.name: float(np.mean(np.array(g.argmax(-1)) == s.expert_id))
            for s, g in zip(so_far, all_gates, strict=True)
        }
        initial.setdefault(newcomer.name, accuracies[newcomer.name])
    own_gates = [float(np.mean(np.array(g[:, s.expert_id]))) for s, g in zip(skills, all_gates, strict=True)]
    lost = [initial[skill.name] - accuracies[skill.name] for skill in skills[1:-1]]
    return GateResult(
        float(np.mean(list(accuracies.values()))), float(np.mean(lost)) if lost else 0.0, float(np.mean(own_gates))
    )


def logits(kind: str, x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """Return router logits [N, E] from features [N, D], weight [E, D] and bias [E]."""
    if kind == "cosine":
        x = x / mx.linalg.norm(x, axis=-1, keepdims=True)
        weight = COSINE_SCALE * weight / mx.maximum(mx.linalg.norm(weight, axis=-1, keepdims=True), 1e-9)
    return x @ weight.T + bias


def gates(kind: str, logits: mx.array) -> mx.array:
    """Return gates [N, E] from logits [N, E]; the gates of a token sum to 1."""
    if kind != "sigmoid":
        return mx.softmax(logits, axis=-1)
    detectors = mx.sigmoid(logits[:, 1:])
    detectors = detectors / mx.maximum(detectors.sum(-1, keepdims=True), 1.0)
    return mx.concatenate([1 - detectors.sum(-1, keepdims=True), detectors], axis=-1)


def _fit(
    kind: str, skills: Sequence[Remembered], weight: mx.array, bias: mx.array, only_row: int | None, steps: int
) -> tuple[mx.array, mx.array]:
    """Fit the rows with full-batch Adam and equal weight for every skill, as the package fits its gate.

    Args:
        kind: One of KINDS.
        skills: Features of the skills so far.
        weight: Initial rows [E, D].
        bias: Initial biases [E].
        only_row: The one row to train; None trains all.
        steps: Optimizer steps.
    """
    features = np.concatenate([skill.learned for skill in skills])
    expert_ids = mx.array(np.concatenate([np.full(len(s.learned), s.expert_id, np.int32) for s in skills]))
    token_weights = mx.array(
        np.concatenate([np.full(len(s.learned), 1 / len(s.learned) / len(skills)) for s in skills])
    )
    # Standardise the features, except for a cosine: centring would change the directions that it compares.
    cosine = kind == "cosine"
    mean = np.zeros(features.shape[1], np.float32) if cosine else features.mean(0)
    std = np.ones_like(mean) if cosine else features.std(0) + 1e-6
    x, std, mean = mx.array((features - mean) / std), mx.array(std), mx.array(mean)
    start = {"weight": weight * std, "bias": bias + weight @ mean}
    row_mask = mx.ones(bias.shape) if only_row is None else (mx.arange(len(bias)) == only_row).astype(mx.float32)

    def restricted(p: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
        step = {name: row_mask.reshape(-1, *[1] * (p[name].ndim - 1)) * (p[name] - start[name]) for name in p}
        return start["weight"] + step["weight"], start["bias"] + step["bias"]

    def loss(p: dict[str, mx.array]) -> mx.array:
        rows, biases = restricted(p)
        penalty = 0.0 if cosine else DECAY * mx.square(rows).sum()
        return (_error(kind, logits(kind, x, rows, biases), expert_ids) * token_weights).sum() + penalty

    parameters, adam = dict(start), optim.Adam(RATE)
    for step in range(steps):
        adam.learning_rate = mx.array(RATE * (1 - step / steps))
        parameters = adam.apply_gradients(mx.grad(loss)(parameters), parameters)
        mx.eval(parameters, adam.state)
    rows, biases = restricted(parameters)
    # Undo the standardisation of the features.
    rows = rows / std
    return rows, biases - rows @ mean


def _error(kind: str, logits: mx.array, expert_ids: mx.array) -> mx.array:
    """Return the cross-entropy of each token [N]: over the experts, or for sigmoid summed over the detectors."""
    if kind != "sigmoid":
        return router.cross_entropy(logits, expert_ids)
    target = (expert_ids[:, None] == mx.arange(logits.shape[1])).astype(mx.float32)
    return (mx.logaddexp(0.0, logits) - target * logits)[:, 1:].sum(-1)
