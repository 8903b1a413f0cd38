"""Evidence on arrivals for policies that request it: held-out losses of existing experts and of a trial expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx.config import Config, GrowthConfig
from dylora_mlx.data.stream import Split
from dylora_mlx.growth.decide.policy import ExistingLosses, Situation, TrialResult
from dylora_mlx.growth.novelty.measure import Novelty
from dylora_mlx.growth.pool import Pool
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.model.kernels import numerics
from dylora_mlx.training.skill import probe, solo
from dylora_mlx.training.step.domains import Domain, make_domains
from dylora_mlx.training.step.evaluate import losses_by_segment
from novelty.means import SOURCE, Encoder
from novelty.streams import Part

Texts = Callable[[], Sequence[str]]
"""Returns the documents of a skill."""

NEAREST = 3
"""Number of measured experts: those of the skills most similar to the arrival."""
STEPS = 24
"""Training steps of a skill's expert, as many as a run makes on a skill of this size."""


class TrainingDocuments(NamedTuple):
    """Documents that an expert is trained on."""

    part: Part
    texts: Texts
    """Returns the documents of the part."""


class Lab:
    """Trains experts, once per part across all streams."""

    def __init__(self, encoder: Encoder, growth: GrowthConfig):
        self.encoder, self.growth = encoder, growth
        self.config = Config(skills=[SOURCE], growth=growth)
        self._experts: dict[Part, RoutedDecoder] = {}

    def expert(self, trained_on: TrainingDocuments) -> RoutedDecoder:
        """Return a model with the expert of a part alone, which is trained on first use."""
        if trained_on.part not in self._experts:
            self._experts[trained_on.part] = self.trained(trained_on.texts(), STEPS, len(self._experts))
        return self._experts[trained_on.part]

    def arrived(
        self, novelty: Novelty, texts: Sequence[str], trained_on: Mapping[str, TrainingDocuments], seed: int
    ) -> tuple[Situation, ArrivalEvidence]:
        """Return a policy's situation and evidence, which measures only the experts of the NEAREST skills."""
        ranked = sorted(novelty.similarities, key=lambda name: -novelty.similarities[name])
        names = [name for name in ranked if name in trained_on][:NEAREST]
        expert_ids = {name: expert_id for expert_id, name in enumerate(names, 1)}
        experts_of = {name: expert_ids.get(name, 0) for name in novelty.similarities}
        tokens = sum(piece.positions for piece in self.encoder.pieces(texts))
        situation = Situation("arrival", novelty, tokens, experts_of, len(trained_on), None, seed)
        return situation, ArrivalEvidence(self, texts, {expert_ids[name]: trained_on[name] for name in names}, seed)

    def parameters(self) -> int:
        """Return the number of parameters of an expert."""
        return Pool(self.encoder.model).expert_parameters(self.config.model.rank)

    def trained(self, texts: Sequence[str], steps: int, seed: int) -> RoutedDecoder:
        """Train a new expert on some documents; return a model with it alone."""
        model = self.config.model
        expert = Expert(self.encoder.model.shapes, model.rank, model.alpha, mx.random.key(seed))
        solo_model = solo.solo_model(self.encoder.base, self.config, expert)
        segments = self.encoder.pieces(texts)
        solo.train_solo(
            solo_model, self.config, Split(segments, len(segments)), None, steps, seed, not numerics.on_cpu()
        )
        return solo_model


class ArrivalEvidence:
    """Evidence on one arrival: implements the package's Evidence protocol.

    Half of the documents train the trial expert, the other half is held out.

    Args:
        lab: Trains the experts.
        texts: Documents of the arrival.
        experts: Documents that each existing expert was trained on, by expert_id.
        seed: Seed of the division and of the trial.
    """

    def __init__(self, lab: Lab, texts: Sequence[str], experts: Mapping[int, TrainingDocuments], seed: int):
        self.lab, self.experts, self.seed = lab, experts, seed
        order: list[int] = np.random.default_rng([seed, 1]).permutation(len(texts)).tolist()
        half = (len(texts) + 1) // 2
        self._trial_texts = [texts[i] for i in order[:half]]
        self._held_out_texts = [texts[i] for i in order[half:]]

    @cached_property
    def _held_out(self) -> Domain:
        segments = self.lab.encoder.pieces(self._held_out_texts)
        domain = make_domains({"arrival": Split(segments, len(segments))}, self.lab.config.data.max_seq_length, 1)[
            "arrival"
        ]
        domain.batches = domain.batches[: self.lab.growth.probe.rows]
        return domain

    @cached_property
    def _measured(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        losses = {0: losses_by_segment(self.lab.encoder.model, self._held_out, 0)}
        for expert_id, trained_on in self.experts.items():
            losses[expert_id] = losses_by_segment(self.lab.expert(trained_on), self._held_out, 1)
        return losses

    def existing(self) -> ExistingLosses:
        """Return the held-out losses of the base and of the measured experts."""
        losses = {expert_id: float(sums.sum() / tokens.sum()) for expert_id, (sums, tokens) in self._measured.items()}
        return ExistingLosses(losses, 0.0, len(self._measured[0][0]))

    def trial(self) -> TrialResult:
        """Return the result of a trial expert after `growth.probe.steps` steps."""
        return self.reached(self.lab.growth.probe.steps)

    def reached(self, steps: int) -> TrialResult:
        """Return the result of a trial expert after this number of steps."""
        model = self.lab.trained(self._trial_texts, steps, self.seed)
        best = self._measured[self.existing().best][0]
        return probe.compare_trial(best, losses_by_segment(model, self._held_out, 1), steps, self.lab.growth, self.seed)
