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
from dylora_mlx.growth.feature_statistics import FeatureScale, PooledStatistics
from dylora_mlx.growth.library import Library
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.routing import logistic, router
from dylora_mlx.model.routing.logistic import Problem
from dylora_mlx.model.routing.router import Gate, Router
from dylora_mlx.training.skill import turns as spliced
from dylora_mlx.training.skill.router_tokens import (
    HELD_OUT,
    SkillFeatures,
    Tokens,
    remembered_tokens,
    spread,
    token_limits,
    with_turns,
)
from dylora_mlx.training.skill.turns import Exemplars, TurnFeatures

PENALTIES = (3e-2, 1e-1)
"""L2 penalties of the correction that are tried, for features of unit variance; no correction is tried as well."""
HELD_OUT_SHARE = 0.632
"""Weight of the held-out documents where the temperature is chosen; the documents of the fit have the rest (Efron 1983,
".632 rule"). A discriminant of fewer documents needs a higher temperature than that of all."""
MAX_FITTED = 16
"""Largest number of rows that one fit changes."""
BLOCKS = 8
"""Blocks that each skill's held-out tokens are cut into. They stand for documents where losses are compared."""
TEMPERATURES = (0.5, 20.0)
"""Smallest and largest temperature."""


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


def fit_to_library(
    model: RoutedDecoder,
    library: Library,
    config: Config,
    newcomer: tuple[SkillFeatures, Sequence[Segment]] | None = None,
    steps: int | None = None,
    fitted: Sequence[int] | None = None,
) -> RouterFit:
    """Fit gate rows to what the library remembers, with the run's options, turns between skills included.

    In a pool of more than MAX_FITTED experts, only the newcomer's row and those nearest to it are fitted: the others change
    next to nothing, and a fit of all would cost more with every skill.

    Args:
        model: the decoder, whose router is updated in place.
        library: what is remembered of each skill.
        config: the run's configuration.
        newcomer: features and exemplars of a skill that is not in the library yet.
        steps: as in `fit`; None for training.router_fit_steps.
        fitted: as in `fit`; None for all, or those near the newcomer's.
    """
    skills = [SkillFeatures(entry.statistics, entry.memory, entry.expert) for entry in library.entries]
    exemplars = [Exemplars(entry.exemplars, entry.expert) for entry in library.entries]
    statistics = library.pooled_statistics() if library.entries else None
    if newcomer is not None:
        skills.append(newcomer[0])
        exemplars.append(Exemplars(newcomer[1], newcomer[0].expert))
        new = newcomer[0].statistics
        statistics = PooledStatistics.of([new]) if statistics is None else statistics.with_skill(new)
    if fitted is None and newcomer is not None and statistics is not None and len(model.router.rows) > MAX_FITTED:
        fitted = nearest_rows(skills, statistics, len(model.router.rows))
        exemplars = [each for each in exemplars if each.expert in fitted]
    turned = spliced.turn_features(model, exemplars, config) if config.training.router_fit_steps else []
    training = config.training
    steps = training.router_fit_steps if steps is None else steps
    return fit(model.router, skills, steps, training.memory_tokens, fitted, turned, statistics)


def nearest_rows(
    skills: Sequence[SkillFeatures], pooled: PooledStatistics, experts: int, count: int = MAX_FITTED
) -> list[int]:
    """Return the ids of `count` experts: the last skill's own, and those with the largest logits at its mean features.

    The null expert is always among them.
    """
    scale, own = FeatureScale.pooled(pooled), skills[-1].expert
    gate = _discriminant(skills, pooled, experts, scale)
    logits = np.array(router.logits(mx.array(scale.standardised(skills[-1].statistics.mean[None])), gate))[0]
    ranked = [expert_id for expert_id in np.argsort(-logits, kind="stable").tolist() if expert_id not in (0, own)]
    return sorted([0, own, *ranked[: count - 2]]) if own else sorted([0, *ranked[: count - 1]])


