"""What every method is given, and what it gives back: the same base, stream, steps, rows and parameters."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx.config import Config
from dylora_mlx.data import stream
from dylora_mlx.data.stream import BatchPlan, Skill, Split
from dylora_mlx.growth.library import Library
from dylora_mlx.growth.pool import Pool
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.model.kernels import numerics
from dylora_mlx.training.skill.prefetch import Prefetcher
from dylora_mlx.training.step.evaluate import Domain, make_domains

Row = dict[str, float]
"""Loss in nats a token by domain."""


class Result(NamedTuple):
    """What a method reached.

    matrix: validation losses, first the base's, then after each skill of the stream in its order (a method that learns
    everything at once has the same losses after every skill); test: test losses at the end; parameters: of all adapters;
    steps: optimisation steps; tokens: learned in them; seconds: that training took; routing: share of validation tokens
    whose largest gate is their skill's own, by skill, and validation losses at the end with every token on that expert,
    where a method routes.
    """

    matrix: list[Row]
    test: Row
    parameters: int
    steps: int
    tokens: int
    seconds: float
    routing: Row | None = None
    own: Row | None = None


@dataclass
class Bench:
    """One stream in one order, for one seed.

    skills: in order of arrival; known: what the base knows already, a domain that nobody learns: base retention is
    measured on it; experts: how many experts our own method would have, which gives the budget of adapter parameters;
    owners: the number of the expert (from 0) of each skill.
    """

    base: Base
    config: Config
    skills: list[Skill]
    known: Skill
    seed: int
    owners: dict[str, int]
    base_rows: dict[str, Row] = field(default_factory=dict)
    """Losses of the base alone by split, once they are measured."""
    _domains: dict[str, dict[str, Domain]] = field(default_factory=dict)

    @classmethod
    def of(cls, base: Base, config: Config, owners: dict[str, int], seed: int) -> Bench:
        """Read the skills of a config. Raises UserError for data that cannot be read."""
        assert config.growth.base_skill is not None
        known, *skills = (
            stream.prepare_skill(source, config.data, base.tokenizer, seed)
            for source in (config.growth.base_skill, *config.skills)
        )
        return cls(base, replace(config, seed=seed), skills, known, seed, owners)

    @property
    def experts(self) -> int:
        return 1 + max(self.owners.values())

    @property
    def compiled(self) -> bool:
        return not numerics.on_cpu()

    @property
    def names(self) -> list[str]:
        """Of the skills, in order of arrival."""
        return [skill.name for skill in self.skills]

    def domains(self, split: str) -> dict[str, Domain]:
        """`validation` or `test` rows of every skill and of what the base knows, made once."""
        if split not in self._domains:
            parts = {skill.name: getattr(skill, split) for skill in (self.known, *self.skills)}
            shape = (self.config.data.max_seq_length, self.config.training.batch_size, self.compiled)
            self._domains[split] = make_domains(parts, *shape)
        return self._domains[split]

    def model(self) -> RoutedDecoder:
        """The base without any expert."""
        return RoutedDecoder(self.base, self.config.model.projections, self.config.model.router_layer)

    def budget(self) -> int:
        """Rank of one adapter with as many parameters as all of our experts."""
        return self.config.model.rank * self.experts

    def parameters(self, rank: int) -> int:
        """Of an adapter of this rank."""
        return Pool(self.model()).expert_parameters(rank)

    def steps(self, skill: Skill) -> int:
        """Optimisation steps of a skill, the same for every method."""
        steps = len(self.plan(skill.train, 0))
        return min(steps, self.config.training.max_steps or steps)

    def plan(self, split: Split, number: int, epochs: int | None = None) -> BatchPlan:
        """The order of some documents; number: a seed of its own for each purpose."""
        training = self.config.training
        size = (epochs or training.epochs, training.batch_size, training.grad_accumulation_steps)
        seed = int(np.random.default_rng([self.seed, 20, number]).integers(2**31))
        return BatchPlan.plan(split, self.config.data, *size, seed, fixed=self.compiled)

    def lasting(self, split: Split, number: int, steps: int) -> BatchPlan:
        """The order of some documents for at least so many steps: passes are added until there are enough."""
        epochs = self.config.training.epochs
        while len(plan := self.plan(split, number, epochs)) < steps:
            epochs += 1
        return plan

    def expert(self, rank: int, number: int) -> Expert:
        """A new adapter of this rank, with the scale alpha / r of our own experts; number: a seed of its own."""
        model = self.config.model
        seed = int(np.random.default_rng([self.seed, 21, number]).integers(2**31))
        return Expert(self.model().shapes, rank, model.alpha / model.rank * rank, mx.random.key(seed))

    def feed(self, plan: BatchPlan, window: int) -> Prefetcher:
        """The work of each step of a plan, put on the device one step ahead; nothing is rehearsed."""
        return Prefetcher(plan, None, Library(""), 1, self.seed, 0, window)


def owners(config: Config, same: list[str]) -> dict[str, int]:
    """The number of the expert of each skill: skills that are one share it."""
    names = [skill.name for skill in config.skills]
    leader = {name: group.split(",")[0] for group in same for name in group.split(",")}
    leaders = [leader.get(name, name) for name in names]
    order = list(dict.fromkeys(leaders))
    return {name: order.index(lead) for name, lead in zip(names, leaders, strict=True)}


def ordered(config: Config, order: int) -> Config:
    """The config with its skills in one of the orders; 0 is its own."""
    places = (
        range(len(config.skills)) if order == 0 else np.random.default_rng([30, order]).permutation(len(config.skills))
    )
    return replace(config, skills=[config.skills[i] for i in places])


def joined(skills: Sequence[Skill]) -> Split:
    """The training documents of several skills as one split; their numbers keep apart."""
    pieces, first = [], 0
    for skill in skills:
        pieces += [piece._replace(document=first + piece.document) for piece in skill.train.segments]
        first += skill.train.num_documents
    return Split(pieces, first)


class Clock:
    """Seconds of what is within `with`, summed."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._since
