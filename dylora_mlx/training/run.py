"""The TrainingRun object: everything that one training run works with, shared by all parts of the training code."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from mlx.utils import tree_flatten

from dylora_mlx.config import Config
from dylora_mlx.data.counts import DataCounts
from dylora_mlx.data.kept import RunSources
from dylora_mlx.data.stream import Skill
from dylora_mlx.distributed.group import world
from dylora_mlx.growth import phases
from dylora_mlx.growth.decide.bandit import Bandit
from dylora_mlx.growth.decide.decision_log import DecisionLog
from dylora_mlx.growth.library import Library
from dylora_mlx.growth.novelty.embedding import EmbeddingSpace, Reference
from dylora_mlx.growth.phases import RoutingSchedule
from dylora_mlx.growth.pool import Pool, expert_hash
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.experts import autotune
from dylora_mlx.model.experts.offload import OffloadedExpert
from dylora_mlx.model.routing.router import Routing, forced_routing
from dylora_mlx.system.files import FolderLock
from dylora_mlx.training.callbacks import Callbacks
from dylora_mlx.training.checkpoint.links import StoredFiles
from dylora_mlx.training.checkpoint.state import TrainerState
from dylora_mlx.training.metrics.recorder import MetricsRecorder
from dylora_mlx.training.metrics.timers import Timers
from dylora_mlx.training.step.domains import Domain, free_features
from dylora_mlx.training.step.evaluate import Evaluation, Evaluator, evaluate, evaluate_all, expert_shares
from dylora_mlx.training.step.optimizers import Optimizers, make_optimizers


class LoraRanks(NamedTuple):
    """LoRA ranks of new experts."""

    start: int
    """Rank of a new expert whose source sets none."""
    largest: int
    """Largest rank that an expert may grow to."""
    scale: float | None = None
    """alpha / r from the rank schedule; None without a schedule: alpha is then model.alpha."""


@dataclass
class TrainingRun:
    """Everything a run works with. Built by `run.build.build_run`."""

    config: Config
    folder: Path
    """The run folder."""
    base: Base
    model: RoutedDecoder
    pool: Pool
    library: Library
    reference: Reference
    """Base-model statistics of ordinary text, used to centre embeddings."""
    space: EmbeddingSpace
    """Embedding space in which skills are compared."""
    optimizers: Optimizers
    state: TrainerState
    skills: list[Skill]
    """The skill stream, in training order. A skill that was split is replaced by its parts."""
    base_skill: Skill | None
    """Text of what the base model knows already; the first entry of the library. None if the config has none."""
    domains: dict[str, Domain]
    """Validation batches by domain, within `eval.tokens`."""
    tests: dict[str, Domain]
    """Test batches by domain."""
    evaluator: Evaluator
    """Shared by all domains, so that one compiled function serves them all."""
    lora_ranks: LoraRanks
    sources: RunSources = field(default_factory=RunSources)
    """The documents that the run stores of its sources."""
    recorder: MetricsRecorder | None = None
    """Writer of metrics.jsonl; None for a run opened read-only."""
    decision_log: DecisionLog | None = None
    """Writer of decisions.jsonl; None for a run opened read-only."""
    bandit: tuple[Bandit | None, str] = (None, "")
    """The bandit fitted to earlier runs (None if it is not trusted), and the reason."""
    data_counts: dict[str, DataCounts] = field(default_factory=dict)
    """Counts of the data of every skill and domain as it was read, before any skill was split."""
    step_traces: int = 0
    """Traces of compiled steps in this process."""
    report_failed: bool = False
    """Whether the warning about a failed report or samples file was printed already."""
    lock: FolderLock | None = None
    """Lock on the run folder, held while this process trains."""
    scratch: TemporaryDirectory[str] | None = None
    """Local folder for features and offloaded experts on ranks other than 0, which never write to the run folder."""
    timers: Timers = field(default_factory=Timers)
    """Wall-clock time by activity, and peak memory."""
    estimate: dict[str, Any] | None = None
    """Cost estimate made before the run started (run/cost/estimate.py); None if not requested."""
    final_domains: dict[str, Domain] = field(default_factory=dict)
    """Validation batches that are evaluated at the end. Other than `domains` only with `eval.full`."""
    stored: StoredFiles = field(default_factory=StoredFiles)
    """The files of the last checkpoint, which the next one links if they have not changed."""
    callbacks: Callbacks = field(default_factory=Callbacks)
    """The program's callbacks."""
    measured: dict[str, tuple[str, Evaluation]] = field(default_factory=dict)
    """The last evaluation of each validation domain, with the digest of the mixture that was evaluated."""
    selected: set[str] | None = None
    """The domains that are evaluated for the current skill (training/skill/selection.py); None for all."""

    @property
    def compiled(self) -> bool:
        """Whether steps and evaluation use `mx.compile`.

        True on accelerators only: MLX's CPU backend gains nothing from compiling and needs a C++ compiler for it.
        """
        return self.evaluator.compiled

    @property
    def compilations(self) -> int:
        """Traces of compiled functions (steps and evaluation) so far in this process."""
        return self.step_traces + self.evaluator.compilations

    @property
    def features_folder(self) -> Path:
        """Folder of the feature cache of the skill being learned."""
        return self._writable / "features"

    @property
    def experts_folder(self) -> Path:
        """Folder of frozen experts that are offloaded to disk during the run."""
        return self._writable / "experts"

    @property
    def _writable(self) -> Path:
        """Folder for this rank's temporary files: the run folder on rank 0, `scratch` elsewhere."""
        return Path(self.scratch.name) if self.scratch else self.folder

    @property
    def metrics(self) -> MetricsRecorder:
        """The metrics recorder. Fails with AssertionError for a run opened read-only."""
        assert self.recorder is not None, "a run opened read-only has no metrics recorder"
        return self.recorder

    @property
    def log(self) -> DecisionLog:
        """The decision log. Fails with AssertionError for a run opened read-only."""
        assert self.decision_log is not None, "a run opened read-only has no decision log"
        return self.decision_log

    def release(self, code: int) -> None:
        """End the runs of the trackers with an exit code, unless they have ended already, and release the lock on the run folder."""
        if self.recorder is not None:
            self.recorder.trackers.close(code)
        if self.lock is not None:
            self.lock.release()

    def expert_rank(self, skill: Skill) -> tuple[int, float]:
        """Return LoRA rank and alpha of a new expert for a skill: the source's values, else the run's defaults."""
        source = skill.source
        rank = source.rank or self.lora_ranks.start
        scale = self.lora_ranks.scale
        alpha = source.alpha or (self.config.model.alpha if scale is None else scale * rank)
        return rank, self.config.model.stored_alpha(rank, alpha)

    def measure_gather_threshold(self) -> None:
        """Set the model's gather threshold.

        It is measured once per run, when the pool first has more than `autotune.MIN_EXPERTS` experts. The value is
        part of the state: a resumed run uses it again instead of measuring anew.
        """
        state, model = self.state, self.model
        if model.gather_threshold is None and len(self.pool) > autotune.MIN_EXPERTS:
            if state.gather_threshold is None:
                layer_shapes = next(projections for projections in model.shapes.values() if projections)
                tokens = self.config.training.batch_size * self.config.data.max_seq_length
                dtype = model.base.model.norm.weight.dtype
                shape = next(iter(layer_shapes.values()))
                measured = autotune.measure_gather_threshold(shape, self.config.model.rank, tokens, dtype)
                # Timings differ from rank to rank, but all ranks must choose the same form: take rank 0's.
                state.gather_threshold = world().broadcast_object(measured)
            model.gather_threshold = state.gather_threshold

    def reset_optimizers(self) -> None:
        """Replace both optimizers and their moments, after merging or evicting renumbered the experts."""
        self.optimizers = make_optimizers(self.config.training)
        self.optimizers.init(self.model)

    def evaluate_expert(self, domain: str, expert_id: int) -> Evaluation:
        """Evaluate a domain with every token forced to one expert (0: the null expert, the base alone)."""
        return evaluate(self.model, self.domains[domain], forced_routing(), expert_id, evaluator=self.evaluator)

    def evaluate(
        self, domains: dict[str, Domain] | None = None, schedule: RoutingSchedule | None = None
    ) -> dict[str, Evaluation]:
        """Evaluate domains under a routing schedule.

        A validation domain that was last evaluated with the same weights and routing is not evaluated again.

        Args:
            domains: Domains by name; None for the selected validation domains of the run.
            schedule: Routing; None for the final one, with every expert mature.
        """
        routing = (schedule or phases.final_schedule(self.config.growth)).routing
        domains = self.selected_domains if domains is None else domains
        with self.timers.time("evaluations"):
            digest = self._mixture_digest(routing)
            known = {
                name: self.measured[name][1]
                for name, domain in domains.items()
                if self.domains.get(name) is domain and self.measured.get(name, ("",))[0] == digest
            }
            # All ranks evaluate the same domains, even if a router's last bits differ between them.
            missing = set(domains).difference(*map(set, world().all_gather_object(list(known)))) | (
                domains.keys() - known
            )
            new: dict[str, Evaluation] = {}
            for part in self._affordable_parts({name: domains[name] for name in domains if name in missing}):
                new |= evaluate_all(self.evaluator, part, routing)
        self.measured |= {n: (digest, each) for n, each in new.items() if self.domains.get(n) is domains[n]}
        return {name: new.get(name) or known[name] for name in domains}

    def select(self, names: set[str] | None) -> None:
        """Set the domains that are evaluated from now on; None for all. What is kept in memory of the others is freed."""
        self.selected = names
        if names is not None:
            free_features({name: domain for name, domain in self.domains.items() if name not in names})
            self.measured = {name: each for name, each in self.measured.items() if name in names}

    @property
    def selected_domains(self) -> dict[str, Domain]:
        """The validation domains that are evaluated for the current skill."""
        if self.selected is None:
            return self.domains
        return {name: domain for name, domain in self.domains.items() if name in self.selected}

    def _affordable_parts(self, domains: dict[str, Domain]) -> Iterator[dict[str, Domain]]:
        """Divide domains into parts within `eval.total_tokens`. The features of a part are freed after it, unless it is the
        only one."""
        budget, part, size = self.config.eval.total_tokens, dict[str, Domain](), 0
        is_split = budget is not None and sum(domain.positions for domain in domains.values()) > budget
        for name, domain in domains.items():
            if is_split and part and size + domain.positions > (budget or 0):
                yield part
                free_features(part)
                part, size = {}, 0
            part[name], size = domain, size + domain.positions
        if part:
            yield part
        if is_split:
            free_features(part)

    def expert_shares(self, schedule: RoutingSchedule) -> dict[str, list[float]]:
        """Return the mean gate of each expert on each selected validation domain, the null expert first."""
        with self.timers.time("evaluations"):
            return expert_shares(self.model, self.selected_domains, schedule.routing)

    def _mixture_digest(self, routing: Routing) -> str:
        """Return a digest of all that a loss depends on besides the text: experts, router, and how they are mixed."""
        top_k = (
            routing.top_k if routing.top_k and routing.top_k <= len(self.pool) else None
        )  # None: dense, as all is chosen
        settings = (top_k, routing.temperature.item(), self.model.gather_threshold)
        digest = hashlib.sha256(repr(settings).encode())
        for name, value in tree_flatten(self.model.router.parameters()):
            digest.update(name.encode() + np.array(value).tobytes())
        for expert in self.model.experts:
            # The file of an offloaded expert never changes.
            content = str(expert.path) if isinstance(expert, OffloadedExpert) else expert_hash(expert)
            digest.update(f"{content} {expert.scale}".encode())
        return digest.hexdigest()
