"""Run streams through every policy, and count right and wrong decisions, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from dylora_mlx.evaluation.questions import interval
from dylora_mlx.growth.feature_statistics import FeatureStatistics
from dylora_mlx.growth.library import Library, LibraryEntry
from dylora_mlx.growth.novelty.embedding import EmbeddingSpace
from novelty.means import Bank
from novelty.policies import Context, Policy, Splitter, Verdict
from novelty.probing import TrainingDocuments
from novelty.streams import Arrival, Part, Stream

RIGHT, MOSTLY = 0.95, 0.8
"""Share of documents in the right part above which a split counts as right, and as mostly right."""
RESAMPLES = 2000
"""Bootstrap resamples of streams."""
NOTHING = FeatureStatistics(np.zeros((0, 0), np.float32), np.zeros(0, np.float32), 0.0)


class Judged(NamedTuple):
    """Decisions on one arrival of a stream."""

    stream: int
    arrival: Arrival
    verdicts: dict[str, Verdict]
    """Verdict of each policy on the whole file; empty for a mixed file."""
    parts: int
    """Number of parts that the file was split into."""
    right: float
    """Share of documents in the right part. Each part counts as the true part that most of its documents belong to."""
    part_verdicts: list[tuple[Part, dict[str, Verdict]]]
    """Of each part of a split file: the true part of most of its documents, and the verdicts on it."""


class Player:
    """Runs streams through the policies.

    After each arrival, the library is updated with the truth, whatever was decided. So a wrong decision does not affect
    later ones.
    """

    def __init__(self, bank: Bank, space: EmbeddingSpace, policies: dict[str, Policy], split: Splitter, share: float):
        self.bank, self.space, self.policies, self.split, self.share = bank, space, policies, split, share

    def play(self, number: int, stream: Stream) -> list[Judged]:
        """Judge all arrivals of a stream."""
        return [self._judge(number, arrival, context) for arrival, context in self.contexts(number, stream)]

    def contexts(self, number: int, stream: Stream) -> Iterator[tuple[Arrival, Context]]:
        """Yield the arrivals of a stream, each with the context that policies see at that time."""
        library, trained_on = Library("any"), dict[str, TrainingDocuments]()
        self._remember(library, stream.first, self.bank.means(Arrival("new", (stream.first,)))[0])
        for position, arrival in enumerate(stream.arrivals):
            texts = [text for part in arrival.parts for text in self.bank.texts(part)]
            yield arrival, Context(library, self.space, 1000 * number + position, texts, dict(trained_on))
            means, truth = self.bank.means(arrival)
            for i, part in enumerate(arrival.parts):
                self._remember(library, part, means[truth == i])
                if not part.known:
                    trained_on[library.entries[-1].skill] = TrainingDocuments(part, partial(self.bank.texts, part))

    def _judge(self, number: int, arrival: Arrival, context: Context) -> Judged:
        means, truth = self.bank.means(arrival)
        order = np.random.default_rng(context.seed).permutation(len(means))
        means, truth, tokens = means[order], truth[order], self.bank.tokens(arrival)
        texts = [context.texts[i] for i in order]
        context = context._replace(texts=texts)
        policies = self.policies if arrival.kind != "mixed" else {}
        verdicts = {name: policy(means, context) for name, policy in policies.items()}
        labels = self.split(means, [tokens[i] for i in order], context)
        parts = 1 + int(labels.max())
        majority = [int(np.bincount(truth[labels == i]).argmax()) for i in range(parts)]
        right = float(np.mean(np.array(majority)[labels] == truth))
        part_verdicts = []
        for i in range(parts) if parts > 1 else ():
            part_context = context._replace(
                texts=[text for text, label in zip(texts, labels, strict=True) if label == i]
            )
            part_verdict = {name: policy(means[labels == i], part_context) for name, policy in self.policies.items()}
            part_verdicts.append((arrival.parts[majority[i]], part_verdict))
        return Judged(number, arrival, verdicts, parts, right, part_verdicts)

    def _remember(self, library: Library, part: Part, means: np.ndarray) -> None:
        same_label = [entry for entry in library.entries if label_of(entry.skill) == part.label]
        if same_label:
            embedding = self.space(means.astype(np.float64).mean(0))
            nearest = max(same_label, key=lambda entry: float(embedding @ self.space(entry.centre)))
            nearest.record_arrival(means, self.share)
        # One expert for each label, as in a run: limits follow from how similar skills of different experts are.
        experts = {label_of(entry.skill): entry.expert for entry in library.entries}
        expert = experts.get(part.label, 1 + len(experts))
        name = f"{part.label}#{len(library)}"
        library.add(LibraryEntry(name, expert, means, NOTHING, np.zeros((0, means.shape[1]), np.float32)))


def label_of(skill: str | None) -> str | None:
    """Return the label in the name of a library entry."""
    return None if skill is None else skill.rpartition("#")[0]


def names(judged: Sequence[Judged]) -> list[str]:
    """Return the names of all policies."""
    return list(dict.fromkeys(name for j in judged for name in j.verdicts))


class Share(NamedTuple):
    """A share of cases, hits / total, with a 95% interval. Field names are keys of the JSON file."""

    hits: int
    total: int
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""

    @property
    def value(self) -> float:
        """The share; NaN without cases."""
        return self.hits / self.total if self.total else math.nan


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share (Wilson 1927)."""
    if not count:
        return 0.0, 1.0
    return interval(hits / count, count)


