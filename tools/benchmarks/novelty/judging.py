"""A stream played through every policy, and what came of it: decisions right and wrong, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from dylora_mlx.growth.gate_init import FeatureStatistics
from dylora_mlx.growth.library import Library, LibraryEntry
from dylora_mlx.growth.novelty.embedding import EmbeddingSpace
from novelty.means import Bank
from novelty.policies import Context, Policy, Splitter, Verdict
from novelty.probing import Taught
from novelty.streams import Arrival, Part, Stream

RIGHT, MOSTLY = 0.95, 0.8
"""Share of documents in the right part with which a mixed file counts as split rightly, and as split mostly rightly."""
RESAMPLES = 2000
"""Of streams, for intervals."""
NOTHING = FeatureStatistics(np.zeros((0, 0), np.float32), np.zeros(0, np.float32), 0.0)


class Judged(NamedTuple):
    """One arrival of a stream.

    verdicts: of each policy on a file of one skill. parts: how many the file was split into; right: share of its documents
    that are in the right part, when each part found counts as one of the true ones. found: of the parts, the label that
    most of its documents have, and the verdicts on it.
    """

    stream: int
    arrival: Arrival
    verdicts: dict[str, Verdict]
    parts: int
    right: float
    found: list[tuple[Part, dict[str, Verdict]]]


class Player:
    """Plays streams. After an arrival the library holds what is true of it, whatever was decided, so that a decision is
    judged by itself."""

    def __init__(self, bank: Bank, space: EmbeddingSpace, policies: dict[str, Policy], split: Splitter, share: float):
        self.bank, self.space, self.policies, self.split, self.share = bank, space, policies, split, share

    def play(self, number: int, stream: Stream) -> list[Judged]:
        """Judge all arrivals of a stream."""
        return [self._judge(number, arrival, context) for arrival, context in self.contexts(number, stream)]

    def contexts(self, number: int, stream: Stream) -> Iterator[tuple[Arrival, Context]]:
        """The arrivals of a stream, each with what is known when it comes."""
        library, taught = Library("any"), dict[str, Taught]()
        self._remember(library, stream.first, self.bank.means(Arrival("new", (stream.first,)))[0])
        for place, arrival in enumerate(stream.arrivals):
            texts = [text for part in arrival.parts for text in self.bank.texts(part)]
            yield arrival, Context(library, self.space, 1000 * number + place, texts, dict(taught))
            means, truth = self.bank.means(arrival)
            for i, part in enumerate(arrival.parts):
                self._remember(library, part, means[truth == i])
                if not part.known:
                    taught[library.entries[-1].skill] = Taught(part, partial(self.bank.texts, part))

    def _judge(self, number: int, arrival: Arrival, context: Context) -> Judged:
        means, truth = self.bank.means(arrival)
        order = np.random.default_rng(context.seed).permutation(len(means))
        means, truth, tokens = means[order], truth[order], self.bank.tokens(arrival)
        texts = [context.texts[i] for i in order]
        context = context._replace(texts=texts)
        policies = self.policies if arrival.kind != "mixed" else {}
        whole = {name: policy(means, context) for name, policy in policies.items()}
        labels = self.split(means, [tokens[i] for i in order], context)
        parts = 1 + int(labels.max())
        majority = [int(np.bincount(truth[labels == i]).argmax()) for i in range(parts)]
        right = float(np.mean(np.array(majority)[labels] == truth))
        found = []
        for i in range(parts) if parts > 1 else ():
            own = context._replace(texts=[text for text, label in zip(texts, labels, strict=True) if label == i])
            verdicts = {name: policy(means[labels == i], own) for name, policy in self.policies.items()}
            found.append((arrival.parts[majority[i]], verdicts))
        return Judged(number, arrival, whole, parts, right, found)

    def _remember(self, library: Library, part: Part, means: np.ndarray) -> None:
        known = [entry for entry in library.entries if label_of(entry.skill) == part.label]
        if known:
            centre = self.space(means.astype(np.float64).mean(0))
            nearest = max(known, key=lambda entry: float(centre @ self.space(entry.centre)))
            nearest.record_arrival(means, float(centre @ self.space(nearest.centre)), self.share)
        name = f"{part.label}#{len(library)}"
        library.add(LibraryEntry(name, 0, means, NOTHING, np.zeros((0, means.shape[1]), np.float32)))


def label_of(skill: str | None) -> str | None:
    """The label of an entry's name."""
    return None if skill is None else skill.rpartition("#")[0]


