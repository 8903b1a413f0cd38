"""Streams of arrivals: new skills, known skills as another shard or near-duplicate, and files that mix two skills."""

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
"""Minimum and maximum number of arrivals per stream."""
KNOWN, MIXED = 1 / 3, 0.15
"""Share of arrivals with a known skill, and share of mixed files."""
SHARES = (0.3, 0.5)
"""Minimum and maximum share of the smaller skill of a mixed file."""
FIRST = "python"
"""Label in the library before the first arrival, as a growth.base_skill is."""


class Part(NamedTuple):
    """Documents of one label in an arrival. Field names are keys of the JSON file."""

    label: str
    shard: int
    variant: str | None
    """Kind of near-duplicate (variants.VARIANTS); None for the documents unchanged."""
    num_documents: int
    """Number of documents, taken from the start of the shard."""
    known: bool
    """Whether the label came before, in an earlier arrival or as the first part of the stream."""


class Arrival(NamedTuple):
    """One file of the stream. A mixed file has two parts, the larger first."""

    kind: Kind
    parts: tuple[Part, ...]


class Stream(NamedTuple):
    """Arrivals in order, and the part in the library before them."""

    first: Part
    arrivals: list[Arrival]


class Half(NamedTuple):
    """The labels of the development streams or of the held-out streams. Only FIRST is in both."""

    name: Literal["development", "held out"]
    labels: list[Label]


def halves(labels: Sequence[Label], seed: int) -> tuple[Half, Half]:
    """Divide the labels by a hash of seed and name, so that added labels move few of the others."""

    def rank(label: Label) -> str:
        return hashlib.sha256(f"{seed} {label.name}".encode()).hexdigest()

    first = [label for label in labels if label.name == FIRST]
    others = sorted((label for label in labels if label.name != FIRST), key=rank)
    middle = len(others) // 2
    return Half("development", first + others[:middle]), Half("held out", first + others[middle:])


class Maker:
    """Draws one stream. Every shard occurs at most once, not counting near-duplicates."""

    def __init__(self, labels: Sequence[Label], rng: np.random.Generator):
        self.rng = rng
        self.size = {label.name: label.shards[0].stop for label in labels}
        self.left = {label.name: [int(s) for s in rng.permutation(len(label.shards))] for label in labels}
        self.came: dict[str, list[int]] = {}
        self.first = self._take(FIRST)
        self.unseen = [name for name in (label.name for label in labels) if name != FIRST]
        rng.shuffle(self.unseen)

    def stream(self) -> Stream:
        """Return a stream with the share of each kind of arrival, as far as the labels suffice."""
        length = int(self.rng.integers(LENGTHS[0], LENGTHS[1] + 1))
        num_known, num_mixed = round(KNOWN * length), max(1, round(MIXED * length))
        kinds = ["known"] * num_known + ["mixed"] * num_mixed + ["new"] * (length - num_known - num_mixed)
        makers: dict[str, Callable[[], Arrival | None]] = {"known": self._known, "mixed": self._mixed, "new": self._new}
        arrivals = [makers[kind]() for kind in self.rng.permutation(kinds)]
        return Stream(self.first, [arrival for arrival in arrivals if arrival is not None])

    def _new(self) -> Arrival | None:
        return Arrival("new", (self._take(self.unseen.pop()),)) if self.unseen else None

    def _known(self) -> Arrival:
        available = [name for name in self.came if self.left[name]]
        if available and self.rng.random() < 0.5:
            return Arrival("shard", (self._take(str(self.rng.choice(available))),))
        label = str(self.rng.choice(list(self.came)))
        shard = int(self.rng.choice(self.came[label]))
        variant = str(self.rng.choice(VARIANTS))
        return Arrival("duplicate", (Part(label, shard, variant, self.size[label], True),))

    def _mixed(self) -> Arrival | None:
        """Return a file of two labels, both new or one of them known; None with fewer than two unseen labels."""
        available = [name for name in self.came if self.left[name]]
        if len(self.unseen) < 2:
            return None
        other = str(self.rng.choice(available)) if available and self.rng.random() < 0.5 else self.unseen.pop()
        parts = [self._take(name) for name in (self.unseen.pop(), other)]
        self.rng.shuffle(parts)
        share = self.rng.uniform(*SHARES)
        larger, smaller = parts
        total = min(larger.num_documents / (1 - share), smaller.num_documents / share)
        counts = (round((1 - share) * total), round(share * total))
        return Arrival("mixed", (larger._replace(num_documents=counts[0]), smaller._replace(num_documents=counts[1])))

    def _take(self, label: str) -> Part:
        """Take the next unused shard of a label."""
        part = Part(label, self.left[label].pop(), None, self.size[label], label in self.came)
        self.came.setdefault(label, []).append(part.shard)
        return part


def make(half: Half, count: int, seed: int) -> list[Stream]:
    """Return `count` streams of a half's labels."""
    offset = 2 if half.name == "development" else 3
    return [Maker(half.labels, np.random.default_rng([seed, offset, number])).stream() for number in range(count)]
