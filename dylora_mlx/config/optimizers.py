"""Options of each optimizer, as mlx-lm's optimizer_config has them: one section for each, under its name."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from dylora_mlx.config.checks import require, require_finite

OptimizerName = Literal["adamw", "adam", "adafactor", "lion", "muon", "sgd"]


def _check_betas(betas: list[float]) -> None:
    require(
        len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
        f"betas: {betas} is not a list of two numbers from 0 to below 1",
    )


def _check_fraction(section: Any, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        require(0 <= value < 1, f"{name}: {value} is not between 0 and 1")


@dataclass(frozen=True)
class AdamConfig:
    """Adam and AdamW (Kingma and Ba 2015; Loshchilov and Hutter 2019)."""

    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    """Decay of the running means of the gradient and of its square, two numbers from 0 to below 1."""
    eps: float = 1e-8
    """Added to the root of the mean square that the update is divided by, at least 0."""

    def __post_init__(self) -> None:
        require_finite(self)
        _check_betas(self.betas)
        require(self.eps >= 0, f"eps: {self.eps} is below 0")


@dataclass(frozen=True)
class AdafactorConfig:
    """Adafactor (Shazeer and Stern 2018). The learning rate is training.learning_rate, under training.lr_schedule."""

    decay_rate: float = -0.8
    """Exponent of the step in the decay of the running mean squares, 1 - step^decay_rate; below 0."""
    clip_threshold: float = 1.0
    """Root mean square that the update of one factor is clipped to, above 0."""
    beta_1: float | None = None
    """Decay of a running mean of the updates, from 0 to below 1. null: none, which saves its memory."""
    scale_parameter: bool = False
    """Multiply the learning rate by the root mean square of the factor, at least by 0.001. A factor B starts from zero
    and so at 0.001: raise training.learning_rate with it."""

    def __post_init__(self) -> None:
        require_finite(self)
        require(self.decay_rate < 0, f"decay_rate: {self.decay_rate} is not below 0")
        require(self.clip_threshold > 0, f"clip_threshold: {self.clip_threshold} is not above 0")
        if self.beta_1 is not None:
            _check_fraction(self, "beta_1")


@dataclass(frozen=True)
class LionConfig:
    """Lion (Chen et al. 2023)."""

    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    """Weight of the momentum in the update, and decay of the momentum, two numbers from 0 to below 1."""

    def __post_init__(self) -> None:
        _check_betas(self.betas)


@dataclass(frozen=True)
class MuonConfig:
    """Muon (Jordan et al. 2024)."""

    momentum: float = 0.95
    """Decay of the running mean of the gradient, from 0 to below 1."""
    nesterov: bool = True
    """Nesterov momentum."""
    ns_steps: int = 5
    """Newton-Schulz iterations that make the update orthogonal, from 1 to 20."""

    def __post_init__(self) -> None:
        require_finite(self)
        _check_fraction(self, "momentum")
        require(1 <= self.ns_steps <= 20, f"ns_steps: {self.ns_steps} is not between 1 and 20")


@dataclass(frozen=True)
class SGDConfig:
    """Stochastic gradient descent."""

    momentum: float = 0.0
    """Weight of the previous update, from 0 to below 1."""
    dampening: float = 0.0
    """Share by which the gradient is reduced in the momentum, from 0 to below 1."""
    nesterov: bool = False
    """Nesterov momentum. Needs a momentum above 0 and no dampening."""

    def __post_init__(self) -> None:
        require_finite(self)
        _check_fraction(self, "momentum", "dampening")
        require(
            not self.nesterov or (self.momentum > 0 and self.dampening == 0),
            "nesterov: needs a momentum above 0 and a dampening of 0",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """Options of the optimizers by name. Only those of the optimizer that training.optimizer names may be set."""

    adamw: AdamConfig = field(default_factory=AdamConfig)
    adam: AdamConfig = field(default_factory=AdamConfig)
    adafactor: AdafactorConfig = field(default_factory=AdafactorConfig)
    lion: LionConfig = field(default_factory=LionConfig)
    muon: MuonConfig = field(default_factory=MuonConfig)
    sgd: SGDConfig = field(default_factory=SGDConfig)

    def check_only(self, optimizer: OptimizerName) -> None:
        """Raise ValueError if an option of another optimizer is set: it would have no effect."""
        for entry in fields(self):
            unset = getattr(self, entry.name) == type(getattr(self, entry.name))()
            require(
                unset or entry.name == optimizer,
                f"optimizer_config.{entry.name}: the optimizer is {optimizer}; leave it out, or set training.optimizer: {entry.name}",
            )
