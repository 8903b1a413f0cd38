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

from collections.abc import Callable, Sequence
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
MAX_CORRECTED = 256
"""Largest number of rows that one fit corrects, if it is for a newcomer."""
MAX_JUDGED = 2048
"""Tokens that a temperature is chosen by in a pool of more than JUDGED_BY_ALL experts."""
JUDGED_BY_ALL = 64
"""Largest number of experts whose temperature is chosen by all tokens."""
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

    In a pool of more than MAX_CORRECTED experts only the newcomer's row and those nearest to it are corrected: a correction of
    all would cost more with every skill.

    Args:
        model: the decoder, whose router is updated in place.
        library: what is remembered of each skill.
        config: the run's configuration.
        newcomer: features and exemplars of a skill that is not in the library yet.
        steps: as in `fit`; None for training.router_fit_steps.
        fitted: as in `fit`.
    """
    skills = [SkillFeatures(entry.statistics, entry.memory, entry.expert) for entry in library.entries]
    exemplars = [Exemplars(entry.exemplars, entry.expert) for entry in library.entries]
    statistics = library.pooled_statistics(None if newcomer is None else newcomer[0].statistics)
    if newcomer is not None:
        skills.append(newcomer[0])
        exemplars.append(Exemplars(newcomer[1], newcomer[0].expert))
    corrected = None
    if fitted is None and newcomer is not None and len(model.router.rows) > MAX_CORRECTED:
        corrected = nearest_rows(skills, statistics, len(model.router.rows))
        exemplars = [each for each in exemplars if each.expert in corrected]
    turned = spliced.turn_features(model, exemplars, config) if config.training.router_fit_steps else []
    training = config.training
    steps = training.router_fit_steps if steps is None else steps
    return fit(model.router, skills, steps, training.memory_tokens, fitted, turned, statistics, corrected)


def nearest_rows(
    skills: Sequence[SkillFeatures], pooled: PooledStatistics, experts: int, count: int = MAX_CORRECTED
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
    corrected: Sequence[int] | None = None,
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
        corrected: ids of the experts whose rows are corrected, if all are fitted; the others are those of the discriminant.
            None: all.
    """
    pooled, experts = pooled or PooledStatistics.of([skill.statistics for skill in skills]), len(gate_router.rows)
    scale = FeatureScale.pooled(pooled)
    limits = token_limits(skills, tokens, corrected if fitted is None else fitted)
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
    kept = None if fitted is None else Rows(fitted, scale.for_standardised(gate_router.gate()))
    # The statistics of all tokens include the held-out ones, so the choice starts from a discriminant without them.
    trial = _discriminant(skills, PooledStatistics.of_features(beginnings), experts, scale)
    final = _discriminant(skills, pooled, experts, scale)
    judged = [(trial, held_out, HELD_OUT_SHARE), (final, everything, 1 - HELD_OUT_SHARE)]
    temperature = best_temperature(judged, kept)
    trial_rows, final_rows = (kept or Rows(corrected, softened(each, temperature)) for each in (trial, final))
    start, gate = (
        kept.start(each, temperature) if kept else rows.chosen(rows.gate)
        for each, rows in ((trial, trial_rows), (final, final_rows))
    )
    held_out_problem = trial_rows.problem(held_out)
    fits = logistic.fit_rows(trial_rows.problem(learned), start, PENALTIES, steps) if steps else []
    candidates = [*fits, start]
    losses = [_token_losses(each, held_out_problem) for each in candidates]
    best = _simplest(losses, held_out)
    penalty = [*PENALTIES, np.inf][best] if steps else np.inf
    if penalty < np.inf:
        (gate,) = logistic.fit_rows(final_rows.problem(everything), gate, [penalty], steps)
    raw = scale.for_raw(gate if kept else final_rows.whole(gate))
    for index, expert_id in enumerate(range(experts) if fitted is None else fitted):
        row = gate_router.rows[expert_id]
        row.weight, row.bias = raw.weight[index], raw.bias[index : index + 1]
    mx.eval(gate_router.parameters())
    loss = _cross_entropy(candidates[best], trial_rows.problem(reported))
    return RouterFit(loss, _accuracy(trial_rows.whole(candidates[best]), reported), temperature, penalty)


