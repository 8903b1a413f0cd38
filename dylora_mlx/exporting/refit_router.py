"""Refit the router to the final states of single tokens.

X-LoRA cannot represent a router that reads a layer's input or the document mean. The refitted gate replaces it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx.config import Config
from dylora_mlx.data.packing import Segment
from dylora_mlx.growth.feature_statistics import FeatureScale
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.routing import document_mean, logistic, router
from dylora_mlx.model.routing.logistic import Problem
from dylora_mlx.model.routing.router import Gate
from dylora_mlx.run.run_folder import OpenedRun
from dylora_mlx.system.seeds import SeedStream, generator
from dylora_mlx.training.skill.base_pass import base_states

STEPS = 300
"""Full-batch Adam steps of the fit."""
PENALTY = 3e-4
"""L2 penalty of the fit, for features of unit variance."""
POSITIONS = 8192
"""Token positions of each skill that the gate is fitted to."""


class RefittedRouter(NamedTuple):
    """A refitted gate, and its agreement with the original on held-out text."""

    gate: Gate
    """The gate over final states. The run's final temperature is part of its rows."""
    same: float
    """Share of positions with the same top-1 expert, 0 to 1."""
    divergence: float
    """Mean Kullback-Leibler divergence from the original's gates, in nats."""


def refit_router(run: OpenedRun) -> RefittedRouter:
    """Distil the run's router into a linear gate over final states, on the training text of all its skills.

    Targets are the original's dense gates (Hinton et al. 2015, "Distilling the knowledge in a neural network"). Raises
    UserError if a skill's data was not kept and is no longer available, or if it changed.
    """
    train_states, validation_states = [], []
    base_skill = run.config.growth.base_skill
    for skill in run.read_sources([*([base_skill] if base_skill else []), *run.config.skills]):
        train_states.append(_states(run.config, run.model, skill.train.segments))
        validation_states.append(_states(run.config, run.model, skill.validation.segments))
    gate = _fit([final for final, _ in train_states], [target for _, target in train_states])
    final, target = (mx.array(np.concatenate(parts)) for parts in zip(*validation_states, strict=True))
    logits = router.logits(final, gate)
    log_gates = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    # The floor keeps the log finite where a target gate underflows to 0.
    divergence = (target * (mx.log(mx.maximum(target, 1e-9)) - log_gates)).sum(-1).mean()
    same = np.mean(np.array(logits.argmax(-1)) == np.array(target.argmax(-1)))
    return RefittedRouter(gate, float(same), float(np.array(divergence)))


def _states(config: Config, model: RoutedDecoder, segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
    """Return final states float32 [n, D] and the original's dense gates [n, E] at the same n random positions."""
    training, gate = config.training, model.router.gate()
    batches = list(base_states(model, segments, config.data.max_seq_length, training.batch_size))
    final = np.concatenate([part.final for part in batches])
    router_input = np.concatenate(
        [
            document_mean.mix_document_mean_packed(part.features, part.batch.segment_ids, model.document_mean)
            for part in batches
        ]
    )
    positions = generator(config.seed, SeedStream.REFIT_ROUTER).permutation(len(final))[:POSITIONS]
    gates = mx.softmax(
        router.logits(mx.array(router_input[positions]), gate) / config.growth.final_temperature, axis=-1
    )
    return final[positions], np.array(gates)


def _fit(states: list[np.ndarray], targets: list[np.ndarray]) -> Gate:
    """Fit a gate by minimising the cross-entropy with the targets. Every skill has the same weight.

    Args:
        states: final states float32 [n, D] of each skill.
        targets: dense gates [n, E] of each skill.
    """
    features, target = np.concatenate(states), mx.array(np.concatenate(targets))
    position_weight = mx.array(np.concatenate([np.full(len(s), 1 / len(s) / len(states), np.float32) for s in states]))
    scale = FeatureScale(features.mean(0), features.std(0) + 1e-6)
    start = Gate(mx.zeros((target.shape[1], features.shape[1])), mx.zeros((target.shape[1],)))
    inputs = mx.array(scale.standardised(features))
    (gate,) = logistic.fit_rows(Problem.of_all(inputs, target, position_weight), start, [PENALTY], STEPS)
    return scale.for_raw(gate)