def share(cases: Sequence[tuple[int, bool]]) -> Share:
    """Return the share of hits among cases (stream, hit).

    Its interval is the union of Wilson's and that of a bootstrap over streams, which accounts for correlation within a
    stream.
    """
    hits = sum(hit for _, hit in cases)
    low, high = wilson(hits, len(cases))
    streams = sorted({stream for stream, _ in cases})
    if len(streams) > 1:
        per_stream = np.array([[sum(h for s, h in cases if s == n), sum(s == n for s, _ in cases)] for n in streams])
        resampled = per_stream[np.random.default_rng(0).integers(0, len(per_stream), (RESAMPLES, len(per_stream)))].sum(
            1
        )
        ends = np.quantile(resampled[:, 0] / resampled[:, 1], [0.025, 0.975])
        low, high = min(low, float(ends[0])), max(high, float(ends[1]))
    return Share(hits, len(cases), low, high)


def decisions(judged: Sequence[Judged], policy: str, chosen: Callable[[Judged], bool] = lambda _: True) -> Share:
    """Return the share of right decisions on files of one skill, optionally of the chosen ones only."""
    return share(
        [(j.stream, _is_right(j.arrival.parts[0], j.verdicts[policy])) for j in _plain(judged, policy) if chosen(j)]
    )


def unsplit_decisions(judged: Sequence[Judged], policy: str) -> Share:
    """Return the share of right decisions on files of one skill, where a split file counts as wrong."""
    right = [
        (j.stream, j.parts == 1 and _is_right(j.arrival.parts[0], j.verdicts[policy])) for j in _plain(judged, policy)
    ]
    return share(right)


def false_creations(judged: Sequence[Judged], policy: str) -> Share:
    """Return the share of known skills that were called new."""
    return share([(j.stream, j.verdicts[policy].novel) for j in _plain(judged, policy) if j.arrival.parts[0].known])


def missed_creations(judged: Sequence[Judged], policy: str) -> Share:
    """Return the share of new skills that were called known."""
    return share(
        [(j.stream, not j.verdicts[policy].novel) for j in _plain(judged, policy) if not j.arrival.parts[0].known]
    )


def right_skill(judged: Sequence[Judged], policy: str) -> Share:
    """Return the share of known skills whose nearest library entry has the right label."""
    known = [j for j in _plain(judged, policy) if j.arrival.parts[0].known]
    return share([(j.stream, label_of(j.verdicts[policy].nearest) == j.arrival.parts[0].label) for j in known])


def mixed_parts(judged: Sequence[Judged], policy: str) -> Share:
    """Return the share of right decisions on the parts of mixed files that were split."""
    mixed = [j for j in judged if j.arrival.kind == "mixed"]
    cases = [(j.stream, part, verdicts) for j in mixed for part, verdicts in j.part_verdicts if policy in verdicts]
    return share([(stream, _is_right(part, verdicts[policy])) for stream, part, verdicts in cases])


def split_rightly(judged: Sequence[Judged], least: float = RIGHT) -> Share:
    """Return the share of mixed files split in two with at least a share `least` of the documents in the right part."""
    return share([(j.stream, j.parts == 2 and j.right >= least) for j in judged if j.arrival.kind == "mixed"])


def split_at_all(judged: Sequence[Judged]) -> Share:
    """Return the share of mixed files that were split."""
    return share([(j.stream, j.parts > 1) for j in judged if j.arrival.kind == "mixed"])


def split_wrongly(judged: Sequence[Judged]) -> Share:
    """Return the share of files of one skill that were split."""
    return share([(j.stream, j.parts > 1) for j in _plain(judged)])


def _plain(judged: Sequence[Judged], policy: str | None = None) -> list[Judged]:
    """Return the cases with a file of one skill, optionally only those that a policy decided on."""
    return [j for j in judged if j.arrival.kind != "mixed" and (policy is None or policy in j.verdicts)]


def _is_right(part: Part, verdict: Verdict) -> bool:
    return verdict.novel != part.known
