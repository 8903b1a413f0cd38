"""A run: what it works with, and the few things that every part of it asks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from dylora_mlx.config import Config
from dylora_mlx.data.stream import Skill
from dylora_mlx.distributed.group import world
from dylora_mlx.growth import phases
from dylora_mlx.growth.decide.bandit import Bandit
from dylora_mlx.growth.decide.decision_log import DecisionLog
from dylora_mlx.growth.library import Library
from dylora_mlx.growth.novelty.embedding import EmbeddingSpace, Reference
from dylora_mlx.growth.phases import RoutingSchedule
from dylora_mlx.growth.pool import Pool
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.experts import autotune
from dylora_mlx.model.routing.router import forced_routing
from dylora_mlx.system.files import FolderLock
from dylora_mlx.training.checkpoint.state import TrainerState
from dylora_mlx.training.metrics.recorder import MetricsRecorder
from dylora_mlx.training.metrics.timers import Timers
from dylora_mlx.training.step.evaluate import Domain, Evaluation, Evaluator, evaluate, evaluate_all
from dylora_mlx.training.step.optimizers import Optimizers, make_optimizers


class LoraRanks(NamedTuple):
    """LoRA ranks of new experts."""

    start: int
    largest: int
    """That an expert may grow to."""
    scale: float | None = None
    """alpha / r, from the rank schedule; without one, alpha is the model's option."""


@dataclass
class TrainingRun:
    """Everything a run works with. `run.build.build_run` makes it."""

    config: Config
    folder: Path
    """Of the run."""
    base: Base
    model: RoutedDecoder
    pool: Pool
    library: Library
    reference: Reference
    """Statistics of ordinary text, which embeddings are centred on."""
    space: EmbeddingSpace
    """Where skills are compared."""
    optimizers: Optimizers
    state: TrainerState
    skills: list[Skill]
    """The stream. A skill that was split is replaced by its parts."""
    base_skill: Skill | None
    """What the base itself knows."""
    domains: dict[str, Domain]
    """Validation text by domain."""
    tests: dict[str, Domain]
    """Test text by domain."""
    evaluator: Evaluator
    """Shared by all domains, so that it is compiled once."""
    lora_ranks: LoraRanks
    recorder: MetricsRecorder | None = None
    """None for a run that is only read."""
    decision_log: DecisionLog | None = None
    """None for a run that is only read."""
    bandit: tuple[Bandit | None, str] = (None, "")
    """What earlier runs taught, None if it is not trusted, and why."""
    step_traces: int = 0
    """How often this process traced a compiled step."""
    report_failed: bool = False
    """Whether a warning said already that the report cannot be written."""
    lock: FolderLock | None = None
    """On the run folder, while the run goes on."""
    scratch: TemporaryDirectory[str] | None = None
    """Where a rank other than 0, which writes no run folder, keeps features and experts."""
    timers: Timers = field(default_factory=Timers)
    estimate: dict[str, Any] | None = None
    """What the run was expected to take, if that was asked for (run/cost/estimate.py)."""

    @property
    def compiled(self) -> bool:
        """On accelerators only: MLX's CPU backend gains nothing from compiling and would need a C++ compiler."""
        return self.evaluator.compiled

    @property
    def compilations(self) -> int:
        """Traces of compiled functions so far in this process."""
        return self.step_traces + self.evaluator.compilations

    @property
    def features_folder(self) -> Path:
        """Folder of the features that are kept while a skill is learned."""
        return self._writable / "features"

    @property
    def experts_folder(self) -> Path:
        """Folder of frozen experts that are not kept in memory, while the run goes on."""
        return self._writable / "experts"

    @property
    def _writable(self) -> Path:
        """Where this rank writes what it needs while the run goes on."""
        return Path(self.scratch.name) if self.scratch else self.folder

    @property
    def metrics(self) -> MetricsRecorder:
        assert self.recorder is not None, "a run that was only opened records nothing"
        return self.recorder

    @property
    def log(self) -> DecisionLog:
        assert self.decision_log is not None, "a run that was only opened decides nothing"
        return self.decision_log

    def release(self, code: int) -> None:
        """Leave the folder to others, and tell W&B how the run ended, if it has not been told."""
        if self.recorder is not None:
            self.recorder.tracker.close(code)
        if self.lock is not None:
            self.lock.release()

    def expert_rank(self, skill: Skill) -> tuple[int, float]:
        """Rank and alpha of a new expert for a skill."""
        source = skill.source
        rank = source.rank or self.lora_ranks.start
        scale = self.lora_ranks.scale
        return rank, source.alpha or (self.config.model.alpha if scale is None else scale * rank)

    def measure_gather_threshold(self) -> None:
        """Measure, once in a run, when looking experts up pays; a run that is resumed goes on with what it measured."""
        state, model = self.state, self.model
        if model.gather_threshold is None and len(self.pool) > autotune.MIN_EXPERTS:
            if state.gather_threshold is None:
                first = next(named for named in model.shapes.values() if named)
                tokens = self.config.training.batch_size * self.config.data.max_seq_length
                dtype = model.base.model.norm.weight.dtype
                shape = next(iter(first.values()))
                measured = autotune.measure_gather_threshold(shape, self.config.model.rank, tokens, dtype)
                state.gather_threshold = world().broadcast_object(measured)
            model.gather_threshold = state.gather_threshold

    def reset_optimizers(self) -> None:
        """Start the moments anew: the pool's columns are others now."""
        self.optimizers = make_optimizers(self.config.training)
        self.optimizers.init(self.model)

    def evaluate_expert(self, domain: str, expert_id: int) -> Evaluation:
        """A domain's loss with every token sent to one column."""
        return evaluate(self.model, self.domains[domain], forced_routing(), expert_id, evaluator=self.evaluator)

    def evaluate(
        self, domains: dict[str, Domain] | None = None, schedule: RoutingSchedule | None = None
    ) -> dict[str, Evaluation]:
        """Losses of some domains (all of the run's) under a routing (the one when every expert is mature)."""
        routing = (schedule or phases.final_schedule(self.config.growth)).routing
        with self.timers.time("evaluations"):
            return evaluate_all(self.evaluator, self.domains if domains is None else domains, routing)
