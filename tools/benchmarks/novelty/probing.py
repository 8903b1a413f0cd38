"""Evidence on arrivals of a stream, for policies that ask for it: held-out losses of experts that were trained, and of a
trial."""

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
from dylora_mlx.training.step.evaluate import Domain, losses_by_segment, make_domains
from novelty.means import SOURCE, Encoder
from novelty.streams import Part

Texts = Callable[[], Sequence[str]]
"""Reads the documents of a skill."""

NEAREST = 3
"""Experts that are measured: those of the skills most like the arrival."""
STEPS = 24
"""Steps that a skill's expert is trained, as many as a skill of this size takes in a run."""


class Taught(NamedTuple):
    """What an expert was trained on: `part`, whose documents `texts` reads."""

    part: Part
    texts: Texts


class Lab:
    """Trains experts, each part's once, in whatever stream it comes."""

    def __init__(self, encoder: Encoder, growth: GrowthConfig):
        self.encoder, self.growth = encoder, growth
        self.config = Config(skills=[SOURCE], growth=growth)
        self._experts: dict[Part, RoutedDecoder] = {}

    def expert(self, taught: Taught) -> RoutedDecoder:
        """The expert of a part, alone in a model, trained when it is first asked for."""
        if taught.part not in self._experts:
            self._experts[taught.part] = self.trained(taught.texts(), STEPS, len(self._experts))
        return self._experts[taught.part]

    def arrived(
        self, seen: Novelty, texts: Sequence[str], taught: Mapping[str, Taught], seed: int
    ) -> tuple[Situation, Arrived]:
        """A policy's situation and evidence on an arrival: measured are the experts of the NEAREST skills that have one."""
        ranked = sorted(seen.similarities, key=lambda name: -seen.similarities[name])
        names = [name for name in ranked if name in taught][:NEAREST]
        expert_ids = {name: expert_id for expert_id, name in enumerate(names, 1)}
        experts_of = {name: expert_ids.get(name, 0) for name in seen.similarities}
        tokens = sum(piece.positions for piece in self.encoder.pieces(texts))
        situation = Situation("arrival", seen, tokens, experts_of, len(taught), None, seed)
        return situation, Arrived(self, texts, {expert_ids[name]: taught[name] for name in names}, seed)

    def parameters(self) -> int:
        """Parameters of an expert."""
        return Pool(self.encoder.model).expert_parameters(self.config.model.rank)

    def trained(self, texts: Sequence[str], steps: int, seed: int) -> RoutedDecoder:
        model = self.config.model
        expert = Expert(self.encoder.model.shapes, model.rank, model.alpha, mx.random.key(seed))
        made = solo.solo_model(self.encoder.base, self.config, expert)
        pieces = self.encoder.pieces(texts)
        solo.train_solo(made, self.config, Split(pieces, len(pieces)), None, steps, seed, not numerics.on_cpu())
        return made


class Arrived:
    """Evidence on one arrival. Its documents are halved: one half trains the trial, the other is held out.

    experts: what those at hand were trained on, by column.
    """

    def __init__(self, lab: Lab, texts: Sequence[str], experts: Mapping[int, Taught], seed: int):
        self.lab, self.experts, self.seed = lab, experts, seed
        order: list[int] = np.random.default_rng([seed, 1]).permutation(len(texts)).tolist()
        half = (len(texts) + 1) // 2
        self._taught = [texts[i] for i in order[:half]]
        self._kept = [texts[i] for i in order[half:]]

    @cached_property
    def _held_out(self) -> Domain:
        pieces = self.lab.encoder.pieces(self._kept)
        found = make_domains({"arrival": Split(pieces, len(pieces))}, self.lab.config.data.max_seq_length, 1)["arrival"]
        found.batches = found.batches[: self.lab.growth.probe.rows]
        return found

    @cached_property
    def _measured(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        found = {0: losses_by_segment(self.lab.encoder.model, self._held_out, 0)}
        for expert_id, taught in self.experts.items():
            found[expert_id] = losses_by_segment(self.lab.expert(taught), self._held_out, 1)
        return found

    def existing(self) -> ExistingLosses:
        losses = {expert_id: float(sums.sum() / tokens.sum()) for expert_id, (sums, tokens) in self._measured.items()}
        return ExistingLosses(losses, 0.0, len(self._measured[0][0]))

    def trial(self) -> TrialResult:
        return self.reached(self.lab.growth.probe.steps)

    def reached(self, steps: int) -> TrialResult:
        """What an expert reaches after so many steps."""
        model = self.lab.trained(self._taught, steps, self.seed)
        best = self._measured[self.existing().best][0]
        return probe.compare_trial(best, losses_by_segment(model, self._held_out, 1), steps, self.lab.growth, self.seed)