def softened(discriminant: Gate, temperature: float) -> Gate:
    """Return a discriminant's rows divided by a temperature."""
    return Gate(discriminant.weight / temperature, discriminant.bias / temperature)


class Rows(NamedTuple):
    """The rows that a correction is fitted to, among all rows."""

    fitted: Sequence[int] | None
    """ids of the experts whose rows are fitted; None: all."""
    gate: Gate
    """All rows, for standardised features. Those that are not fitted stay as they are here."""

    def problem(self, tokens: Tokens) -> Problem:
        """Return what the fitted rows have to do for some tokens."""
        arrays = tokens.arrays()
        return Problem.of_all(*arrays) if self.fitted is None else Problem.of_some(*arrays, self.gate, self.fitted)

    def chosen(self, gate: Gate) -> Gate:
        """Return the fitted rows of a gate of all rows."""
        if self.fitted is None:
            return gate
        fitted = mx.array(list(self.fitted))
        return Gate(gate.weight[fitted], gate.bias[fitted])

    def start(self, discriminant: Gate, temperature: float) -> Gate:
        """Return the fitted rows of a discriminant, divided by a temperature, beside the other rows of `gate`.

        A softmax does not see a vector that is added to all rows, but these rows hold another one than the discriminant's.
        So the fitted rows are moved by the mean difference of the other rows.
        """
        new = softened(discriminant, temperature)
        others = mx.array(sorted(set(range(len(new.bias))).difference(self.fitted or [])))
        pairs = zip(self.gate, new, self.chosen(new), strict=True)
        return Gate(*(fitted + (now[others] - new[others]).mean(0) for now, new, fitted in pairs))

    def whole(self, gate: Gate) -> Gate:
        """Return all rows, with the fitted ones from `gate`."""
        if self.fitted is None:
            return gate
        weight, bias = mx.array(self.gate.weight), mx.array(self.gate.bias)
        weight[mx.array(list(self.fitted))], bias[mx.array(list(self.fitted))] = gate
        return Gate(weight, bias)


def _discriminant(skills: Sequence[SkillFeatures], pooled: PooledStatistics, experts: int, scale: FeatureScale) -> Gate:
    owners = [skill.expert for skill in skills]
    weight, bias = feature_statistics.discriminant_rows(pooled, owners, experts, scale)
    return Gate(mx.array(weight.astype(np.float32)), mx.array(bias.astype(np.float32)))


def best_temperature(judged: Sequence[tuple[Gate, Tokens, float]], kept: Rows | None = None) -> float:
    """Return the temperature with the lowest weighted cross-entropy. It is convex in 1 / temperature: ternary search.

    Args:
        judged: gates before the temperature, the tokens that they are judged by, and the weights of these.
        kept: the rows that get the temperature, beside others that stay as they are. None: all rows get it.
    """
    parts = [(_loss_by_sharpness(gate, tokens, kept), weight) for gate, tokens, weight in judged]

    def loss(sharpness: float) -> float:
        return sum(weight * part(sharpness) for part, weight in parts)

    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    while high / low > 1.02:
        third = (high - low) / 3
        low, high = (low, high - third) if loss(low + third) < loss(high - third) else (low + third, high)
    return 2 / (low + high)


def _loss_by_sharpness(gate: Gate, tokens: Tokens, kept: Rows | None) -> Callable[[float], float]:
    """Return the cross-entropy of tokens as a function of 1 / temperature."""
    if kept is not None:
        problem = kept.problem(tokens)
        return lambda sharpness: _cross_entropy(kept.start(gate, 1 / sharpness), problem)
    thinned = tokens if len(gate.bias) <= JUDGED_BY_ALL else tokens.thinned(MAX_JUDGED)
    features, experts, _ = thinned.arrays()
    logits, weights = router.logits(features, gate), thinned.weights.astype(np.float64)
    mx.eval(logits)
    return lambda sharpness: float(np.array(router.cross_entropy(logits * sharpness, experts), np.float64) @ weights)


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
