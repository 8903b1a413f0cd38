"""A gate over the final states of single tokens in place of one that taps an inner layer or reads the document so far, so that
formats which know neither can hold it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from dylora_mlx.config import Config
from dylora_mlx.data import stream
from dylora_mlx.data.packing import Segment
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.routing import document_mean, router
from dylora_mlx.model.routing.router import Gate
from dylora_mlx.run.run_folder import OpenedRun
from dylora_mlx.system.seeds import SeedStream, generator
from dylora_mlx.training.skill.base_pass import base_states
from dylora_mlx.training.skill.fit_router import DECAY, RATE

STEPS = 300
POSITIONS = 8192
"""Of each skill, that the gate is fitted to."""


class RefittedRouter(NamedTuple):
    """The gate, and how far it agrees on held-out text: share of positions with the same first expert, and the mean
    Kullback-Leibler divergence from the original's gates in nats."""

    gate: Gate
    same: float
    divergence: float


def refit_router(run: OpenedRun) -> RefittedRouter:
    """Fit a linear gate over final states to what the run's own gate says of the training text of all its skills
    (Hinton et al. 2015, "Distilling the knowledge in a neural network"). Raises UserError where the data is gone."""
    learned, held_out = [], []
    known = run.config.growth.base_skill
    for source in (*([known] if known else []), *run.config.skills):
        skill = stream.prepare_skill(source, run.config.data, run.base.tokenizer, run.config.seed)
        learned.append(_states(run.config, run.model, skill.train.segments))
        held_out.append(_states(run.config, run.model, skill.validation.segments))
    gate = _fit([final for final, _ in learned], [target for _, target in learned])
    final, target = (mx.array(np.concatenate(parts)) for parts in zip(*held_out, strict=True))
    found = router.logits(final, gate)
    log = found - mx.logsumexp(found, axis=-1, keepdims=True)
    divergence = (target * (mx.log(mx.maximum(target, 1e-9)) - log)).sum(-1).mean()
    same = np.mean(np.array(found.argmax(-1)) == np.array(target.argmax(-1)))
    return RefittedRouter(gate, float(same), float(np.array(divergence)))


def _states(config: Config, model: RoutedDecoder, pieces: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
    """Final states float32 [n, D] and the original's dense gates [n, E] at the same positions, drawn at random."""
    training, gate = config.training, model.router.gate()
    parts = list(base_states(model, pieces, config.data.max_seq_length, training.batch_size))
    final = np.concatenate([part.final for part in parts])
    share = model.document_mean_weight
    tapped = np.concatenate(
        [document_mean.mix_document_mean_packed(part.features, part.batch.segment_ids, share) for part in parts]
    )
    chosen = generator(config.seed, SeedStream.REFIT_ROUTER).permutation(len(final))[:POSITIONS]
    gates = mx.softmax(router.logits(mx.array(tapped[chosen]), gate) / config.growth.final_temperature, axis=-1)
    return final[chosen], np.array(gates)


def _fit(states: list[np.ndarray], targets: list[np.ndarray]) -> Gate:
    """Minimise the cross-entropy with the targets, every skill counting alike."""
    features, target = np.concatenate(states), mx.array(np.concatenate(targets))
    each = mx.array(np.concatenate([np.full(len(s), 1 / len(s) / len(states), np.float32) for s in states]))
    centre, spread = features.mean(0), features.std(0) + 1e-6
    x = mx.array((features - centre) / spread)
    parameters = {"weight": mx.zeros((target.shape[1], features.shape[1])), "bias": mx.zeros((target.shape[1],))}

    def loss(p: dict[str, mx.array]) -> mx.array:
        logits = x @ p["weight"].T + p["bias"]
        error = mx.logsumexp(logits, axis=-1) - (target * logits).sum(-1)
        return (error * each).sum() + DECAY * mx.square(p["weight"]).sum()

    adam = optim.Adam(RATE)
    for step in range(STEPS):
        adam.learning_rate = mx.array(RATE * (1 - step / STEPS))
        parameters = adam.apply_gradients(mx.grad(loss)(parameters), parameters)
        mx.eval(parameters, adam.state)
    weight = parameters["weight"] / mx.array(spread)
    return Gate(weight, parameters["bias"] - weight @ mx.array(centre))
