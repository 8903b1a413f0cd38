"""Whether an expert pays, learned across runs: a contextual bandit by linear Thompson sampling (Agrawal and Goyal 2013).

Two arms, "create" and "known" (no new expert); rewards in nats a token. Before the bandit may decide anything, `check`
judges it on logged trials against the rule that would decide otherwise.
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
"""Prior standard deviation of each weight, nats a token: features are of order one, and an expert gains 0.1 to 1 nat."""
NOISE_STD = 0.1
"""Standard deviation of a reward around the linear mean, nats a token: mostly what a linear model cannot express, for a
held-out gain itself varies by some hundredths between seeds."""
MIN_PROBABILITY = 0.02
"""Each arm's least probability: importance weights stay below 1 / FLOOR, and every policy can be judged later."""


class Posterior(NamedTuple):
    """Gaussian posterior of one arm's weights under ridge regression: mean float64 [F], covariance float64 [F, F]."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, trials: Sequence[BanditTrial], action: Arm) -> Posterior:
        """From the trials that know this action's reward; the prior if none does."""
        seen = [trial for trial in trials if action in trial.rewards]
        features = np.array([t.context.features() for t in seen]).reshape(len(seen), len(BanditContext._fields) + 1)
        rewards = np.array([trial.rewards[action] for trial in seen])
        precision = np.eye(features.shape[1]) / PRIOR_STD**2 + features.T @ features / NOISE_STD**2
        covariance = np.linalg.inv(precision)
        return cls(covariance @ (features.T @ rewards) / NOISE_STD**2, covariance)


class Bandit:
    """Each arm's posterior given trials, and the policy that follows from both."""

    def __init__(self, trials: Sequence[BanditTrial]):
        self.arms = {action: Posterior.of(trials, action) for action in ARMS}

    def mean(self, context: BanditContext, action: Arm) -> float:
        """Expected reward, nats a token."""
        return float(context.features() @ self.arms[action].mean)

    def probability(self, context: BanditContext) -> float:
        """P(create): that weights drawn from both posteriors rate create above known, kept FLOOR away from 0 and 1."""
        x = context.features()
        ahead = self.mean(context, "create") - self.mean(context, "known")
        spread = math.sqrt(sum(float(x @ arm.covariance @ x) for arm in self.arms.values()))
        return min(max(0.5 * math.erfc(-ahead / spread / math.sqrt(2)), MIN_PROBABILITY), 1 - MIN_PROBABILITY)

    def choose(self, context: BanditContext, rng: np.random.Generator) -> tuple[Arm, float]:
        """An action, and the probability with which it was drawn."""
        create = self.probability(context)
        return ("create", create) if rng.random() < create else ("known", 1 - create)


def train_bandit(options: Options, seed: int) -> tuple[Bandit | None, str]:
    """The bandit that the given histories teach, None if it is not trusted, and why or why not.

    Raises UserError for a history that cannot be read.
    """
    if not options.history:
        return None, "no history was given (growth.bandit.history)"
    found = read_history(Path(path).expanduser() for path in options.history)
    verdict = check_off_policy(found, needed=options.trials, tolerance=options.tolerance, seed=seed)
    return (Bandit(found) if verdict.trusted else None), verdict.reason


class OffPolicyCheck(NamedTuple):
    """Whether the bandit may decide.

    bandit, rule: estimated values of the two policies, nats a token, and interval: of bandit - rule; None where trials are
    too few for an estimate. usable: trials it rests on, `exact` of them with both rewards; unsupported: trials that
    cannot tell; effective: Kish's effective sample size of the usable ones. reason: the verdict as a sentence.
    """

    trusted: bool
    bandit: float | None
    rule: float | None
    interval: tuple[float, float] | None
    usable: int
    exact: int
    unsupported: int
    effective: float
    reason: str


def threshold_rule(trial: BanditTrial) -> Arm:
    """The threshold rule: create below the threshold."""
    return "create" if trial.context.margin < 0 else "known"


def is_usable(trial: BanditTrial) -> bool:
    """Whether a trial can compare two policies: each action could have been drawn, or both rewards are known.

    On one trial the policies differ by (P - P') (reward of create - reward of known). Where the action was certain and the
    other arm's reward is not known, that one is a model's word alone, and no weight can correct it.
    """
    return _drawn(trial) or len(trial.rewards) == len(ARMS)


