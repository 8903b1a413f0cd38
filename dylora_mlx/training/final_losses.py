"""The losses at the end of a run, with bootstrap intervals and what they were measured on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dylora_mlx.growth.novelty.embedding import bootstrap_sums
from dylora_mlx.model.routing.router import forced_routing
from dylora_mlx.system.seeds import SeedStream, generator
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.step.domains import Coverage, Domain, holding_features
from dylora_mlx.training.step.evaluate import Evaluation, evaluate

RESAMPLES, CONFIDENCE = 2000, 0.95
"""Bootstrap resamples of a domain's documents, and the share of them that an interval covers."""

Interval = tuple[float, float]
"""Lower and upper end of a confidence interval, in nats per token."""


class FinalLosses(NamedTuple):
    """Losses of one domain at the end of a run, in nats per token."""

    base: float
    mixture: float
    own_expert: float | None
    """With every token sent to the domain's own expert (the base, if it has none). None where it is not measured."""
    intervals: dict[str, Interval]
    """95% intervals by name: base, mixture, own_expert, change (mixture minus base) and regret (mixture minus own expert).

    Only of what was measured by document, and empty for a single document.
    """
    coverage: Coverage | None
    """How much of the domain's text was evaluated."""

    def to_json(self) -> dict[str, Any]:
        """Return the entry of results.json."""
        own = {} if self.own_expert is None else {"own_expert": self.own_expert}
        intervals = {name: list(interval) for name, interval in self.intervals.items()}
        coverage = {} if self.coverage is None else self.coverage._asdict()
        return {"base": self.base, "mixture": self.mixture, **own, "intervals": intervals, **coverage}


def validation_losses(run: TrainingRun) -> dict[str, FinalLosses]:
    """Return the last row of the loss matrix with intervals. Nothing is evaluated anew unless the run was resumed."""
    rows, evaluated = run.state.matrix, run.evaluate()
    return {
        name: FinalLosses(
            rows[0][name],
            rows[-1][name],
            None,
            loss_intervals({"mixture": evaluated[name]}, run.config.seed),
            domain.coverage,
        )
        for name, domain in run.domains.items()
    }


def full_validation_losses(run: TrainingRun) -> dict[str, FinalLosses]:
    """Return the losses of all validation documents, for `eval.full`."""
    mixture, losses = run.evaluate(run.final_domains), {}
    for name, domain in run.final_domains.items():
        with holding_features({name: domain}):
            base = _with_expert(run, domain, 0)
        losses[name] = _final_losses(run, domain, {"base": base, "mixture": mixture[name]})
    return losses


def test_losses(run: TrainingRun) -> dict[str, FinalLosses]:
    """Return the losses of the test documents: base, mixture, and every token on the domain's own expert."""
    mixture, losses = run.evaluate(run.tests), {}
    for name, domain in run.tests.items():
        expert_id = run.library.experts_of.get(name, 0)
        with holding_features({name: domain}):
            base = _with_expert(run, domain, 0)
            own_expert = _with_expert(run, domain, expert_id) if expert_id else base
        losses[name] = _final_losses(run, domain, {"base": base, "mixture": mixture[name], "own_expert": own_expert})
    return losses


def _with_expert(run: TrainingRun, domain: Domain, expert_id: int) -> Evaluation:
    """Evaluate with every token sent to one expert. The base (0) needs no forward pass if its final states are cached."""
    routing = forced_routing()
    with run.timers.time("evaluations"):
        return evaluate(run.model, domain, routing, expert_id, run.model.adapters(routing.top_k), run.evaluator)


def _final_losses(run: TrainingRun, domain: Domain, evaluations: Mapping[str, Evaluation]) -> FinalLosses:
    losses = {name: evaluation.loss for name, evaluation in evaluations.items()}
    intervals = loss_intervals(evaluations, run.config.seed)
    return FinalLosses(losses["base"], losses["mixture"], losses.get("own_expert"), intervals, domain.coverage)


def loss_intervals(evaluations: Mapping[str, Evaluation], seed: int) -> dict[str, Interval]:
    """Return 95% bootstrap intervals of losses of the same documents, by the names of `evaluations`.

    Whole documents are drawn with replacement, as the tokens of one document depend on each other. All losses use the same
    draws, so the intervals of their differences, `change` and `regret`, are paired. Empty for fewer than two documents.
    """
    documents = {name: np.array(evaluation.documents) for name, evaluation in evaluations.items()}
    sums = np.stack([each[:, 0] for each in documents.values()] + [next(iter(documents.values()))[:, 1]])
    if sums.shape[1] < 2:
        return {}
    drawn = bootstrap_sums(sums, RESAMPLES, generator(seed, SeedStream.INTERVAL))
    losses = dict(zip(documents, drawn[:-1] / drawn[-1], strict=True))
    for name, other in (("change", "base"), ("regret", "own_expert")):
        if other in losses:
            losses[name] = losses["mixture"] - losses[other]
    tail = (1 - CONFIDENCE) / 2
    return {name: tuple(np.quantile(values, [tail, 1 - tail]).tolist()) for name, values in losses.items()}
