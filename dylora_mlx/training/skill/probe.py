"""Evidence for a decision: held-out losses of everything that exists, and of a trial expert after some steps.

Half of the skill's training documents train the trial; the other half and the validation split are held out from it, and
no expert of the pool has seen any of them.
"""

from __future__ import annotations

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
from dylora_mlx.training.step.evaluate import Domain, losses_by_segment, make_domains


class ProbeEvidence:
    """Evidence about one skill, measured when it is asked for."""

    def __init__(self, run: TrainingRun, skill: Skill, study: BasePass):
        self.run, self.skill, self.study = run, skill, study
        rng = generator(run.config.seed, SeedStream.PROBE_SPLIT, run.state.skill_index)
        documents = rng.permutation(sorted({piece.document for piece in skill.train.segments}))
        taught = set(documents[: (len(documents) + 1) // 2].tolist())
        pieces = range(len(skill.train.segments))
        self._taught = [i for i in pieces if skill.train.segments[i].document in taught]
        self._held_out = [i for i in pieces if skill.train.segments[i].document not in taught]

    @cached_property
    def domain(self) -> Domain:
        """Held-out rows, as many as the probe may measure."""
        config = self.run.config
        pieces = [*self.skill.validation.segments, *(self.skill.train.segments[i] for i in self._held_out)]
        shape = (config.data.max_seq_length, config.training.batch_size, self.run.compiled)
        found = make_domains({self.skill.name: Split(pieces, len(pieces))}, *shape)[self.skill.name]
        found.batches = found.batches[: max(1, config.growth.probe.rows // config.training.batch_size)]
        return found

    @cached_property
    def _losses(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        expert_ids = range(len(self.run.pool) + 1)
        return {expert_id: losses_by_segment(self.run.model, self.domain, expert_id) for expert_id in expert_ids}

    def existing(self) -> ExistingLosses:
        """Losses of the base and of every expert, and the entropy of the present routing."""
        losses = {expert_id: float(sums.sum() / tokens.sum()) for expert_id, (sums, tokens) in self._losses.items()}
        routed = self.run.evaluate({self.skill.name: self.domain})[self.skill.name]
        return ExistingLosses(losses, routed.entropy, len(self._losses[0][0]))

    def trial(self) -> TrialResult:
        """Train an expert for some steps, from scratch: one that starts as a copy would gain from more steps alone."""
        return self._trial

    @cached_property
    def _trial(self) -> TrialResult:
        run, growth = self.run, self.run.config.growth
        rank, alpha = run.expert_rank(self.skill)
        seed = derived_seed(run.config.seed, SeedStream.PROBE_TRIAL, run.state.skill_index)
        trial = solo.solo_model(run.base, run.config, Expert(run.model.shapes, rank, alpha, mx.random.key(seed)))
        split, features = solo.select_segments(self.skill.train, self.study.features, self._taught)
        steps = solo.train_solo(trial, run.config, split, features, growth.probe.steps, seed, run.compiled)
        best, _ = self._losses[self.existing().best]
        return compare_trial(best, losses_by_segment(trial, self.domain, 1), steps, growth, seed)


def compare_trial(
    best: np.ndarray, trial: tuple[np.ndarray, np.ndarray], steps: int, growth: GrowthConfig, seed: int
) -> TrialResult:
    """A trial's summed losses and tokens by document, float64 [n] each, against the best existing sums [n]: the gain and
    its bootstrap interval over documents."""
    sums, tokens = trial
    draws = bootstrap_sums(np.stack([best - sums, tokens]), growth.bootstrap, np.random.default_rng(seed))
    tail = (1 - growth.confidence) / 2
    low, high = np.quantile(draws[0] / draws[1], [tail, 1 - tail])
    gain = float((best - sums).sum() / tokens.sum())
    return TrialResult(float(sums.sum() / tokens.sum()), gain, (float(low), float(high)), steps)