def names(judged: Sequence[Judged]) -> list[str]:
    """Of all policies."""
    return list(dict.fromkeys(name for j in judged for name in j.verdicts))


class Share(NamedTuple):
    """A share of some cases: hits of count, and a 95% interval."""

    hits: int
    total: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.hits / self.total if self.total else math.nan


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share (Wilson 1927)."""
    if not count:
        return 0.0, 1.0
    z, p = 1.959964, hits / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def share(cases: Sequence[tuple[int, bool]]) -> Share:
    """The share of cases, (stream, hit), that are hits: the wider of Wilson's interval and a bootstrap over streams."""
    hits = sum(hit for _, hit in cases)
    low, high = wilson(hits, len(cases))
    streams = sorted({stream for stream, _ in cases})
    if len(streams) > 1:
        table = np.array([[sum(h for s, h in cases if s == n), sum(s == n for s, _ in cases)] for n in streams])
        drawn = table[np.random.default_rng(0).integers(0, len(table), (RESAMPLES, len(table)))].sum(1)
        ends = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
        low, high = min(low, float(ends[0])), max(high, float(ends[1]))
    return Share(hits, len(cases), low, high)


def decisions(judged: Sequence[Judged], policy: str, chosen: Callable[[Judged], bool] = lambda _: True) -> Share:
    """Right decisions of files that hold one skill."""
    return share(
        [(j.stream, _is_right(j.arrival.parts[0], j.verdicts[policy])) for j in _plain(judged, policy) if chosen(j)]
    )


def whole(judged: Sequence[Judged], policy: str) -> Share:
    """Right decisions of files that hold one skill, where one that was split counts as wrong."""
    right = [
        (j.stream, j.parts == 1 and _is_right(j.arrival.parts[0], j.verdicts[policy])) for j in _plain(judged, policy)
    ]
    return share(right)


def false_creations(judged: Sequence[Judged], policy: str) -> Share:
    """Known skills that are called new."""
    return share([(j.stream, j.verdicts[policy].novel) for j in _plain(judged, policy) if j.arrival.parts[0].known])


def missed_creations(judged: Sequence[Judged], policy: str) -> Share:
    """New skills that are called known."""
    return share(
        [(j.stream, not j.verdicts[policy].novel) for j in _plain(judged, policy) if not j.arrival.parts[0].known]
    )


def right_skill(judged: Sequence[Judged], policy: str) -> Share:
    """Known skills whose nearest entry is of the same skill."""
    known = [j for j in _plain(judged, policy) if j.arrival.parts[0].known]
    return share([(j.stream, label_of(j.verdicts[policy].nearest) == j.arrival.parts[0].label) for j in known])


def mixed_parts(judged: Sequence[Judged], policy: str) -> Share:
    """Right decisions on the parts found in mixed files that were split."""
    mixed = [j for j in judged if j.arrival.kind == "mixed"]
    found = [(j.stream, part, verdicts) for j in mixed for part, verdicts in j.found if policy in verdicts]
    return share([(stream, _is_right(part, verdicts[policy])) for stream, part, verdicts in found])


def split_rightly(judged: Sequence[Judged], least: float = RIGHT) -> Share:
    """Mixed files that come apart in two, with at least this share of the documents on the right side."""
    return share([(j.stream, j.parts == 2 and j.right >= least) for j in judged if j.arrival.kind == "mixed"])


def split_at_all(judged: Sequence[Judged]) -> Share:
    """Mixed files that come apart."""
    return share([(j.stream, j.parts > 1) for j in judged if j.arrival.kind == "mixed"])


def split_wrongly(judged: Sequence[Judged]) -> Share:
    """Files of one skill that come apart."""
    return share([(j.stream, j.parts > 1) for j in _plain(judged)])


def _plain(judged: Sequence[Judged], policy: str | None = None) -> list[Judged]:
    """Files of one skill, those that a policy decided on."""
    return [j for j in judged if j.arrival.kind != "mixed" and (policy is None or policy in j.verdicts)]


def _is_right(part: Part, verdict: Verdict) -> bool:
    return verdict.novel != part.known
