"""Fit the router's rows to what is remembered of all skills, so that their gates are probabilities that hold.

The router's features never depend on an expert. So the router can learn which expert each token belongs to before that
expert is trained, and no adapter can change this data later. The rows are fitted in three parts, on features that are
standardised; the last two are chosen on documents that the fit has not seen:

1. Linear discriminant analysis on the statistics of all tokens of every skill.
2. A temperature for its logits (Guo et al. 2017, "On calibration of modern neural networks"). Tokens of one document
   depend on each other, so the logits of the discriminant are too sharp by a factor of 1.4 to 5.
3. A correction by logistic regression on remembered tokens, with a penalty on its distance from the discriminant.

Documents of one skill do not show what a token looks like after a turn from another skill: the base still attends to the
text before it. So some tokens of spliced exemplars (turns.py) are among those that the last two parts read.

docs/gemma3-270m.md has what this gives on three bases, beside logistic regression from zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx.config import Config
from dylora_mlx.data.packing import Segment
from dylora_mlx.growth import feature_statistics
from dylora_mlx.growth.feature_statistics import FeatureScale, FeatureStatistics
from dylora_mlx.growth.library import Library
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.routing import logistic, router
from dylora_mlx.model.routing.router import Gate, Router
from dylora_mlx.training.skill import turns as spliced
from dylora_mlx.training.skill.turns import Exemplars, TurnFeatures

PENALTIES = (3e-2, 1e-1)
"""L2 penalties of the correction that are tried, for features of unit variance; no correction is tried as well."""
HELD_OUT_SHARE = 0.632
"""Weight of the held-out documents where the temperature is chosen; the documents of the fit have the rest (Efron 1983,
".632 rule"). A discriminant of fewer documents needs a higher temperature than that of all."""
BLOCKS = 8
"""Blocks that each skill's held-out tokens are cut into. They stand for documents where losses are compared."""
TEMPERATURES = (0.5, 20.0)
"""Smallest and largest temperature."""
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


class RouterFit(NamedTuple):
    """Result of a fit."""

    cross_entropy: float
    """Cross-entropy on held-out documents, turns left out, in nats, as a mean over skills."""
    accuracy: float
    """Share of held-out tokens whose largest gate is that of their own expert, as a mean over skills."""
    temperature: float
    """Temperature of the discriminant's logits."""
    penalty: float
    """Penalty of the correction; infinite without one."""


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


def fit_to_library(
    model: RoutedDecoder,
    library: Library,
    config: Config,
    newcomer: tuple[SkillFeatures, Sequence[Segment]] | None = None,
    steps: int | None = None,
    only: int | None = None,
) -> RouterFit:
    """Fit gate rows to what the library remembers, with the run's options, turns between skills included.

    Args:
        model: the decoder, whose router is updated in place.
        library: what is remembered of each skill.
        config: the run's configuration.
        newcomer: features and exemplars of a skill that is not in the library yet.
        steps: as in `fit`; None for training.router_fit_steps.
        only: as in `fit`.
    """
    skills = [SkillFeatures(entry.statistics, entry.memory, entry.expert) for entry in library.entries]
    exemplars = [Exemplars(entry.exemplars, entry.expert) for entry in library.entries]
    if newcomer is not None:
        skills.append(newcomer[0])
        exemplars.append(Exemplars(newcomer[1], newcomer[0].expert))
    turned = spliced.turn_features(model, exemplars, config) if config.training.router_fit_steps else []
    training = config.training
    steps = training.router_fit_steps if steps is None else steps
    return fit(model.router, skills, steps, training.memory_tokens, only, turned)


