"""A run: what it works with, and the few things that every part of it asks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import mlx.core as mx

from dylora_mlx.config import Config
from dylora_mlx.data.stream import Skill
from dylora_mlx.distributed import group as ranks
from dylora_mlx.growth import phases as maturity
from dylora_mlx.growth.decide.bandit import Bandit
from dylora_mlx.growth.decide.decision_log import Ledger
from dylora_mlx.growth.library import Library
from dylora_mlx.growth.novelty.embedding import Reference, Space
from dylora_mlx.growth.phases import Schedule
from dylora_mlx.growth.pool import Pool
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.experts import autotune as crossover
from dylora_mlx.model.routing.router import Routing
from dylora_mlx.system.files import FolderLock
from dylora_mlx.training.checkpoint.state import State
from dylora_mlx.training.metrics.recorder import Recorder
from dylora_mlx.training.metrics.timers import Clock
from dylora_mlx.training.step.evaluate import Domain, Evaluation, Measure, evaluate, evaluate_all
from dylora_mlx.training.step.optimizers import Optimizers, make_optimizers


class Ranks(NamedTuple):
    """Rank of a new expert, the largest it may grow to, and alpha / r; without a scale, alpha is the model's option."""

    start: int
    largest: int
    scale: float | None = None


@dataclass
class Run:
    """Everything a run works with, made once by `assembly.assemble`.

    reference, space: where skills are compared; skills: the stream, a split skill's parts in its place; known: the skill that the
    base itself holds; measure: what evaluates, once for all domains; ranks: of new experts; learned: the
    bandit that earlier runs taught, if it is trusted, and why; traced: how often the compiled steps of this process were traced;
    warned: whether it was said that no report can be written; lock: on the folder, while the run goes on; aside: where a rank
    that writes no run folder keeps features and experts; clock: what it has taken; estimate: what it was expected to take, if
    that was asked for (cost/estimate.py).
    """

    config: Config
    folder: Path
    base: Base
    model: RoutedDecoder
    pool: Pool
    library: Library
    reference: Reference
    space: Space
    optimizers: Optimizers
    state: State
    skills: list[Skill]
    known: Skill | None
    domains: dict[str, Domain]
    tests: dict[str, Domain]
    measure: Measure
    ranks: Ranks
    recorder: Recorder | None = None
    decisions: Ledger | None = None
    learned: tuple[Bandit | None, str] = (None, "")
    traced: int = 0
    warned: bool = False
    lock: FolderLock | None = None
    aside: TemporaryDirectory[str] | None = None
    clock: Clock = field(default_factory=Clock)
    estimate: dict[str, Any] | None = None

    @property
    def compiled(self) -> bool:
        """On accelerators only: MLX's CPU backend gains nothing from compiling and would need a C++ compiler."""
        return self.measure.compiled

    @property
    def compilations(self) -> int:
        """Traces of compiled functions so far in this process."""
        return self.traced + self.measure.compilations

    @property
    def features(self) -> Path:
        """Folder of the features that are kept while a skill is learned."""
        return self._own / "features"

    @property
    def experts(self) -> Path:
        """Folder of frozen experts that are not kept in memory, while the run goes on."""
        return self._own / "experts"

    @property
    def _own(self) -> Path:
        """Where this rank writes what it needs while the run goes on."""
        return Path(self.aside.name) if self.aside else self.folder

    @property
    def record(self) -> Recorder:
        assert self.recorder is not None, "a run that was only opened records nothing"
        return self.recorder

    @property
    def ledger(self) -> Ledger:
        assert self.decisions is not None, "a run that was only opened decides nothing"
        return self.decisions

    def release(self, code: int) -> None:
        """Leave the folder to others, and tell W&B how the run ended, if it has not been told."""
        if self.recorder is not None:
            self.recorder.tracker.close(code)
        if self.lock is not None:
            self.lock.release()

    def rank(self, skill: Skill) -> tuple[int, float]:
        """Rank and alpha of a new expert for a skill."""
        source = skill.source
        rank = source.rank or self.ranks.start
        scale = self.ranks.scale
        return rank, source.alpha or (self.config.model.alpha if scale is None else scale * rank)

    def settle_lookup(self) -> None:
        """Measure, once in a run, when looking experts up pays; a run that is resumed goes on with what it measured."""
        state, model = self.state, self.model
        if model.lookup_ratio is None and len(self.pool) > crossover.LEAST:
            if state.lookup_ratio is None:
                first = next(named for named in model.shapes.values() if named)
                tokens = self.config.training.batch_rows * self.config.data.row_length
                dtype = model.base.model.norm.weight.dtype
                shape = next(iter(first.values()))
                measured = crossover.measured(shape, self.config.model.rank, tokens, dtype)
                state.lookup_ratio = ranks.group().first(measured)
            model.lookup_ratio = state.lookup_ratio

    def renew_optimizers(self) -> None:
        """Start the moments anew: the pool's columns are others now."""
        self.optimizers = make_optimizers(self.config.training)
        self.optimizers.init(self.model)

    def evaluate_alone(self, domain: str, column: int) -> Evaluation:
        """A domain's loss with every token sent to one column."""
        return evaluate(self.model, self.domains[domain], Routing(1, mx.array(1.0)), column, measure=self.measure)

    def evaluate(self, domains: dict[str, Domain] | None = None, now: Schedule | None = None) -> dict[str, Evaluation]:
        """Losses of some domains (all of the run's) under a routing (the one when every expert is mature)."""
        now = now or maturity.settled(self.config.growth)
        routing = Routing(now.top_k, mx.array(now.temperature))
        with self.clock.on("evaluations"):
            return evaluate_all(self.measure, self.domains if domains is None else domains, routing)
