"""The probe's evidence on arrivals of a stream: held-out losses of experts that were trained, and of a trial."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from dylora_mlx.config import Config, Growth
from dylora_mlx.data.stream import Split
from dylora_mlx.growth.policy import Existing, Trial
from dylora_mlx.model import numerics
from dylora_mlx.model.gemma3 import RoutedGemma3
from dylora_mlx.model.lora import Expert
from dylora_mlx.training import alone, evaluate, probe
from novelty.means import SOURCE, Encoder

NEAREST = 3
"""Experts that are measured: those of the skills most like the arrival."""
STEPS = 24
"""Steps that a skill's expert is trained, as many as a skill of this size takes in a run."""


class Lab:
    """Trains experts, each skill's once."""

    def __init__(self, encoder: Encoder, growth: Growth):
        self.encoder, self.growth = encoder, growth
        self.config = Config(skills=[SOURCE], growth=growth)
        self._experts: dict[str, RoutedGemma3] = {}

    def expert(self, name: str, texts: Callable[[], Sequence[str]]) -> RoutedGemma3:
        """The expert of a skill, alone in a model, trained when it is first asked for."""
        if name not in self._experts:
            self._experts[name] = self.trained(texts(), STEPS, len(self._experts))
        return self._experts[name]

    def trained(self, texts: Sequence[str], steps: int, seed: int) -> RoutedGemma3:
        model = self.config.model
        expert = Expert(self.encoder.model.shapes, model.rank, model.alpha, mx.random.key(seed))
        made = alone.routed_alone(self.encoder.base, self.config, expert)
        pieces = self.encoder.pieces(texts)
        alone.train_alone(made, self.config, Split(pieces, len(pieces)), None, steps, seed, not numerics.on_cpu())
        return made


class Arrived:
    """Evidence on one arrival. Its documents are halved: one half trains the trial, the other is held out."""

    def __init__(self, lab: Lab, texts: list[str], experts: dict[int, RoutedGemma3], seed: int):
        self.lab, self.experts, self.seed = lab, experts, seed
        order = np.random.default_rng([seed, 1]).permutation(len(texts))
        self._taught: list[str] = [texts[i] for i in order[: (len(texts) + 1) // 2]]
        pieces = lab.encoder.pieces([texts[i] for i in order[(len(texts) + 1) // 2 :]])
        row, rows = lab.config.data.row_length, lab.growth.probe.rows
        self._held_out = evaluate.domains({"arrival": Split(pieces, len(pieces))}, row, 1)["arrival"]
        self._held_out.batches = self._held_out.batches[:rows]
        self._losses: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _measured(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        if not self._losses:
            models = {0: self.lab.encoder.model, **self.experts}
            self._losses = {c: evaluate.by_piece(m, self._held_out, min(c, 1)) for c, m in models.items()}
        return self._losses

    def existing(self) -> Existing:
        losses = {column: float(sums.sum() / tokens.sum()) for column, (sums, tokens) in self._measured().items()}
        return Existing(losses, 0.0, len(self._measured()[0][0]))

    def trial(self) -> Trial:
        growth = self.lab.growth
        model = self.lab.trained(self._taught, growth.probe.steps, self.seed)
        best = self._measured()[self.existing().best][0]
        return probe.against(best, evaluate.by_piece(model, self._held_out, 1), growth.probe.steps, growth, self.seed)
