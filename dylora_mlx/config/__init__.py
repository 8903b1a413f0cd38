"""All options, declared once as frozen dataclasses, one section per part of the package.

`__post_init__` raises ValueError for an unusable value; the command line prints that as one line. The defaults are the
quickstart's: the embedded base on the available CPU or GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dylora_mlx.config.checks import require
from dylora_mlx.config.evaluation import EvalConfig
from dylora_mlx.config.growth import BanditConfig, BudgetConfig, GrowthConfig, ProbeConfig, RankConfig
from dylora_mlx.config.optimizers import OptimizerConfig
from dylora_mlx.config.source import Source
from dylora_mlx.config.training import (
    ATTENTION,
    CHAT_TEMPLATES,
    MLP,
    DataConfig,
    LogConfig,
    ModelConfig,
    TrainingConfig,
)

__all__ = [
    "ATTENTION", "CHAT_TEMPLATES", "MLP", "BanditConfig", "BudgetConfig", "Config", "DataConfig", "EvalConfig",
    "GrowthConfig", "LogConfig", "ModelConfig", "OptimizerConfig", "ProbeConfig", "RankConfig", "Source", "TrainingConfig",
]  # fmt: skip


@dataclass(frozen=True)
class Config:
    """A whole run: the stream of skills in order, and a section for each part."""

    skills: list[Source]
    """The skills to learn, in order of arrival: a list of sources."""
    domains: list[Source] = field(default_factory=list)
    """Additional domains to evaluate but not to learn: a list of sources. training.early_stop_domain may name one."""
    seed: int = 0
    """Seed of data splits, packing, weight initialization and resampling, from 0 to 2147483647."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    log: LogConfig = field(default_factory=LogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        require(len(self.skills) > 0, "skills: the stream is empty, name at least one skill")
        base_skill = [self.growth.base_skill] if self.growth.base_skill else []
        names = [s.name for s in (*base_skill, *self.skills, *self.domains)]
        for name in names:
            require(names.count(name) == 1, f"skills: two skills or domains are called '{name}'")
        stop = self.training.early_stop_domain
        require(
            stop in ("current", *names),
            f"training.early_stop_domain: '{stop}' is none of current, {', '.join(names)}",
        )
        for name in self.growth.freeze_first if self.growth.freeze_after else []:
            require(name in self.model.projection_names, f"growth.freeze_first: '{name}' is not in model.projections")
        require(
            not self.model.use_rslora or self.growth.rank.schedule is None,
            "model.use_rslora: growth.rank.schedule sets the scale that its experts were measured with; leave one out",
        )
        require(0 <= self.seed < 2**31, f"seed: {self.seed} is not between 0 and {2**31 - 1}")
