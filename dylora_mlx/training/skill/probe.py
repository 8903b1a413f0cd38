"""Evidence for a decision: held-out losses of the base, of the experts, and of a trial expert after some steps.

Half of the skill's training documents train the trial expert. The other half and the validation split are held out from
it. No expert of the pool has seen any of these documents.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import mlx.core as mx
import numpy as np

from dylora_mlx.config import GrowthConfig
from dylora_mlx.data.stream import Skill, Split
from dylora_mlx.growth.decide.policy import ExistingLosses, TrialResult
from dylora_mlx.growth.novelty.embedding import bootstrap_sums
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.system.seeds import SeedStream, derived_seed, generator
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.skill import solo
from dylora_mlx.training.skill.base_pass import BasePass
from dylora_mlx.training.step.domains import Domain, make_domains
from dylora_mlx.training.step.evaluate import losses_by_segment

MAX_PROBED = 32
"""Largest number of experts that are measured on the text of a new skill."""


class ProbeEvidence:
    """Evidence about one skill. Each part is measured at its first use and then cached."""

    def __init__(
        self, run: TrainingRun, skill: Skill, base_pass: BasePass, similarities: Mapping[str, float] | None = None
    ):
        self.run, self.skill, self.base_pass, self.similarities = run, skill, base_pass, similarities or {}
        rng = generator(run.config.seed, SeedStream.PROBE_SPLIT, run.state.skill_index)
        documents = rng.permutation(sorted({segment.document for segment in skill.train.segments}))
        trial_documents = set(documents[: (len(documents) + 1) // 2].tolist())
        indices = range(len(skill.train.segments))
        self._trial_segments = [i for i in indices if skill.train.segments[i].document in trial_documents]
        self._held_out_segments = [i for i in indices if skill.train.segments[i].document not in trial_documents]

    @cached_property
    def domain(self) -> Domain:
        """Held-out batches, at most growth.probe.rows rows but at least one batch."""
        config = self.run.config
        segments = [*self.skill.validation.segments, *(self.skill.train.segments[i] for i in self._held_out_segments)]
        shape = (config.data.max_seq_length, config.training.batch_size, self.run.compiled)
        domain = make_domains({self.skill.name: Split(segments, len(segments))}, *shape)[self.skill.name]
        domain.batches = domain.batches[: max(1, config.growth.probe.rows // config.training.batch_size)]
        return domain

    @cached_property
    def _losses(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Summed loss and number of targets of each held-out segment, by expert id. 0 is the base."""
        expert_ids = probed_experts(self.run, self.similarities)
        return {expert_id: losses_by_segment(self.run.model, self.domain, expert_id) for expert_id in expert_ids}

    def existing(self) -> ExistingLosses:
        """Return the losses of the base and of every expert, and the entropy of the current routing."""
        return self._existing

    @cached_property
    def _existing(self) -> ExistingLosses:
        losses = {expert_id: float(sums.sum() / counts.sum()) for expert_id, (sums, counts) in self._losses.items()}
        routed = self.run.evaluate({self.skill.name: self.domain})[self.skill.name]
        return ExistingLosses(losses, routed.entropy, len(self._losses[0][0]), self._best_gain(losses))

    def _best_gain(self, losses: dict[int, float]) -> tuple[float, float] | None:
        """Return the interval of the best expert's gain over the base; None without experts."""
        experts = [expert_id for expert_id in losses if expert_id]
        if not experts:
            return None
        best = min(experts, key=lambda expert_id: losses[expert_id])
        seed = derived_seed(self.run.config.seed, SeedStream.PROBE_TRIAL, self.run.state.skill_index)
        return gain_interval(self._losses[0][0], self._losses[best], self.run.config.growth, seed)

    def trial(self) -> TrialResult:
        """Train a trial expert for some steps and return its gain over the best existing expert.

        It starts from scratch. A copy of an expert would gain merely because it is trained for longer.
        """
        return self._trial

    @cached_property
    def _trial(self) -> TrialResult:
        run, growth = self.run, self.run.config.growth
        rank, alpha = run.expert_rank(self.skill)
        seed = derived_seed(run.config.seed, SeedStream.PROBE_TRIAL, run.state.skill_index)
        trial = solo.solo_model(run.base, run.config, Expert(run.model.shapes, rank, alpha, mx.random.key(seed)))
        split, features = solo.select_segments(self.skill.train, self.base_pass.features, self._trial_segments)
        steps = solo.train_solo(trial, run.config, split, features, growth.probe.steps, seed, run.compiled)
        best, _ = self._losses[self.existing().best]
        return compare_trial(best, losses_by_segment(trial, self.domain, 1), steps, growth, seed)


def probed_experts(run: TrainingRun, similarities: Mapping[str, float]) -> list[int]:
    """Return the ids of the experts that are measured on a skill, the base (0) first: all, or of a pool of more than
    MAX_PROBED those of the most similar skills."""
    if len(run.pool) <= MAX_PROBED:
        return list(range(len(run.pool) + 1))
    return [0, *run.library.nearest_experts(similarities, MAX_PROBED)]


def compare_trial(
    best: np.ndarray, trial: tuple[np.ndarray, np.ndarray], steps: int, growth: GrowthConfig, seed: int
) -> TrialResult:
    """Compare a trial expert with the best existing one: the gain and its bootstrap interval over held-out segments.

    Args:
        best: summed losses of the best existing expert by segment (a document, or a window of a long one), float64 [n].
        trial: summed losses and numbers of targets of the trial expert by segment, float64 [n] each.
        steps: steps that the trial was trained for.
        growth: bootstrap resamples and confidence.
        seed: seed of the bootstrap.
    """
    sums, tokens = trial
    gain = float((best - sums).sum() / tokens.sum())
    return TrialResult(float(sums.sum() / tokens.sum()), gain, gain_interval(best, trial, growth, seed), steps)


def gain_interval(
    before: np.ndarray, after: tuple[np.ndarray, np.ndarray], growth: GrowthConfig, seed: int
) -> tuple[float, float]:
    """Return the bootstrap interval of a gain in nats per token, over held-out segments.

    Args:
        before: summed losses by segment that `after` is compared with, float64 [n].
        after: summed losses and numbers of targets by segment, float64 [n] each.
        growth: bootstrap resamples and confidence.
        seed: seed of the bootstrap.
    """
    sums, tokens = after
    draws = bootstrap_sums(np.stack([before - sums, tokens]), growth.bootstrap, np.random.default_rng(seed))
    tail = (1 - growth.confidence) / 2
    low, high = np.quantile(draws[0] / draws[1], [tail, 1 - tail])
    return float(low), float(high)
