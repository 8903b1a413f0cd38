"""The remembered tokens that the router's rows are fitted to: how many of which skill, and what each weighs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx.growth.feature_statistics import FeatureScale, FeatureStatistics
from dylora_mlx.training.skill.turns import TurnFeatures

HELD_OUT = 4
"""One in this many documents is held out to choose temperature and penalty."""
TURN_SHARE = 0.2
"""Weight of the tokens after turns, among all tokens of a fit. 0.4 follows turns better, and costs more elsewhere."""
MAX_ROWS = 16384
"""Limit on the remembered tokens that one fit reads, over all skills together."""


class SkillFeatures(NamedTuple):
    """What is remembered of the router's features on one skill."""

    statistics: FeatureStatistics
    """Statistics of all its tokens."""
    memory: np.ndarray
    """Features of some tokens, float16 or float32 [m, D], document after document."""
    expert: int
    """id of the expert that the skill belongs to."""


class Tokens(NamedTuple):
    """Remembered tokens of all skills. Every skill has the same total weight."""

    features: np.ndarray
    """Standardised, float32 [n, D]."""
    experts: np.ndarray
    """int32 [n]."""
    weights: np.ndarray
    """float32 [n]; they sum to 1."""
    skills: int
    """Number of skills that have any of these tokens."""

    def arrays(self) -> tuple[mx.array, mx.array, mx.array]:
        """Return features, experts and weights on the device."""
        return mx.array(self.features), mx.array(self.experts), mx.array(self.weights)

    def thinned(self, count: int) -> Tokens:
        """Return about `count` of the tokens, evenly spread, with the same total weight."""
        if len(self.weights) <= count:
            return self
        chosen = np.arange(count) * len(self.weights) // count
        weights = self.weights[chosen] * (self.weights.sum() / self.weights[chosen].sum())
        return Tokens(self.features[chosen], self.experts[chosen], weights.astype(np.float32), self.skills)


def token_limits(skills: Sequence[SkillFeatures], tokens: int, fitted: Collection[int] | None = None) -> list[int]:
    """Return how many tokens of each skill a fit reads: at most MAX_ROWS together, and at least HELD_OUT of a skill.

    Args:
        skills: what is remembered of each skill.
        tokens: limit for each skill.
        fitted: ids of the experts whose rows are fitted. Their skills have half of the tokens. None: all are fitted.
    """
    near = [fitted is None or skill.expert in fitted for skill in skills]
    share = {True: MAX_ROWS if all(near) else MAX_ROWS // 2, False: MAX_ROWS // 2}
    count = {True: sum(near), False: len(near) - sum(near)}
    return [min(tokens, max(HELD_OUT, share[is_near] // count[is_near])) for is_near in near]


def spread(memory: np.ndarray, count: int) -> np.ndarray:
    """Return up to `count` rows of a memory, evenly spread over its documents."""
    return memory if len(memory) <= count else memory[np.arange(count) * len(memory) // count]


def remembered_tokens(skills: Sequence[SkillFeatures], memories: list[np.ndarray], scale: FeatureScale) -> Tokens:
    """Join memories, one for each skill, with standardised features. An empty memory is left out."""
    filled = [(skill.expert, memory) for skill, memory in zip(skills, memories, strict=True) if len(memory)]
    weights = [np.full(len(memory), 1 / len(memory) / len(filled), np.float32) for _, memory in filled]
    experts = [np.full(len(memory), expert_id, np.int32) for expert_id, memory in filled]
    features = scale.standardised(np.concatenate([memory for _, memory in filled]))
    return Tokens(features, np.concatenate(experts), np.concatenate(weights), len(filled))


def with_turns(
    tokens: Tokens, turns: Sequence[TurnFeatures], scale: FeatureScale, begin: int = 0, end: int = HELD_OUT
) -> Tokens:
    """Add tokens after turns to remembered ones.

    Args:
        tokens: the remembered tokens.
        turns: features after turns, of any number of skills.
        scale: mean and standard deviation that standardise the features.
        begin: first part of the features to add, of HELD_OUT parts.
        end: first part not to add.
    """
    parts = [
        (t.features[len(t.features) * begin // HELD_OUT : len(t.features) * end // HELD_OUT], t.expert) for t in turns
    ]
    parts = [(features, expert) for features, expert in parts if len(features)]
    if not parts:
        return tokens
    weights = [np.full(len(features), TURN_SHARE / len(features) / len(parts), np.float32) for features, _ in parts]
    experts = [np.full(len(features), expert, np.int32) for features, expert in parts]
    return Tokens(
        np.concatenate([tokens.features, *(scale.standardised(features) for features, _ in parts)]),
        np.concatenate([tokens.experts, *experts]),
        np.concatenate([(1 - TURN_SHARE) * tokens.weights, *weights]),
        tokens.skills + len(parts),
    )