def _drawn(trial: BanditTrial) -> bool:
    """Whether chance decided, and the reward of what it chose is known."""
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
    """The bandit against a deterministic rule, off-policy and doubly robust (Dudik, Langford and Li 2011).

    rule: what would decide otherwise; every answer but "create" counts as "known".

    Cross-fitted: the bandit that is judged on a trial, and the reward model that helps to judge it, never saw that trial's
    fold. Trials that are not `supported` help to fit and are not judged, so the verdict speaks of contexts like those of
    the others. Trusted if at least `needed` trials are usable, both arms are among their rewards, and the bootstrap
    interval of the difference lies above -tolerance (nats a token).
    """
    rng = np.random.default_rng(seed)
    usable = [trials[i] for i in rng.permutation(len(trials)) if is_usable(trials[i])]
    rest = [trial for trial in trials if not is_usable(trial)]
    exact = sum(not _drawn(trial) for trial in usable)
    missing = [action for action in ARMS if not any(action in trial.rewards for trial in usable)]
    if len(usable) < needed or missing:
        lack = f"{len(usable)} of {needed} usable trials" if len(usable) < needed else f"no reward of {missing[0]}"
        reason = f"not trusted: {lack}{_left_out(rest)}"
        return OffPolicyCheck(False, None, None, None, len(usable), exact, len(rest), 0.0, reason)
    bandit, other, weights = _judge(usable, rest, rule, min(folds, len(usable))).T
    low, high = _interval(bandit - other, resamples, confidence, rng)
    effective, trusted = float(weights.sum() ** 2 / (weights**2).sum()), low > -tolerance
    reason = (
        f"{'' if trusted else 'not '}trusted: over {len(usable)} trials ({exact} exact, {effective:.1f} effective) the "
        f"bandit differs from the rule by {(bandit - other).mean():+.3f} nats a token ({low:+.3f} to {high:+.3f}, "
        f"{'above' if trusted else 'not above'} {-tolerance:+.3f}){_left_out(rest)}"
    )
    means = float(bandit.mean()), float(other.mean())
    return OffPolicyCheck(trusted, *means, (low, high), len(usable), exact, len(rest), effective, reason)


def _left_out(trials: list[BanditTrial]) -> str:
    return f"; {len(trials)} more cannot tell, their action was certain" if trials else ""


def _judge(
    usable: list[BanditTrial], rest: list[BanditTrial], rule: Callable[[BanditTrial], str], folds: int
) -> np.ndarray:
    """Of each usable trial, fold by fold: the bandit's value, the rule's, and the bandit's weight, float64 [n, 3]."""
    judged = []
    for fold in range(folds):
        bandit = Bandit([*(trial for i, trial in enumerate(usable) if i % folds != fold), *rest])
        for trial in usable[fold::folds]:
            create = bandit.probability(trial.context)
            other = float(rule(trial) == "create")
            judged.append((*_value(trial, create, bandit), _value(trial, other, bandit)[0]))
    return np.array(judged)[:, [0, 2, 1]]


def _value(trial: BanditTrial, create: float, bandit: Bandit) -> tuple[float, float]:
    """Doubly robust value, on one trial, of a policy that creates with this probability, and its importance weight.

    Where both rewards are known the value is exact and the weight 1. Not so where chance decided: which rewards came to be
    known may then depend on what was drawn (a creation also tells what none is worth), and to leave the weight out would
    count what was drawn often too often.
    """
    chances = {"create": create, "known": 1 - create}
    if trial.propensity is None or not _drawn(trial):
        return sum(chances[action] * trial.rewards[action] for action in ARMS), 1.0
    weight = chances[trial.action] / trial.propensity
    modelled = sum(chances[action] * bandit.mean(trial.context, action) for action in ARMS)
    residual = trial.rewards[trial.action] - bandit.mean(trial.context, trial.action)
    return modelled + weight * residual, weight


def _interval(values: np.ndarray, resamples: int, confidence: float, rng: np.random.Generator) -> tuple[float, float]:
    """Bootstrap percentile interval of the mean of values [n] (Efron 1979)."""
    draws = rng.choice(values, (resamples, len(values))).mean(1)
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
