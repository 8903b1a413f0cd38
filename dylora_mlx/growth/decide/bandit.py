"""Contextual bandit that learns across runs when a new expert pays off.

The method is linear Thompson sampling (Agrawal and Goyal 2013) with two arms: "create", and "known" for no new expert.
Rewards are in nats per token. The bandit decides only if `check_off_policy` trusts it: this compares it, on logged
trials, with the rule that would decide otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dylora_mlx.config import BanditConfig as Options
from dylora_mlx.growth.decide.bandit_log import ARMS, Arm, BanditContext, BanditTrial, read_history

PRIOR_STD = 0.5
"""Prior standard deviation of each weight, nats per token: features are of order 1, an expert gains 0.1 to 1 nat."""
NOISE_STD = 0.1
"""Standard deviation of a reward around the linear mean, nats per token.

Most of it is misfit of the linear model: a held-out gain varies by only some hundredths between seeds.
"""
MIN_PROBABILITY = 0.02
"""Lower bound of each arm's probability.

It bounds importance weights by 1 / MIN_PROBABILITY, and keeps the logged trials usable to evaluate any other policy.
"""


class Posterior(NamedTuple):
    """Gaussian posterior of one arm's weights under Bayesian ridge regression."""

    mean: np.ndarray
    """Float64 [F]."""
    covariance: np.ndarray
    """Float64 [F, F]."""

    @classmethod
    def of(cls, trials: Sequence[BanditTrial], action: Arm) -> Posterior:
        """Fit the posterior to the trials with a known reward of this action; without any it is the prior."""
        seen = [trial for trial in trials if action in trial.rewards]
        features = np.array([t.context.features() for t in seen]).reshape(len(seen), len(BanditContext._fields) + 1)
        rewards = np.array([trial.rewards[action] for trial in seen])
        precision = np.eye(features.shape[1]) / PRIOR_STD**2 + features.T @ features / NOISE_STD**2
        covariance = np.linalg.inv(precision)
        return cls(covariance @ (features.T @ rewards) / NOISE_STD**2, covariance)


class Bandit:
    """Thompson sampling policy: one posterior per arm, fitted to trials."""

    def __init__(self, trials: Sequence[BanditTrial]):
        self.arms = {action: Posterior.of(trials, action) for action in ARMS}

    def mean(self, context: BanditContext, action: Arm) -> float:
        """Return the expected reward of an action, nats per token."""
        return float(context.features() @ self.arms[action].mean)

    def probability(self, context: BanditContext) -> float:
        """Return P(create), clipped to [MIN_PROBABILITY, 1 - MIN_PROBABILITY].

        P(create) is the probability that weights drawn from both posteriors predict a higher reward for create than for
        known.
        """
        x = context.features()
        advantage = self.mean(context, "create") - self.mean(context, "known")
        std = math.sqrt(sum(float(x @ arm.covariance @ x) for arm in self.arms.values()))
        return min(max(0.5 * math.erfc(-advantage / std / math.sqrt(2)), MIN_PROBABILITY), 1 - MIN_PROBABILITY)

    def choose(self, context: BanditContext, rng: np.random.Generator) -> tuple[Arm, float]:
        """Draw an action; return it with the probability with which it was drawn."""
        create = self.probability(context)
        return ("create", create) if rng.random() < create else ("known", 1 - create)


def train_bandit(options: Options, seed: int) -> tuple[Bandit | None, str]:
    """Fit a bandit to the histories named in the options and check it off-policy.

    Returns the bandit, or None if it is not trusted, and the reason as a sentence. Raises UserError for a history that
    cannot be read.
    """
    if not options.history:
        return None, "no history was given (growth.bandit.history)"
    trials = read_history(Path(path).expanduser() for path in options.history)
    verdict = check_off_policy(trials, needed=options.trials, tolerance=options.tolerance, seed=seed)
    return (Bandit(trials) if verdict.trusted else None), verdict.reason


class OffPolicyCheck(NamedTuple):
    """Result of the off-policy check of a bandit."""

    trusted: bool
    """Whether the bandit may decide."""
    bandit: float | None
    """Estimated value of the bandit, nats per token; None if there are too few trials for an estimate."""
    rule: float | None
    """Estimated value of the rule, nats per token; None if there are too few trials for an estimate."""
    interval: tuple[float, float] | None
    """Bootstrap interval of bandit - rule; None if there are too few trials for an estimate."""
    usable: int
    """Number of trials that the estimate rests on."""
    exact: int
    """Usable trials without a random action but with both rewards known; they need no importance weight."""
    unsupported: int
    """Number of trials that cannot compare two policies, see `is_usable`."""
    effective: float
    """Kish's effective sample size of the usable trials."""
    reason: str
    """The verdict as a sentence."""


def threshold_rule(trial: BanditTrial) -> Arm:
    """Return the arm of the threshold rule: create if the similarity is below the threshold."""
    return "create" if trial.context.margin < 0 else "known"


def is_usable(trial: BanditTrial) -> bool:
    """Return whether a trial can compare two policies: each action could have been drawn, or both rewards are known.

    On one trial the values of policies P and P' differ by (P - P') (reward of create - reward of known). If the action
    was certain and the other arm's reward is unknown, that reward is a model's prediction that no importance weight can
    correct.
    """
    return _was_randomised(trial) or len(trial.rewards) == len(ARMS)


