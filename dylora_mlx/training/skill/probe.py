"""Evidence for a decision: held-out losses of everything that exists, and of a trial expert after some steps.

Half of the skill's training documents train the trial; the other half and the validation split are held out from it, and
no expert of the pool has seen any of them.
"""

from __future__ import annotations

from functools import cached_property

import mlx.core as mx
import numpy as np

from dylora_mlx.config import Growth
from dylora_mlx.data.stream import Skill, Split
from dylora_mlx.growth.decide.policy import Existing, Trial
from dylora_mlx.growth.novelty.embedding import resampled_totals
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.system.seeds import SeedStream, derived_seed, generator
from dylora_mlx.training.run import Run
from dylora_mlx.training.skill import solo as alone
from dylora_mlx.training.skill.base_pass import Study
from dylora_mlx.training.step import evaluate
from dylora_mlx.training.step.evaluate import Domain


class Probe:
    """Evidence about one skill, measured when it is asked for."""

    def __init__(self, run: Run, skill: Skill, study: Study):
        self.run, self.skill, self.study = run, skill, study
        rng = generator(run.config.seed, SeedStream.PROBE_SPLIT, run.state.skill)
        documents = rng.permutation(sorted({piece.document for piece in skill.train.pieces}))
        taught = set(documents[: (len(documents) + 1) // 2].tolist())
        pieces = range(len(skill.train.pieces))
        self._taught = [i for i in pieces if skill.train.pieces[i].document in taught]
        self._held_out = [i for i in pieces if skill.train.pieces[i].document not in taught]

    @cached_property
    def domain(self) -> Domain:
        """Held-out rows, as many as the probe may measure."""
        config = self.run.config
        pieces = [*self.skill.validation.pieces, *(self.skill.train.pieces[i] for i in self._held_out)]
        shape = (config.data.row_length, config.training.batch_rows, self.run.compiled)
        found = evaluate.domains({self.skill.name: Split(pieces, len(pieces))}, *shape)[self.skill.name]
        found.batches = found.batches[: max(1, config.growth.probe.rows // config.training.batch_rows)]
        return found

    @cached_property
    def _losses(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        columns = range(len(self.run.pool) + 1)
        return {column: evaluate.by_piece(self.run.model, self.domain, column) for column in columns}

    def existing(self) -> Existing:
        """Losses of the base and of every expert, and the entropy of the present routing."""
        losses = {column: float(sums.sum() / tokens.sum()) for column, (sums, tokens) in self._losses.items()}
        routed = self.run.evaluate({self.skill.name: self.domain})[self.skill.name]
        return Existing(losses, routed.entropy, len(self._losses[0][0]))

    def trial(self) -> Trial:
        """Train an expert for some steps, from scratch: one that starts as a copy would gain from more steps alone."""
        return self._trial

    @cached_property
    def _trial(self) -> Trial:
        run, growth = self.run, self.run.config.growth
        rank, alpha = run.rank(self.skill)
        seed = derived_seed(run.config.seed, SeedStream.PROBE_TRIAL, run.state.skill)
        trial = alone.routed_alone(run.base, run.config, Expert(run.model.shapes, rank, alpha, mx.random.key(seed)))
        split, features = alone.pick(self.skill.train, self.study.features, self._taught)
        steps = alone.train_alone(trial, run.config, split, features, growth.probe.steps, seed, run.compiled)
        best, _ = self._losses[self.existing().best]
        return against(best, evaluate.by_piece(trial, self.domain, 1), steps, growth, seed)


def against(best: np.ndarray, trial: tuple[np.ndarray, np.ndarray], steps: int, growth: Growth, seed: int) -> Trial:
    """A trial's summed losses and tokens by document, float64 [n] each, against the best existing sums [n]: the gain and
    its bootstrap interval over documents."""
    sums, tokens = trial
    draws = resampled_totals(np.stack([best - sums, tokens]), growth.bootstrap, np.random.default_rng(seed))
    tail = (1 - growth.confidence) / 2
    low, high = np.quantile(draws[0] / draws[1], [tail, 1 - tail])
    gain = float((best - sums).sum() / tokens.sum())
    return Trial(float(sums.sum() / tokens.sum()), gain, (float(low), float(high)), steps)
