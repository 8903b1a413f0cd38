"""The AdamW optimizers of experts and router, and their learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from dylora_mlx.config import TrainingConfig
from dylora_mlx.model.decoder.decoder import RoutedDecoder


class Optimizers(NamedTuple):
    """One AdamW optimizer for the experts and one for the router, each with its own peak learning rate.

    The router's rows are stacked into one array for the update: updating hundreds of small arrays takes longer than a
    small training step.
    """

    experts: optim.AdamW
    router: optim.AdamW

    @property
    def state(self) -> list[Any]:
        """State trees of both optimizers: moments, step count, learning rate."""
        return [self.experts.state, self.router.state]

    def init(self, model: RoutedDecoder) -> None:
        """Create zero moments for new parameters and router rows; existing moments are kept."""
        self.experts.init({"experts": trainable_parameters(model)})
        gate = model.router.gate()._asdict()
        self.router.state = _pad_moments(self.router.state, gate)
        self.router.init(gate)

    def grow_moments(self, model: RoutedDecoder) -> None:
        """Extend the moments of an expert whose LoRA rank grew: zero for the new ranks, unchanged for the others."""
        self.experts.state = _pad_moments(self.experts.state, {"experts": trainable_parameters(model)})

    def drop_moments(self, expert_id: int) -> None:
        """Drop the moments of a frozen expert, which take twice its size in memory.

        If the expert is trained again, it starts with new moments.
        """
        moments = cast(list[dict[str, Any]], self.experts.state.get("experts", []))
        if expert_id <= len(moments):
            moments[expert_id - 1] = {}

    def set_learning_rates(self, factor: float, training: TrainingConfig) -> None:
        """Set both learning rates to `factor` times their peak, as arrays, so that a compiled step is not retraced."""
        self.experts.learning_rate = mx.array(training.learning_rate * factor)
        self.router.learning_rate = mx.array(training.router_learning_rate * factor)


def _pad_moments(state: dict[str, Any], parameters: Any) -> dict[str, Any]:
    """Return an optimizer state whose moments are zero-padded at the end of each axis to the shapes of `parameters`."""
    shapes = {name: value.shape for name, value in dict(tree_flatten(parameters)).items()}
    moments: dict[str, mx.array] = dict(tree_flatten(state))
    for name, value in moments.items():
        # A moment is named after its parameter plus one part, as in "weight.m"; other entries are left alone.
        shape = shapes.get(name.rpartition(".")[0], value.shape)
        padding = [(0, new - old) for new, old in zip(shape, value.shape, strict=True)]
        moments[name] = mx.pad(value, padding) if any(after for _, after in padding) else value
    return cast(dict[str, Any], tree_unflatten(list(moments.items())))


def trainable_parameters(model: RoutedDecoder, expert_ids: Collection[int] | None = None) -> list[dict]:
    """Return the trainable parameters of each expert, an empty tree for a frozen one.

    Args:
        model: The routed model.
        expert_ids: Look at these experts only and return empty trees for all others; None for all experts. Collecting
            the parameters of hundreds of experts takes longer than a small training step.
    """
    selected = range(1, len(model.experts) + 1) if expert_ids is None else expert_ids
    return [e.trainable_parameters() if expert_id in selected else {} for expert_id, e in enumerate(model.experts, 1)]


def make_optimizers(training: TrainingConfig) -> Optimizers:
    """Create the AdamW optimizers (Loshchilov and Hutter 2019) of experts and router.

    All experts share the optimizer's step count, so bias correction would be wrong for an expert added late. Without
    it, beta1 = 0.9 and beta2 = 0.99 give a first update of Adam's usual size at any time:
    (1 - beta1) / sqrt(1 - beta2) = 1.
    """

    def adamw(rate: float) -> optim.AdamW:
        return optim.AdamW(rate, betas=[0.9, 0.99], weight_decay=training.weight_decay)

    return Optimizers(adamw(training.learning_rate), adamw(training.router_learning_rate))


def lr_schedule(step: int, steps: int, training: TrainingConfig) -> float:
    """Return the learning rate at `step` of `steps` as a fraction of its peak.

    The scheduler: linear warm-up over lr_warmup_fraction of the steps, then cosine decay to lr_min_fraction.
    """
    warmup = math.ceil(training.lr_warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return training.lr_min_fraction + (1 - training.lr_min_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
