"""Streams of arrivals: new skills, known ones as another shard or as a near-duplicate, and files that mix two skills."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from novelty.labels import Label
from novelty.variants import VARIANTS

Kind = Literal["new", "shard", "duplicate", "mixed"]
KINDS: tuple[Kind, ...] = ("new", "shard", "duplicate", "mixed")
LENGTHS = (8, 20)
"""Arrivals in a stream, from and to."""
KNOWN, MIXED = 1 / 3, 0.15
"""Shares of the arrivals that are known, and that mix two skills."""
SHARES = (0.3, 0.5)
"""Share of the smaller skill of a mixed file, from and to."""
FIRST = "python"
"""What the library holds before the first arrival, as growth.base_skill does."""


class Part(NamedTuple):
    """Documents of one label in an arrival: the first `count` of a shard, as they are or as a near-duplicate.

    known: whether the label came before.
    """

    label: str
    shard: int
    variant: str | None
    num_documents: int
    known: bool


class Arrival(NamedTuple):
    """One file of the stream; a mixed one has two parts, the larger first."""

    kind: Kind
    parts: tuple[Part, ...]


class Stream(NamedTuple):
    """Arrivals in order, and what the library holds before them."""

    first: Part
    arrivals: list[Arrival]


class Half(NamedTuple):
    """The labels of the development streams or of the held-out ones; no label is in both but FIRST."""

    name: Literal["development", "held out"]
    labels: list[Label]


def halves(labels: Sequence[Label], seed: int) -> tuple[Half, Half]:
    """Divide the labels at random: by a hash of the seed and the name, so that most stay when labels are added."""

    def rank(label: Label) -> str:
        return hashlib.sha256(f"{seed} {label.name}".encode()).hexdigest()

    first = [label for label in labels if label.name == FIRST]
    others = sorted((label for label in labels if label.name != FIRST), key=rank)
    middle = len(others) // 2
    return Half("development", first + others[:middle]), Half("held out", first + others[middle:])


class Maker:
    """Draws one stream. Every shard comes at most once, apart from its near-duplicates."""

    def __init__(self, labels: Sequence[Label], rng: np.random.Generator):
        self.rng = rng
        self.size = {label.name: label.shards[0].stop for label in labels}
        self.left = {label.name: [int(s) for s in rng.permutation(len(label.shards))] for label in labels}
        self.came: dict[str, list[int]] = {}
        self.first = self._take(FIRST)
        self.unseen = [name for name in (label.name for label in labels) if name != FIRST]
        rng.shuffle(self.unseen)

    def stream(self) -> Stream:
        """Arrivals, as many of each kind as their shares say and labels allow."""
        length = int(self.rng.integers(LENGTHS[0], LENGTHS[1] + 1))
        known, mixed = round(KNOWN * length), max(1, round(MIXED * length))
        kinds = ["known"] * known + ["mixed"] * mixed + ["new"] * (length - known - mixed)
        makers: dict[str, Callable[[], Arrival | None]] = {"known": self._known, "mixed": self._mixed, "new": self._new}
        found = [makers[kind]() for kind in self.rng.permutation(kinds)]
        return Stream(self.first, [arrival for arrival in found if arrival is not None])

    def _new(self) -> Arrival | None:
        return Arrival("new", (self._take(self.unseen.pop()),)) if self.unseen else None

    def _known(self) -> Arrival:
        again = [name for name in self.came if self.left[name]]
        if again and self.rng.random() < 0.5:
            return Arrival("shard", (self._take(str(self.rng.choice(again))),))
        label = str(self.rng.choice(list(self.came)))
        shard = int(self.rng.choice(self.came[label]))
        variant = str(self.rng.choice(VARIANTS))
        return Arrival("duplicate", (Part(label, shard, variant, self.size[label], True),))

    def _mixed(self) -> Arrival | None:
        """Two labels, both new, or one of them known."""
        again = [name for name in self.came if self.left[name]]
        if len(self.unseen) < 2:
            return None
        other = str(self.rng.choice(again)) if again and self.rng.random() < 0.5 else self.unseen.pop()
        parts = [self._take(name) for name in (self.unseen.pop(), other)]
        self.rng.shuffle(parts)
        share = self.rng.uniform(*SHARES)
        larger, smaller = parts
        total = min(larger.num_documents / (1 - share), smaller.num_documents / share)
        counts = (round((1 - share) * total), round(share * total))
        return Arrival("mixed", (larger._replace(num_documents=counts[0]), smaller._replace(num_documents=counts[1])))

    def _take(self, label: str) -> Part:
        part = Part(label, self.left[label].pop(), None, self.size[label], label in self.came)
        self.came.setdefault(label, []).append(part.shard)
        return part


def make(half: Half, count: int, seed: int) -> list[Stream]:
    """`count` streams of a half's labels."""
    offset = 2 if half.name == "development" else 3
    return [Maker(half.labels, np.random.default_rng([seed, offset, number])).stream() for number in range(count)]
