"""What the steps of a skill work on, put on the device one step ahead by a thread of its own.

Only whole arrays are made there, straight from NumPy's: an operation of MLX belongs to the thread that built it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import mlx.core as mx

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
    """This rank's share of a step: micro-batches, remembered features, and replayed text if there is any; where there are
    several ranks, also counts of the whole step; sizes of all its micro-batches: rows, length, targets, and whether their
    features are known."""

    batches: list[MicroBatch]
    memory: RehearsalBatch
    replayed: ReplayBatch | None = None
    global_counts: GlobalCounts | None = None
    sizes: tuple[tuple[int, int, int, bool], ...] = ()


@dataclass(frozen=True)
class Prefetcher:
    """Makes the work of any step of a skill, from nothing but its number.

    features: of the skill's pieces, if they are kept; before: steps trained before the skill; seed: of the rehearsal's
    draws, tokens: how many are drawn; window: of the base's sliding layers; recall: what is replayed.
    """

    plan: BatchPlan
    features: SegmentArrays | None
    library: Library
    tokens: int
    seed: int
    steps_before: int
    window: int
    replay: ReplayBuffer | None = None

    def steps(self, start: int, stop: int) -> Generator[StepWork, None, None]:
        """The work of steps `start` to `stop`. Close the generator when stopping early."""
        return prefetch(self.work, range(start, stop))

    def work(self, number: int) -> StepWork:
        rng = generator(self.seed, SeedStream.REHEARSAL, self.steps_before + number)
        memory = RehearsalBatch(*(mx.array(part) for part in self.library.sample_memory(self.tokens, rng)))
        recalled = self.replay.sample(rng) if self.replay else None
        step, group = self.plan.step(number), world()
        sizes = [self._size(batch) for batch in step]
        if recalled is not None:
            replayed = recalled.batch
            rows, length = replayed.inputs.shape
            sizes.append((rows, length, replayed.target_positions.size, replayed.features is not None))
            recalled = recalled if len(step) % group.world_size == group.rank else None
        batches = [self._batch(batch) for batch in group.shard(step)]
        return StepWork(batches, memory, recalled, _global_counts(step) if group.world_size > 1 else None, tuple(sizes))

    def _size(self, batch: Batch) -> tuple[int, int, int, bool]:
        rows, length = batch.inputs.shape
        return rows, length, self.plan.max_targets or max(1, int(batch.loss_mask.sum())), self.features is not None

    def _batch(self, batch: Batch) -> MicroBatch:
        known = None if self.features is None else stream.gather_rows(self.features, batch)
        return device_batch(batch, self.window, known, self.plan.max_targets)


def _global_counts(step: list[Batch]) -> GlobalCounts:
    """What every rank must know of a step: a rank's own share does not tell."""
    counts = (
        sum(int(b.loss_mask.sum()) for b in step),
        sum(bool((b.segment_ids > 0).any()) for b in step),
        signals.stop_requested(),
    )
    return GlobalCounts(*(mx.array(float(count)) for count in counts))


def prefetch(make: Callable[[int], T], numbers: Iterable[int]) -> Generator[T, None, None]:
    """`make` of each number, in order, the next one under way in a thread while the caller uses the one before.

    What `make` raises is raised when its result is due.
    """
    with ThreadPoolExecutor(1, "feed") as thread:
        due: Future[T] | None = None
        for number in numbers:
            following = thread.submit(make, number)
            if due is not None:
                yield due.result()
            due = following
        if due is not None:
            yield due.result()
