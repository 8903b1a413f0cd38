"""Inputs and results of the compared methods: all have the same base, stream, steps, rows and adapter parameters."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx.config import Config, EvalConfig
from dylora_mlx.data import stream
from dylora_mlx.data.stream import BatchPlan, Skill, Split
from dylora_mlx.growth.library import Library
from dylora_mlx.growth.pool import Pool
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.model.kernels import numerics
from dylora_mlx.training.skill.prefetch import Prefetcher
from dylora_mlx.training.step.domains import Domain, make_domains

Row = dict[str, float]
"""Loss in nats per token by domain."""


class Result(NamedTuple):
    """Results of a method. Field names are keys of the result files."""

    matrix: list[Row]
    """Validation losses: of the base, then after each skill in the stream's order.

    A method that learns everything at once has the same losses after every skill.
    """
    test: Row
    """Test losses at the end."""
    parameters: int
    """Parameters of all adapters."""
    steps: int
    """Optimizer steps."""
    tokens: int
    """Tokens with a loss in these steps."""
    seconds: float
    """Training time."""
    routing: Row | None = None
    """Share of validation tokens whose largest gate is their skill's expert's, by skill; None without a router."""
    own: Row | None = None
    """Validation losses at the end with every token on its skill's own expert; None if not measured."""
    answers: list[Row] | None = None
    """Accuracy on the test questions of every skill that has options, at the same times as `matrix`; None if not measured."""


@dataclass
class Bench:
    """One stream of skills in one order, for one seed."""

    base: Base
    config: Config
    skills: list[Skill]
    """Skills in order of arrival."""
    known: Skill
    """The base skill, a domain that no method learns; base retention is measured on it."""
    seed: int
    owners: dict[str, int]
    """Index of each skill's expert, from 0. Skills that share an expert have the same owner."""
    num_questions: int = 0
    """Test questions of each skill on which accuracy is measured."""
    base_rows: dict[str, Row] = field(default_factory=dict)
    """Cached losses of the base alone, by split."""
    _domains: dict[str, dict[str, Domain]] = field(default_factory=dict)

    @classmethod
    def of(cls, base: Base, config: Config, owners: dict[str, int], seed: int, num_questions: int = 0) -> Bench:
        """Read the skills of a config, which needs a growth.base_skill. Raises UserError for unreadable data."""
        assert config.growth.base_skill is not None
        known, *skills = (
            stream.prepare_skill(source, config.data, base.tokenizer, seed)
            for source in (config.growth.base_skill, *config.skills)
        )
        # Every method is evaluated on all documents.
        config = replace(config, seed=seed, eval=EvalConfig(tokens=None))
        return cls(base, config, skills, known, seed, owners, num_questions)

    @property
    def experts(self) -> int:
        """Number of experts that our method would have, which sets the budget of adapter parameters."""
        return 1 + max(self.owners.values())

    @property
    def compiled(self) -> bool:
        """Whether steps and evaluations are compiled: on a GPU."""
        return not numerics.on_cpu()

    @property
    def window(self) -> int:
        """Width of the base's sliding-window attention, in tokens."""
        return self.model().window

    @property
    def names(self) -> list[str]:
        """Names of the skills, in order of arrival."""
        return [skill.name for skill in self.skills]

    def domains(self, split: str) -> dict[str, Domain]:
        """Return the `validation` or `test` rows of the base skill and of every skill; cached."""
        if split not in self._domains:
            parts = {skill.name: getattr(skill, split) for skill in (self.known, *self.skills)}
            shape = (self.config.data.max_seq_length, self.config.training.batch_size, self.compiled)
            self._domains[split] = make_domains(parts, *shape)
        return self._domains[split]

    def model(self) -> RoutedDecoder:
        """Return a decoder without experts."""
        return RoutedDecoder(self.base, self.config.model.projection_names, self.config.model.router_layer)

    def budget(self) -> int:
        """Return the rank of one adapter with as many parameters as all experts of our method."""
        return self.config.model.rank * self.experts

    def parameters(self, rank: int) -> int:
        """Return the number of parameters of an adapter of this rank."""
        return Pool(self.model()).expert_parameters(rank)

    def steps(self, skill: Skill) -> int:
        """Return the number of optimizer steps of a skill, the same for every method."""
        steps = len(self.plan(skill.train, 0))
        return min(steps, self.config.training.max_steps or steps)

    def plan(self, split: Split, number: int, epochs: int | None = None) -> BatchPlan:
        """Return the batches of some documents in random order; `number` is part of the seed."""
        training = self.config.training
        size = (epochs or training.epochs, training.batch_size, training.grad_accumulation_steps)
        seed = int(np.random.default_rng([self.seed, 20, number]).integers(2**31))
        return BatchPlan.plan(split, self.config.data, *size, seed, fixed=self.compiled)

    def lasting(self, split: Split, number: int, steps: int) -> BatchPlan:
        """Return batches for at least `steps` steps, adding epochs until there are enough."""
        epochs = self.config.training.epochs
        while len(plan := self.plan(split, number, epochs)) < steps:
            epochs += 1
        return plan

    def expert(self, rank: int, number: int) -> Expert:
        """Return a new adapter of this rank with the alpha / r of our experts; `number` is part of the seed."""
        model = self.config.model
        seed = int(np.random.default_rng([self.seed, 21, number]).integers(2**31))
        return Expert(self.model().shapes, rank, model.alpha / model.rank * rank, mx.random.key(seed))

    def feed(self, plan: BatchPlan, window: int) -> Prefetcher:
        """Return the batches of a plan, prefetched to the device one step ahead, without rehearsal."""
        return Prefetcher(plan, None, Library(""), 1, self.seed, 0, window)


def owners(config: Config, same: list[str]) -> dict[str, int]:
    """Return the index of each skill's expert.

    Args:
        config: The config with the skills.
        same: Groups of skills that share an expert, as comma-separated names.
    """
    names = [skill.name for skill in config.skills]
    leader = {name: group.split(",")[0] for group in same for name in group.split(",")}
    leaders = [leader.get(name, name) for name in names]
    order = list(dict.fromkeys(leaders))
    return {name: order.index(leader_name) for name, leader_name in zip(names, leaders, strict=True)}


def ordered(config: Config, order: int) -> Config:
    """Return the config with its skills in one of the orders; order 0 is the config's."""
    permutation = (
        range(len(config.skills)) if order == 0 else np.random.default_rng([30, order]).permutation(len(config.skills))
    )
    return replace(config, skills=[config.skills[i] for i in permutation])


def joined(skills: Sequence[Skill]) -> Split:
    """Return the training documents of several skills as one split, renumbered to stay distinct."""
    segments, first = [], 0
    for skill in skills:
        segments += [segment._replace(document=first + segment.document) for segment in skill.train.segments]
        first += skill.train.num_documents
    return Split(segments, first)


class Clock:
    """Context manager that sums the seconds spent within its `with` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._since
