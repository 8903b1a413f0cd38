"""The two optimizers, of the experts and of the router, and the rate that both follow."""

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
    """AdamW for the experts and for the router, each with its own learning rate. The router's rows are one array here: an
    update of hundreds of small ones takes longer than a small step."""

    experts: optim.AdamW
    router: optim.AdamW

    @property
    def state(self) -> list[Any]:
        return [self.experts.state, self.router.state]

    def init(self, model: RoutedDecoder) -> None:
        """Make room for new parameters; moments that exist are kept."""
        self.experts.init({"experts": trainable_parameters(model)})
        gate = model.router.gate()._asdict()
        self.router.state = _padded(self.router.state, gate)
        self.router.init(gate)

    def grow_moments(self, model: RoutedDecoder) -> None:
        """Make room for an expert's new ranks: their moments are zero, all others are kept."""
        self.experts.state = _padded(self.experts.state, {"experts": trainable_parameters(model)})

    def drop_moments(self, expert_id: int) -> None:
        """Drop the moments of a frozen expert, twice its size; it starts with new ones if it learns again."""
        moments = cast(list[dict[str, Any]], self.experts.state.get("experts", []))
        if expert_id <= len(moments):
            moments[expert_id - 1] = {}

    def set_learning_rates(self, factor: float, training: TrainingConfig) -> None:
        self.experts.learning_rate = mx.array(training.learning_rate * factor)
        self.router.learning_rate = mx.array(training.router_learning_rate * factor)


def _padded(state: dict[str, Any], parameters: Any) -> dict[str, Any]:
    """An optimizer's state whose moments have the shapes of these parameters, filled up with zeros."""
    shapes = {name: value.shape for name, value in dict(tree_flatten(parameters)).items()}
    moments: dict[str, mx.array] = dict(tree_flatten(state))
    for name, value in moments.items():
        shape = shapes.get(name.rpartition(".")[0], value.shape)
        room = [(0, new - old) for new, old in zip(shape, value.shape, strict=True)]
        moments[name] = mx.pad(value, room) if any(after for _, after in room) else value
    return cast(dict[str, Any], tree_unflatten(list(moments.items())))


def trainable_parameters(model: RoutedDecoder, expert_ids: Collection[int] | None = None) -> list[dict]:
    """The experts' trainable parameters, an empty tree for a frozen one; of these columns only, if they are named: to ask
    hundreds takes longer than a small step."""
    asked = range(1, len(model.experts) + 1) if expert_ids is None else expert_ids
    return [e.trainable_parameters() if expert_id in asked else {} for expert_id, e in enumerate(model.experts, 1)]


def make_optimizers(training: TrainingConfig) -> Optimizers:
    """AdamW (Loshchilov and Hutter 2019). With beta2 = 0.99 an uncorrected first update has Adam's usual size, so an
    expert added late starts like one added early, although the optimizer's step count is shared."""

    def adamw(rate: float) -> optim.AdamW:
        return optim.AdamW(rate, betas=[0.9, 0.99], weight_decay=training.weight_decay)

    return Optimizers(adamw(training.learning_rate), adamw(training.router_learning_rate))


def lr_schedule(step: int, steps: int, training: TrainingConfig) -> float:
    """Share of the peak learning rate at `step` of `steps`: a linear warm-up, then a cosine to lr_min_fraction."""
    warmup = math.ceil(training.lr_warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return training.lr_min_fraction + (1 - training.lr_min_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