def fit(
    gate_router: Router,
    skills: Sequence[SkillFeatures],
    steps: int,
    tokens: int,
    fitted: Sequence[int] | None = None,
    turns: Sequence[TurnFeatures] = (),
    pooled: PooledStatistics | None = None,
) -> RouterFit:
    """Fit gate rows to the remembered features of all skills. Every skill has the same weight.

    Args:
        gate_router: the router, updated in place.
        skills: what is remembered of each skill, at least one.
        steps: optimizer steps of the correction. 0: no correction.
        tokens: limit on the remembered tokens used of each skill.
        fitted: ids of the experts whose rows are fitted; the others stay as they are, bit for bit. None: all.
        turns: features after turns. Together they have TURN_SHARE of the weight of all tokens.
        pooled: the statistics of all skills together; None to add them up here.
    """
    pooled, experts = pooled or PooledStatistics.of([skill.statistics for skill in skills]), len(gate_router.rows)
    scale = FeatureScale.pooled(pooled)
    limits = token_limits(skills, tokens, fitted)
    memories = [spread(skill.memory, limit) for skill, limit in zip(skills, limits, strict=True)]
    # A memory holds document after document, so its end is text of documents that its beginning is not from.
    cuts = [len(memory) - len(memory) // HELD_OUT for memory in memories]
    beginnings = [memory[:cut] for memory, cut in zip(memories, cuts, strict=True)]
    ends = [memory[cut:] for memory, cut in zip(memories, cuts, strict=True)]
    learned = with_turns(remembered_tokens(skills, beginnings, scale), turns, scale, begin=0, end=HELD_OUT - 1)
    reported, held_out = learned, learned
    if any(len(end) for end in ends):
        reported = remembered_tokens(skills, ends, scale)
        held_out = with_turns(reported, turns, scale, begin=HELD_OUT - 1)
    everything = with_turns(remembered_tokens(skills, memories, scale), turns, scale)
    rows = Rows(fitted, scale.for_standardised(gate_router.gate()))
    # The statistics of all tokens include the held-out ones, so the choice starts from a discriminant without them.
    trial = _discriminant(skills, PooledStatistics.of_features(beginnings), experts, scale)
    final = _discriminant(skills, pooled, experts, scale)
    held_out_problem, whole_problem = rows.problem(held_out), rows.problem(everything)
    judged = [(trial, held_out_problem, HELD_OUT_SHARE), (final, whole_problem, 1 - HELD_OUT_SHARE)]
    temperature = best_temperature(judged, rows)
    start = rows.start(trial, temperature)
    corrected = logistic.fit_rows(rows.problem(learned), start, PENALTIES, steps) if steps else []
    candidates = [*corrected, start]
    losses = [_token_losses(gate, held_out_problem) for gate in candidates]
    chosen = _simplest(losses, held_out)
    gate = rows.start(final, temperature)
    penalty = [*PENALTIES, np.inf][chosen] if steps else np.inf
    if penalty < np.inf:
        (gate,) = logistic.fit_rows(whole_problem, gate, [penalty], steps)
    raw = scale.for_raw(gate)
    for index, expert_id in enumerate(range(experts) if fitted is None else fitted):
        row = gate_router.rows[expert_id]
        row.weight, row.bias = raw.weight[index], raw.bias[index : index + 1]
    mx.eval(gate_router.parameters())
    loss = _cross_entropy(candidates[chosen], rows.problem(reported))
    return RouterFit(loss, _accuracy(rows.whole(candidates[chosen]), reported), temperature, penalty)


class Rows(NamedTuple):
    """The rows of a fit: which are fitted, and the current ones."""

    fitted: Sequence[int] | None
    """ids of the experts whose rows are fitted; None: all."""
    current: Gate
    """All rows before the fit, for standardised features."""

    def problem(self, tokens: Tokens) -> Problem:
        """Return what the fitted rows have to do for some tokens."""
        arrays = mx.array(tokens.features), mx.array(tokens.experts), mx.array(tokens.weights)
        return Problem.of_all(*arrays) if self.fitted is None else Problem.of_some(*arrays, self.current, self.fitted)

    def start(self, discriminant: Gate, temperature: float) -> Gate:
        """Return the fitted rows of a discriminant, divided by a temperature.

        A softmax does not see a vector that is added to all rows, but the current rows hold another one than the
        discriminant's. So the fitted rows are moved by the mean difference of the other rows.
        """
        softened = Gate(discriminant.weight / temperature, discriminant.bias / temperature)
        if self.fitted is None:
            return softened
        fitted = mx.array(list(self.fitted))
        others = mx.array(sorted(set(range(len(softened.bias))).difference(self.fitted)))
        pairs = zip(self.current, softened, strict=True)
        return Gate(*(new[fitted] + (now[others] - new[others]).mean(0) for now, new in pairs))

    def whole(self, gate: Gate) -> Gate:
        """Return all rows, with the fitted ones from `gate`."""
        if self.fitted is None:
            return gate
        weight, bias = mx.array(self.current.weight), mx.array(self.current.bias)
        weight[mx.array(list(self.fitted))], bias[mx.array(list(self.fitted))] = gate
        return Gate(weight, bias)


def _discriminant(skills: Sequence[SkillFeatures], pooled: PooledStatistics, experts: int, scale: FeatureScale) -> Gate:
    owners = [skill.expert for skill in skills]
    weight, bias = feature_statistics.discriminant_rows(pooled, owners, experts, scale)
    return Gate(mx.array(weight.astype(np.float32)), mx.array(bias.astype(np.float32)))


def best_temperature(judged: Sequence[tuple[Gate, Problem, float]], rows: Rows) -> float:
    """Return the temperature with the lowest weighted cross-entropy. It is convex in 1 / temperature: ternary search.

    Args:
        judged: gates before the temperature, the tokens that they are judged by, and the weights of these.
        rows: which rows have the temperature.
    """

    def loss(sharpness: float) -> float:
        return sum(w * _cross_entropy(rows.start(gate, 1 / sharpness), problem) for gate, problem, w in judged)

    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    while high / low > 1.02:
        third = (high - low) / 3
        low, high = (low, high - third) if loss(low + third) < loss(high - third) else (low + third, high)
    return 2 / (low + high)


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


def _token_losses(gate: Gate, problem: Problem) -> np.ndarray:
    """Return the cross-entropy of each token in nats, float64 [n]."""
    return np.array(problem.losses(router.logits(problem.features, gate)), np.float64)


def _cross_entropy(gate: Gate, problem: Problem) -> float:
    return float(_token_losses(gate, problem) @ np.array(problem.weights))


def _accuracy(gate: Gate, tokens: Tokens) -> float:
    right = np.array(router.logits(mx.array(tokens.features), gate).argmax(-1)) == tokens.experts
    return float((right * tokens.weights).sum())