def _was_randomised(trial: BanditTrial) -> bool:
    """Return whether the action was drawn at random and its reward is known."""
    return trial.propensity is not None and trial.propensity < 1 and trial.action in trial.rewards


def check_off_policy(
    trials: Sequence[BanditTrial],
    rule: Callable[[BanditTrial], str] = threshold_rule,
    needed: int = 20,
    tolerance: float = 0.01,
    folds: int = 10,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> OffPolicyCheck:
    """Compare the bandit with a deterministic rule by off-policy evaluation.

    The estimator is doubly robust (Dudik, Langford and Li 2011) and cross-fitted: neither the bandit evaluated on a
    trial nor the reward model behind the estimate was fitted to that trial's fold. Trials that are not usable
    (`is_usable`) help to fit but are not evaluated, so the verdict holds for contexts similar to those of the usable
    trials.

    The bandit is trusted if at least `needed` trials are usable, both arms occur among their rewards, and the bootstrap
    interval of bandit - rule lies above -tolerance.

    Args:
        trials: Logged trials.
        rule: The policy that would decide otherwise. Any value but "create" counts as "known".
        needed: Least number of usable trials.
        tolerance: Accepted loss against the rule, nats per token.
        folds: Number of cross-fitting folds, at most.
        resamples: Number of bootstrap resamples.
        confidence: Coverage of the bootstrap interval.
        seed: Seed of the folds and of the bootstrap.
    """
    rng = np.random.default_rng(seed)
    usable = [trials[i] for i in rng.permutation(len(trials)) if is_usable(trials[i])]
    rest = [trial for trial in trials if not is_usable(trial)]
    exact = sum(not _was_randomised(trial) for trial in usable)
    missing = [action for action in ARMS if not any(action in trial.rewards for trial in usable)]
    if len(usable) < needed or missing:
        lack = f"{len(usable)} of {needed} usable trials" if len(usable) < needed else f"no reward of {missing[0]}"
        reason = f"not trusted: {lack}{_excluded_note(rest)}"
        return OffPolicyCheck(False, None, None, None, len(usable), exact, len(rest), 0.0, reason)
    bandit, baseline, weights = _cross_fitted_values(usable, rest, rule, min(folds, len(usable))).T
    low, high = _interval(bandit - baseline, resamples, confidence, rng)
    effective, trusted = float(weights.sum() ** 2 / (weights**2).sum()), low > -tolerance
    reason = (
        f"{'' if trusted else 'not '}trusted: over {len(usable)} trials ({exact} exact, {effective:.1f} effective) the "
        f"bandit differs from the rule by {(bandit - baseline).mean():+.3f} nats a token ({low:+.3f} to {high:+.3f}, "
        f"{'above' if trusted else 'not above'} {-tolerance:+.3f}){_excluded_note(rest)}"
    )
    means = float(bandit.mean()), float(baseline.mean())
    return OffPolicyCheck(trusted, *means, (low, high), len(usable), exact, len(rest), effective, reason)


def _excluded_note(trials: list[BanditTrial]) -> str:
    return f"; {len(trials)} more cannot tell, their action was certain" if trials else ""


def _cross_fitted_values(
    usable: list[BanditTrial], rest: list[BanditTrial], rule: Callable[[BanditTrial], str], folds: int
) -> np.ndarray:
    """Return the bandit's value, the rule's value and the bandit's importance weight per usable trial, float64 [n, 3].

    The rows are in the order of the folds. Each fold is evaluated by a bandit fitted to all other trials.
    """
    values = []
    for fold in range(folds):
        bandit = Bandit([*(trial for i, trial in enumerate(usable) if i % folds != fold), *rest])
        for trial in usable[fold::folds]:
            create = bandit.probability(trial.context)
            rule_create = float(rule(trial) == "create")
            values.append((*_value(trial, create, bandit), _value(trial, rule_create, bandit)[0]))
    return np.array(values)[:, [0, 2, 1]]


def _value(trial: BanditTrial, create: float, bandit: Bandit) -> tuple[float, float]:
    """Return the doubly robust value of a policy on one trial, and the policy's importance weight.

    `create` is the policy's probability of "create". If both rewards are known and the action was not drawn at random,
    the value is exact and the weight is 1. A randomised trial is weighted even if both rewards are known: which rewards
    are known may depend on the drawn action (a creation also reveals the reward of "known"), and without weights
    frequently drawn actions would count too much.
    """
    probabilities = {"create": create, "known": 1 - create}
    if trial.propensity is None or not _was_randomised(trial):
        return sum(probabilities[action] * trial.rewards[action] for action in ARMS), 1.0
    weight = probabilities[trial.action] / trial.propensity
    modelled = sum(probabilities[action] * bandit.mean(trial.context, action) for action in ARMS)
    residual = trial.rewards[trial.action] - bandit.mean(trial.context, trial.action)
    return modelled + weight * residual, weight


def _interval(values: np.ndarray, resamples: int, confidence: float, rng: np.random.Generator) -> tuple[float, float]:
    """Return the bootstrap percentile interval of the mean of values [n] (Efron 1979)."""
    draws = rng.choice(values, (resamples, len(values))).mean(1)
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
