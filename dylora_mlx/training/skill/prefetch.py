"""Prefetch the arrays of training steps: a background thread prepares the next step while the current one runs.

The thread only makes complete MLX arrays from NumPy arrays, because a lazy MLX operation belongs to the thread that
built it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import mlx.core as mx
import numpy as np

from dylora_mlx.data import stream
from dylora_mlx.data.packing import Batch
from dylora_mlx.data.stream import BatchPlan, SegmentArrays
from dylora_mlx.distributed.group import world
from dylora_mlx.growth.library import Library
from dylora_mlx.system import signals
from dylora_mlx.system.seeds import SeedStream, generator
from dylora_mlx.training.skill.replay import ReplayBuffer
from dylora_mlx.training.step.losses import MicroBatch, RehearsalBatch, ReplayBatch, device_batch
from dylora_mlx.training.step.step import GlobalCounts

T = TypeVar("T")


class StepWork(NamedTuple):
    """This rank's share of one training step."""

    batches: list[MicroBatch]
    """Micro-batches."""
    memory: RehearsalBatch
    """Remembered features for router rehearsal."""
    replayed: ReplayBatch | None = None
    """A batch of replayed text. None if nothing is replayed, or if another rank trains on it."""
    global_counts: GlobalCounts | None = None
    """Counts over the whole step. None with a single rank."""
    sizes: tuple[tuple[int, int, int, bool], ...] = ()
    """Rows, length, targets, and whether features are cached, for all micro-batches of the step on all ranks."""


@dataclass(frozen=True)
class Prefetcher:
    """Builds the work of any step of a skill from its number alone, so that a resumed run gets the same batches."""

    plan: BatchPlan
    """The skill's steps."""
    features: SegmentArrays | None
    """Cached features of the skill's segments. None if they are computed at every step."""
    library: Library
    """The library whose memory is rehearsed."""
    tokens: int
    """Remembered features drawn per step."""
    seed: int
    """Seed of these draws."""
    steps_before: int
    """Steps trained before the skill."""
    window: int
    """Window of the base's sliding-window layers."""
    replay: ReplayBuffer | None = None
    """Batches of earlier skills to replay."""
    dropout: bool = False
    """Whether micro-batches get a key for LoRA dropout."""

    def steps(self, start: int, stop: int) -> Generator[StepWork, None, None]:
        """Yield the work of the steps from `start` up to, not including, `stop`. Close the generator when stopping
        early."""
        return prefetch(self.work, range(start, stop))

    def work(self, step_number: int) -> StepWork:
        """Build the work of the skill's step `step_number`."""
        # Seeded by the run's step number, so that a resumed run draws the same. Rehearsal draws first, then replay.
        rng = generator(self.seed, SeedStream.REHEARSAL, self.steps_before + step_number)
        memory = RehearsalBatch(*(mx.array(array) for array in self.library.sample_memory(self.tokens, rng)))
        replayed = self.replay.sample(rng) if self.replay else None
        step, group = self.plan.step(step_number), world()
        sizes = [self._size(batch) for batch in step]
        if replayed is not None:
            micro_batch = replayed.batch
            rows, length = micro_batch.inputs.shape
            sizes.append((rows, length, micro_batch.target_positions.size, micro_batch.features is not None))
            # Every rank draws the batch, for `sizes`. It counts as one more micro-batch, so the next rank in turn
            # trains on it.
            replayed = replayed if len(step) % group.world_size == group.rank else None
        numbered = [(self.steps_before + step_number, number, batch) for number, batch in enumerate(step)]
        batches = [self._batch(*each) for each in group.shard(numbered)]
        return StepWork(batches, memory, replayed, _global_counts(step) if group.world_size > 1 else None, tuple(sizes))

    def _size(self, batch: Batch) -> tuple[int, int, int, bool]:
        rows, length = batch.inputs.shape
        return rows, length, self.plan.max_targets or max(1, int(batch.loss_mask.sum())), self.features is not None

    def _batch(self, step_number: int, number: int, batch: Batch) -> MicroBatch:
        features = None if self.features is None else stream.gather_rows(self.features, batch)
        micro_batch = device_batch(batch, self.window, features, self.plan.max_targets)
        if not self.dropout:
            return micro_batch
        # By its number in the step, so that a resumed run, and any number of ranks, drop the same inputs.
        rng = generator(self.seed, SeedStream.DROPOUT, step_number, number)
        return micro_batch._replace(dropout_key=mx.array(rng.integers(2**32, size=2, dtype=np.uint32)))


def _global_counts(step: list[Batch]) -> GlobalCounts:
    """Return the step's total targets and non-empty micro-batches, which this rank's share alone does not show, and
    this rank's stop flag."""
    counts = (
        sum(int(b.loss_mask.sum()) for b in step),
        sum(bool((b.segment_ids > 0).any()) for b in step),
        signals.stop_requested(),
    )
    return GlobalCounts(*(mx.array(float(count)) for count in counts))


def prefetch(make: Callable[[int], T], numbers: Iterable[int]) -> Generator[T, None, None]:
    """Yield `make(number)` for each number, in order.

    The next result is computed in a thread while the caller uses the current one. An exception of `make` is raised when
    its result is due.
    """
    with ThreadPoolExecutor(1, "feed") as executor:
        pending: Future[T] | None = None
        for number in numbers:
            submitted = executor.submit(make, number)
            if pending is not None:
                yield pending.result()
            pending = submitted
        if pending is not None:
            yield pending.result()
