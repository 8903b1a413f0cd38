"""Kinds of gates, learned skill after skill from remembered features alone: what each finds, and what it loses.

softmax: the package's own. cosine: the same over normalised features and rows with a fixed scale (LUCIR: Hou et al. 2019,
section 3.2). sigmoid: one detector per expert that does not know of the others; what they leave is the base's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from dylora_mlx.model.routing import router
from dylora_mlx.training.skill.fit_router import DECAY, RATE

KINDS = ("softmax", "cosine", "sigmoid")
COSINE_SCALE = 20.0
"""Of LUCIR's learned scale, its magnitude; so that softmax can be sure."""


class Remembered(NamedTuple):
    """A skill's features, float32 [m, D], to learn from and to look at, and the column of its expert."""

    name: str
    learned: np.ndarray
    held_out: np.ndarray
    expert_id: int


class Found(NamedTuple):
    """After the whole stream, means over its skills: right: share of held-out tokens whose largest gate is their own
    expert's; lost: by how much that fell since the skill came; own: the gate of a token's own expert."""

    right: float
    lost: float
    own: float


def course(kind: str, skills: Sequence[Remembered], frozen: bool, steps: int, seed: int) -> Found:
    """Learn the rows of a gate as skills come. frozen: only the newcomer's row is learned, else all are, from the memory
    of all; the first skill is the base's and has no step."""
    dims, key = skills[0].learned.shape[1], mx.random.key(seed)
    weight, bias = mx.zeros((0, dims)), mx.zeros((0,))
    first: dict[str, float] = {}
    shares, found = {}, []
    for number, newcomer in enumerate(skills):
        so_far = skills[: number + 1]
        if newcomer.expert_id == len(bias):
            key, drawn = mx.random.split(key)
            weight = mx.concatenate([weight, 0.01 * mx.random.normal((1, dims), key=drawn)])
            bias = mx.concatenate([bias, mx.zeros((1,))])
        if number:
            weight, bias = _fit(kind, so_far, weight, bias, newcomer.expert_id if frozen else None, steps)
        found = [gates(kind, logits(kind, mx.array(skill.held_out), weight, bias)) for skill in so_far]
        shares = {
            s.name: float(np.mean(np.array(g.argmax(-1)) == s.expert_id)) for s, g in zip(so_far, found, strict=True)
        }
        first.setdefault(newcomer.name, shares[newcomer.name])
    own = [float(np.mean(np.array(g[:, s.expert_id]))) for s, g in zip(skills, found, strict=True)]
    lost = [first[skill.name] - shares[skill.name] for skill in skills[1:-1]]
    return Found(float(np.mean(list(shares.values()))), float(np.mean(lost)) if lost else 0.0, float(np.mean(own)))


def logits(kind: str, x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """[N, E], of features [N, D], weight [E, D] and bias [E]."""
    if kind == "cosine":
        x = x / mx.linalg.norm(x, axis=-1, keepdims=True)
        weight = COSINE_SCALE * weight / mx.maximum(mx.linalg.norm(weight, axis=-1, keepdims=True), 1e-9)
    return x @ weight.T + bias


def gates(kind: str, logits: mx.array) -> mx.array:
    """[N, E], that sum to one."""
    if kind != "sigmoid":
        return mx.softmax(logits, axis=-1)
    found = mx.sigmoid(logits[:, 1:])
    found = found / mx.maximum(found.sum(-1, keepdims=True), 1.0)
    return mx.concatenate([1 - found.sum(-1, keepdims=True), found], axis=-1)


def _fit(
    kind: str, skills: Sequence[Remembered], weight: mx.array, bias: mx.array, only: int | None, steps: int
) -> tuple[mx.array, mx.array]:
    """Full-batch Adam, every skill counting alike, as the package fits its own gate. only: the one row that may move."""
    features = np.concatenate([skill.learned for skill in skills])
    expert_ids = mx.array(np.concatenate([np.full(len(s.learned), s.expert_id, np.int32) for s in skills]))
    each = mx.array(np.concatenate([np.full(len(s.learned), 1 / len(s.learned) / len(skills)) for s in skills]))
    # Of a cosine only the direction counts: its features stay as they are.
    cosine = kind == "cosine"
    centre = np.zeros(features.shape[1], np.float32) if cosine else features.mean(0)
    spread = np.ones_like(centre) if cosine else features.std(0) + 1e-6
    x, spread, centre = mx.array((features - centre) / spread), mx.array(spread), mx.array(centre)
    start = {"weight": weight * spread, "bias": bias + weight @ centre}
    moves = mx.ones(bias.shape) if only is None else (mx.arange(len(bias)) == only).astype(mx.float32)

    def moved(p: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
        step = {name: moves.reshape(-1, *[1] * (p[name].ndim - 1)) * (p[name] - start[name]) for name in p}
        return start["weight"] + step["weight"], start["bias"] + step["bias"]

    def loss(p: dict[str, mx.array]) -> mx.array:
        rows, biases = moved(p)
        penalty = 0.0 if cosine else DECAY * mx.square(rows).sum()
        return (_error(kind, logits(kind, x, rows, biases), expert_ids) * each).sum() + penalty

    parameters, adam = dict(start), optim.Adam(RATE)
    for step in range(steps):
        adam.learning_rate = mx.array(RATE * (1 - step / steps))
        parameters = adam.apply_gradients(mx.grad(loss)(parameters), parameters)
        mx.eval(parameters, adam.state)
    rows, biases = moved(parameters)
    rows = rows / spread
    return rows, biases - rows @ centre


def _error(kind: str, logits: mx.array, expert_ids: mx.array) -> mx.array:
    """Cross-entropy of each token [N]: of the columns, or of each detector's yes and no."""
    if kind != "sigmoid":
        return router.cross_entropy(logits, expert_ids)
    target = (expert_ids[:, None] == mx.arange(logits.shape[1])).astype(mx.float32)
    return (mx.logaddexp(0.0, logits) - target * logits)[:, 1:].sum(-1)