def fit(
    gate_router: Router,
    skills: list[SkillFeatures],
    steps: int,
    tokens: int,
    only: int | None = None,
    turns: Sequence[TurnFeatures] = (),
) -> RouterFit:
    """Fit gate rows to the remembered features of all skills. Every skill has the same weight.

    Args:
        gate_router: the router, updated in place.
        skills: what is remembered of each skill, at least one.
        steps: optimizer steps of the correction. 0: no correction.
        tokens: limit on the remembered tokens used of each skill.
        only: id of the only expert whose row is fitted. By default all rows are.
        turns: features after turns. Together they have TURN_SHARE of the weight of all tokens.
    """
    scale, experts = FeatureScale.pooled([skill.statistics for skill in skills]), len(gate_router.rows)
    memories = [spread(skill.memory, min(tokens, max(HELD_OUT, MAX_ROWS // len(skills)))) for skill in skills]
    # A memory holds document after document, so its end is text of documents that its beginning is not from.
    cuts = [len(memory) - len(memory) // HELD_OUT for memory in memories]
    beginnings = [memory[:cut] for memory, cut in zip(memories, cuts, strict=True)]
    ends = [memory[cut:] for memory, cut in zip(memories, cuts, strict=True)]
    learned = with_turns(remembered_tokens(skills, beginnings, scale), turns, scale, begin=0, end=HELD_OUT - 1)
    reported, held_out = learned, learned
    if any(len(end) for end in ends):
        reported = remembered_tokens(skills, ends, scale)
        held_out = with_turns(reported, turns, scale, begin=HELD_OUT - 1)
    current = None if only is None else scale.for_standardised(gate_router.gate())
    # The statistics of all tokens include the held-out ones, so the choice starts from a discriminant without them.
    statistics = [FeatureStatistics.from_features(beginning) for beginning in beginnings]
    trial = _discriminant(skills, statistics, experts, scale)
    final = _discriminant(skills, [skill.statistics for skill in skills], experts, scale)
    everything = with_turns(remembered_tokens(skills, memories, scale), turns, scale)
    judged = [(trial, held_out, HELD_OUT_SHARE), (final, everything, 1 - HELD_OUT_SHARE)]
    temperature = best_temperature(judged, current, only)
    start = _start(trial, temperature, current, only)
    candidates = [*logistic.fit_rows(*learned.arrays(), start, PENALTIES, steps, only), start] if steps else [start]
    losses = [_token_losses(gate, held_out) for gate in candidates]
    chosen = _simplest(losses, held_out)
    gate = _start(final, temperature, current, only)
    penalty = [*PENALTIES, np.inf][chosen] if steps else np.inf
    if penalty < np.inf:
        (gate,) = logistic.fit_rows(*everything.arrays(), gate, [penalty], steps, only)
    fitted = scale.for_raw(gate)
    for expert_id in range(experts) if only is None else [only]:
        row = gate_router.rows[expert_id]
        row.weight, row.bias = fitted.weight[expert_id], fitted.bias[expert_id : expert_id + 1]
    mx.eval(gate_router.parameters())
    rows = candidates[chosen]
    return RouterFit(_cross_entropy(rows, reported), _accuracy(rows, reported), temperature, penalty)


def spread(memory: np.ndarray, count: int) -> np.ndarray:
    """Return up to `count` rows of a memory, evenly spread over its documents."""
    return memory if len(memory) <= count else memory[np.arange(count) * len(memory) // count]


def remembered_tokens(skills: list[SkillFeatures], memories: list[np.ndarray], scale: FeatureScale) -> Tokens:
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


def _discriminant(
    skills: list[SkillFeatures], statistics: list[FeatureStatistics], experts: int, scale: FeatureScale
) -> Gate:
    owners = [skill.expert for skill in skills]
    weight, bias = feature_statistics.discriminant_rows(list(zip(statistics, owners, strict=True)), experts, scale)
    return Gate(mx.array(weight.astype(np.float32)), mx.array(bias.astype(np.float32)))


def best_temperature(
    judged: Sequence[tuple[Gate, Tokens, float]], current: Gate | None = None, only: int | None = None
) -> float:
    """Return the temperature with the lowest weighted cross-entropy. It is convex in 1 / temperature: ternary search.

    Args:
        judged: gates before the temperature, the tokens that they are judged by, and the weights of these.
        current: the current rows, with `only`.
        only: as in `fit`.
    """

    def loss(sharpness: float) -> float:
        gates = (_start(gate, 1 / sharpness, current, only) for gate, _, _ in judged)
        return sum(w * _cross_entropy(gate, tokens) for gate, (_, tokens, w) in zip(gates, judged, strict=True))

    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    while high / low > 1.02:
        third = (high - low) / 3
        low, high = (low, high - third) if loss(low + third) < loss(high - third) else (low + third, high)
    return 2 / (low + high)


def _start(discriminant: Gate, temperature: float, current: Gate | None, only: int | None) -> Gate:
    """Return the discriminant's rows divided by a temperature. With `only`, its row of that beside the current rows.

    A softmax does not see a vector that is added to all rows, but the current rows hold another one than the
    discriminant's. So the row is moved by the mean difference of the other rows.
    """
    softened = Gate(discriminant.weight / temperature, discriminant.bias / temperature)
    if only is None or current is None:
        return softened
    others = mx.array([expert_id for expert_id in range(len(current.bias)) if expert_id != only])
    shift = Gate(*((now[others] - new[others]).mean(0) for now, new in zip(current, softened, strict=True)))
    is_only = mx.arange(len(current.bias)) == only
    return Gate(
        mx.where(is_only[:, None], softened.weight + shift.weight, current.weight),
        mx.where(is_only, softened.bias + shift.bias, current.bias),
    )


def _simplest(losses: list[np.ndarray], held_out: Tokens) -> int:
    """Return the index of the last candidate that is within one standard error of the best (Breiman et al. 1984).

    Candidates are ordered from the freest to the simplest. With little held-out text the best one is best by chance.

    Args:
        losses: for each candidate the cross-entropy of each held-out token, float64 [n].
        held_out: the held-out tokens.
    """
    means = [loss @ held_out.weights for loss in losses]
    best = int(np.argmin(means))
    for index in reversed(range(best + 1, len(losses))):
        difference = (losses[index] - losses[best]) * held_out.weights
        blocks = np.array([block.sum() for block in np.array_split(difference, BLOCKS * held_out.skills)])
        if means[index] - means[best] <= np.sqrt(len(blocks) * blocks.var(ddof=1)):
            return index
    return best


def _logits(gate: Gate, rows: Tokens) -> mx.array:
    return router.logits(mx.array(rows.features), gate)


def _token_losses(gate: Gate, rows: Tokens) -> np.ndarray:
    """Return the cross-entropy of each token in nats, float64 [n]."""
    return np.array(router.cross_entropy(_logits(gate, rows), mx.array(rows.experts)), np.float64)


def _cross_entropy(gate: Gate, rows: Tokens) -> float:
    return float(_token_losses(gate, rows) @ rows.weights)


def _accuracy(gate: Gate, rows: Tokens) -> float:
    right = np.array(_logits(gate, rows).argmax(-1)) == rows.experts
    return float((right * rows.weights).sum())
