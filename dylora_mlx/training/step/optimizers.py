"""The optimizers of experts and router, and their learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from dylora_mlx.config import TrainingConfig
from dylora_mlx.config.optimizers import OptimizerName
from dylora_mlx.model.decoder.decoder import RoutedDecoder

OPTIMIZERS: dict[OptimizerName, Callable[..., optim.Optimizer]] = {
    "adamw": optim.AdamW,
    "adam": optim.Adam,
    "adafactor": optim.Adafactor,
    "lion": optim.Lion,
    "muon": optim.Muon,
    "sgd": optim.SGD,
}
"""Optimizers of the experts by their names in mlx-lm."""
WEIGHT_DECAY: dict[OptimizerName, float] = {"adamw": 0.01, "muon": 0.01, "lion": 0.0, "adafactor": 0.0, "sgd": 0.0}
"""Weight decay under training.weight_decay auto: the default of mlx.optimizers. Adam is missing, it takes none."""


class Optimizers(NamedTuple):
    """The optimizer of the experts and an AdamW for the router, each with its own peak learning rate.

    The router's rows are stacked into one array for the update: updating hundreds of small arrays takes longer than a
    small training step.
    """

    experts: optim.Optimizer
    router: optim.AdamW
    loraplus_lr_ratio: float = 1.0
    """Learning rate of the factors B over that of the factors A."""

    @property
    def state(self) -> list[Any]:
        """State trees of both optimizers: moments, step count, learning rate."""
        return [self.experts.state, self.router.state]

    def init(self, model: RoutedDecoder) -> None:
        """Create new moments for new parameters and router rows; existing moments are kept."""
        trainable = trainable_parameters(model)
        known = cast(list[dict[str, Any]], self.experts.state.get("experts", []))
        is_new = (bool(tree_flatten(e)) and not tree_flatten(known[i : i + 1]) for i, e in enumerate(trainable))
        if isinstance(self.experts, optim.Adafactor) and any(is_new):
            # The step sets how fast its mean squares follow: those of a new expert begin like those of the first.
            self.experts.state["step"] = mx.array(0, mx.uint64)
        self.experts.init({"experts": trainable})
        gate = model.router.gate()._asdict()
        self.router.state = _pad_moments(self.router, gate)
        self.router.init(gate)

    def grow_moments(self, model: RoutedDecoder) -> None:
        """Extend the moments of an expert whose LoRA rank grew: new for the new ranks, unchanged for the others."""
        self.experts.state = _pad_moments(self.experts, {"experts": trainable_parameters(model)})

    def drop_moments(self, expert_id: int) -> None:
        """Drop the moments of a frozen expert, which take up to twice its size in memory.

        If the expert is trained again, it starts with new moments.
        """
        moments = cast(list[dict[str, Any]], self.experts.state.get("experts", []))
        if expert_id <= len(moments):
            moments[expert_id - 1] = {}

    def updated_experts(self, gradients: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
        """Return the experts' parameters after an update, as a tree like that of `gradients`."""
        updated = self.experts.apply_gradients(gradients, parameters)
        if self.loraplus_lr_ratio == 1:
            return updated
        # The update of every optimizer here is proportional to its learning rate.
        return tree_map_with_path(self._at_own_rate, updated, parameters)

    def _at_own_rate(self, path: str, new: mx.array, old: mx.array) -> mx.array:
        return old + self.loraplus_lr_ratio * (new - old) if path.endswith("lora_b") else new

    def set_learning_rates(self, factor: float, training: TrainingConfig) -> None:
        """Set both learning rates to `factor` times their peak, as arrays, so that a compiled step is not retraced."""
        self.experts.learning_rate = mx.array(training.learning_rate * factor)
        self.router.learning_rate = mx.array(training.router_learning_rate * factor)


def _pad_moments(optimizer: optim.Optimizer, parameters: Any) -> dict[str, Any]:
    """Return an optimizer's state whose moments are padded at the end of each axis to what `parameters` need.

    Moments with the shape of their parameter are padded with zeros. Adafactor's mean squares of rows and columns are padded
    with their mean: zeros would make the first updates of a new rank as large as its clipping allows.
    """
    moments: dict[str, mx.array] = dict(tree_flatten(optimizer.state))
    owners = dict(tree_flatten(parameters))
    for name, value in moments.items():
        # A moment is named after its parameter plus one part, as in "weight.m"; other entries are left alone.
        owner, _, kind = name.rpartition(".")
        if owner not in owners:
            continue
        fresh: dict[str, mx.array] = {}
        optimizer.init_single(owners[owner], fresh)
        padding = [(0, new - old) for new, old in zip(fresh[kind].shape, value.shape, strict=True)]
        fill = 0.0 if value.ndim == owners[owner].ndim else value.mean()
        moments[name] = mx.pad(value, padding, constant_values=fill) if any(after for _, after in padding) else value
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
    """Create the optimizer that training.optimizer names for the experts, and the AdamW of the router.

    All experts share the optimizer's step count, so bias correction would be wrong for an expert added late. Without
    it, beta1 = 0.9 and beta2 = 0.99 give a first update of Adam's usual size at any time:
    (1 - beta1) / sqrt(1 - beta2) = 1.
    """
    name, decay = training.optimizer, training.weight_decay
    options = asdict(getattr(training.optimizer_config, name))
    if name in WEIGHT_DECAY:
        options["weight_decay"] = WEIGHT_DECAY[name] if isinstance(decay, str) else decay
    if name == "adafactor":
        options["relative_step"] = False  # the learning rate follows training.lr_schedule
    router_decay = WEIGHT_DECAY["adamw"] if isinstance(decay, str) else decay
    return Optimizers(
        OPTIMIZERS[name](training.learning_rate, **options),
        optim.AdamW(training.router_learning_rate, betas=[0.9, 0.99], weight_decay=router_decay),
        training.loraplus_lr_ratio,
    )


def moments_per_parameter(training: TrainingConfig) -> int:
    """Return the number of moments that the experts' optimizer keeps of each parameter.

    Adafactor's mean squares of rows and columns are left out: their size is that of one LoRA rank.
    """
    if training.optimizer == "adafactor":
        return int(training.optimizer_config.adafactor.beta_1 is not None)
    return 2 if training.optimizer in ("adamw", "adam") else 1


def lr_schedule(step: int, steps: int, training: TrainingConfig) -> float:
    """Return the learning rate at `step` of `steps` as a fraction of its peak.

    The scheduler: linear warm-up over lr_warmup_fraction of the steps, then the decay that training.lr_schedule names.
    """
    warmup = math.ceil(training.lr_warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    name, lowest, after, total = training.lr_schedule, training.lr_min_fraction, step - warmup, max(1, steps - warmup)
    if name == "constant":
        return 1.0
    if name in ("exponential_decay", "step_decay"):
        size = training.lr_step_size or 1
        rate = training.lr_decay_rate or lowest ** (1 / max(1, (total - 1) // size))
        return max(lowest, rate ** (after // size))
    progress = after / total
    decay = 1 - progress if name == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return lowest + (1 - lowest) * decay
