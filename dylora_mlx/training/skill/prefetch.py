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
from dylora_mlx.data.stream import Stream, Values
from dylora_mlx.distributed import group as ranks
from dylora_mlx.growth.library import Library
from dylora_mlx.system import signals as interrupts
from dylora_mlx.system.seeds import SeedStream, generator
from dylora_mlx.training.skill.replay import Recall
from dylora_mlx.training.step.losses import MicroBatch, Recalled, Rehearsal, device_batch
from dylora_mlx.training.step.step import GlobalCounts

T = TypeVar("T")


class Work(NamedTuple):
    """This rank's share of a step: micro-batches, remembered features, and replayed text if there is any; where there are
    several ranks, also counts of the whole step; sizes of all its micro-batches: rows, length, targets, and whether their
    features are known."""

    batches: list[MicroBatch]
    memory: Rehearsal
    recalled: Recalled | None = None
    whole: GlobalCounts | None = None
    sizes: tuple[tuple[int, int, int, bool], ...] = ()


@dataclass(frozen=True)
class Feed:
    """Makes the work of any step of a skill, from nothing but its number.

    features: of the skill's pieces, if they are kept; before: steps trained before the skill; seed: of the rehearsal's
    draws, tokens: how many are drawn; window: of the base's sliding layers; recall: what is replayed.
    """

    plan: Stream
    features: Values | None
    library: Library
    tokens: int
    seed: int
    before: int
    window: int
    recall: Recall | None = None

    def steps(self, start: int, stop: int) -> Generator[Work, None, None]:
        """The work of steps `start` to `stop`. Close the generator when stopping early."""
        return ahead(self.work, range(start, stop))

    def work(self, number: int) -> Work:
        rng = generator(self.seed, SeedStream.REHEARSAL, self.before + number)
        memory = Rehearsal(*(mx.array(part) for part in self.library.rehearse(self.tokens, rng)))
        recalled = self.recall.draw(rng) if self.recall else None
        step, group = self.plan.step(number), ranks.group()
        sizes = [self._size(batch) for batch in step]
        if recalled is not None:
            replayed = recalled.batch
            rows, length = replayed.inputs.shape
            sizes.append((rows, length, replayed.positions.size, replayed.features is not None))
            recalled = recalled if len(step) % group.size == group.rank else None
        batches = [self._batch(batch) for batch in group.share(step)]
        return Work(batches, memory, recalled, _whole(step) if group.size > 1 else None, tuple(sizes))

    def _size(self, batch: Batch) -> tuple[int, int, int, bool]:
        rows, length = batch.inputs.shape
        return rows, length, self.plan.targets or max(1, int(batch.learn.sum())), self.features is not None

    def _batch(self, batch: Batch) -> MicroBatch:
        known = None if self.features is None else stream.gather(self.features, batch)
        return device_batch(batch, self.window, known, self.plan.targets)


def _whole(step: list[Batch]) -> GlobalCounts:
    """What every rank must know of a step: a rank's own share does not tell."""
    counts = (
        sum(int(b.learn.sum()) for b in step),
        sum(bool((b.segments > 0).any()) for b in step),
        interrupts.asked(),
    )
    return GlobalCounts(*(mx.array(float(count)) for count in counts))


def ahead(make: Callable[[int], T], numbers: Iterable[int]) -> Generator[T, None, None]:
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
