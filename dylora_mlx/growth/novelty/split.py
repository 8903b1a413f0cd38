"""Is a skill's file a mixture of several skills, and which document belongs to which?

Documents are compared one by one: in the space of skill embeddings and, where their tokens are given, by these too. Their
graph of nearest neighbours is cut in two where that separates least (Shi and Malik 2000, Normalized Cuts). Every set of
documents can be cut, so two things must hold before a file counts as mixed: few neighbours are separated, which single
skills do not allow, however wide; and the parts differ as two skills do, on documents that the cut has not seen. Parts are
cut again by the same rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dylora_mlx.config import GrowthConfig
from dylora_mlx.growth.library import Library
from dylora_mlx.growth.novelty import bag_of_tokens
from dylora_mlx.growth.novelty.bag_of_tokens import BagOfTokens
from dylora_mlx.growth.novelty.embedding import EmbeddingSpace, normalize

CUT, CUT_BY_WORDS = 0.23, 0.34
"""Largest normalised cut of a mixture, without and with tokens: 0 if no document has a neighbour in the other part, 1 for
neighbours at random. This and ALIKE are chosen on the development half of tools/benchmarks/novelty_benchmark.py."""
ALIKE = 0.6
"""Parts whose embeddings have a larger cosine are one skill, also where growth.threshold is higher."""
WORDS = 9.0
"""Weight of a cosine of tokens against a cosine of states, which vary more."""
NEIGHBOURS = 1 / 8
"""Nearest neighbours of a document in the graph, as a share of all documents."""
SMALLEST = 0.2
"""Share of the documents that a part has at least: a handful of odd ones is in every file."""
HALVINGS = 2
"""Random halvings on which the parts' likeness is measured."""
RIDGE = 1.0
"""Added to the documents' covariance within parts, as a multiple of its mean eigenvalue, for the discriminant."""
MOST = 512
"""Documents that the parts are found from; the others are assigned."""
FALSE_ALARM = 0.05
"""Share of the documents of known skills that count as new by themselves."""
TEMPERATURE = 0.1
"""Of the free energy, in units of the cosine."""


class Partition(NamedTuple):
    """Parts of a file in order of size, the largest first.

    labels: the part of each document, int64 [n]; centres: embeddings of the parts, float64 [k, K], of unit length;
    weights float64 [k, F] and offsets float64 [k]: of the linear rule that assigns other documents by their embeddings in
    `space`, or by their tokens out of `vocabulary` [F] where tokens were given.
    """

    labels: np.ndarray
    centres: np.ndarray
    weights: np.ndarray
    offsets: np.ndarray
    space: EmbeddingSpace
    vocabulary: np.ndarray | None = None

    @property
    def parts(self) -> int:
        return len(self.centres)

    def assign(self, means: np.ndarray, tokens: Sequence[np.ndarray] | None = None) -> np.ndarray:
        """The part of each of some other documents, int64 [m], from their mean states [m, D], or from their token ids if
        the parts were found with tokens. Raises ValueError if these are missing."""
        if self.vocabulary is None:
            return (self.space(means) @ self.weights.T + self.offsets).argmax(1)
        if tokens is None:
            raise ValueError("the parts were found with tokens, which assigning needs too")
        shares = BagOfTokens(self.vocabulary, bag_of_tokens.presence(tokens, self.vocabulary)).shares()
        return (shares @ self.weights.T + self.offsets).argmax(1)


class EmbeddedDocuments(NamedTuple):
    """Embeddings of documents, float64 [n, K], and their tokens where they are given."""

    points: np.ndarray
    words: BagOfTokens | None

    def take(self, chosen: np.ndarray) -> EmbeddedDocuments:
        return EmbeddedDocuments(self.points[chosen], None if self.words is None else self.words.take(chosen))

    def likenesses(self) -> np.ndarray:
        """[n, n], larger for documents that are more alike."""
        cosines = self.points @ self.points.T
        return cosines if self.words is None else cosines + WORDS * self.words.cosines()

    def rule(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights [k, F] and offsets [k] that tell the parts apart."""
        if self.words is None:
            return discriminant(self.points, labels)
        return self.words.kinds(labels), np.zeros(labels.max() + 1)

    def by(self, rule: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """The part of each document by such a rule, int64 [n]."""
        features = self.points if self.words is None else self.words.shares()
        return (features @ rule[0].T + rule[1]).argmax(1)


def find_parts(
    means: np.ndarray,
    space: EmbeddingSpace,
    growth: GrowthConfig,
    rng: np.random.Generator,
    tokens: Sequence[np.ndarray] | None = None,
) -> Partition:
    """Find the skills that document means [n, D] are a mixture of; one part if they are of one skill.

    tokens: the token ids of each document, int [any]. No part has fewer than growth.min_samples documents.
    """
    words = None if tokens is None else BagOfTokens.from_documents(tokens)
    everything = EmbeddedDocuments(space(means), words if words is not None and len(words.vocabulary) else None)
    used = np.sort(rng.permutation(len(means))[:MOST])
    documents = everything.take(used)
    least = max(2, round(growth.min_samples * len(used) / max(1, len(means))))
    groups = sorted(_parts(documents, least, min(ALIKE, growth.threshold), rng), key=len, reverse=True)
    labels = np.zeros(len(used), int)
    for number, group in enumerate(groups):
        labels[group] = number
    rule = documents.rule(labels)
    found = everything.by(rule)
    found[used] = labels
    centres = np.stack([space(means[found == number].mean(0)) for number in range(len(groups))])
    return Partition(found, centres, *rule, space, None if everything.words is None else everything.words.vocabulary)


def _parts(documents: EmbeddedDocuments, least: int, limit: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Indices of the documents of each part, cut in two again and again."""
    everything = [np.arange(len(documents.points))]
    if len(documents.points) < 2 * least:
        return everything
    labels, value = best_cut(documents)
    parts = [np.flatnonzero(labels == side) for side in (0, 1)]
    largest = CUT if documents.words is None else CUT_BY_WORDS
    smallest = max(least, SMALLEST * len(labels))
    if value > largest or min(map(len, parts)) < smallest or part_similarity(documents, rng) >= limit:
        return everything
    return [part[inner] for part in parts for inner in _parts(documents.take(part), least, limit, rng)]


def best_cut(documents: EmbeddedDocuments) -> tuple[np.ndarray, float]:
    """The side of each document, int64 [n] of 0 and 1, and the value of the normalised cut."""
    sides, value = normalised_cut(documents.likenesses())
    labels = sides.astype(int)
    return labels if documents.words is None else documents.words.reassigned(labels), value


def part_similarity(documents: EmbeddedDocuments, rng: np.random.Generator) -> float:
    """Cosine of the embeddings of the two parts, on documents that the cut has not seen.

    Halves are cut, and the rule that tells one half's parts apart divides the other half, whose parts are compared.
    """
    found = []
    for _ in range(HALVINGS):
        halves = [documents.take(half) for half in np.array_split(rng.permutation(len(documents.points)), 2)]
        for own, other in (halves, halves[::-1]):
            sides = other.by(own.rule(best_cut(own)[0]))
            sums = normalize(np.stack([other.points[sides == side].sum(0) for side in (0, 1)]))
            found.append(float(sums[0] @ sums[1]) if 0 < sides.sum() < len(sides) else 1.0)
    return float(np.median(found))


def normalised_cut(likenesses: np.ndarray) -> tuple[np.ndarray, float]:
    """The sides bool [n] of the best cut along the second eigenvector of the graph of nearest neighbours, given how alike
    documents are [n, n], and its value: cut / volume, summed over both sides."""
    count = len(likenesses)
    others = np.where(np.eye(count, dtype=bool), -np.inf, likenesses)
    neighbours = min(count - 1, max(5, round(NEIGHBOURS * count)))
    graph = np.zeros((count, count))
    graph[np.arange(count)[:, None], np.argpartition(-others, neighbours - 1, axis=1)[:, :neighbours]] = 0.5
    graph += graph.T
    scale = 1 / np.sqrt(graph.sum(1))
    order = np.argsort(np.linalg.eigh(graph * scale[:, None] * scale)[1][:, -2] * scale)
    volumes = graph.sum(1)[order].cumsum()
    between = volumes - graph[order][:, order].cumsum(0).cumsum(1).diagonal()
    values = between / volumes + between / np.maximum(volumes[-1] - volumes, 1e-12)
    smallest = max(1, round(SMALLEST * count))
    best = smallest - 1 + int(values[smallest - 1 : count - smallest].argmin())
    sides = np.zeros(count, bool)
    sides[order[best + 1 :]] = True
    return sides, float(values[best])


def discriminant(points: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights [k, K] and offsets [k] of a regularised linear discriminant (Friedman 1989) with equal priors."""
    centres = np.stack([points[labels == number].mean(0) for number in range(labels.max() + 1)])
    rest = points - centres[labels]
    covariance = rest.T @ rest / len(points)
    ridge = max(RIDGE * np.trace(covariance) / len(covariance), 1e-12)
    weights = np.linalg.solve(covariance + ridge * np.eye(len(covariance)), centres.T).T
    return weights, -0.5 * np.sum(weights * centres, axis=1)


def novel_fraction(means: np.ndarray, library: Library, space: EmbeddingSpace, growth: GrowthConfig) -> float:
    """Share of documents that are new by themselves, from their means [n, D]: those that score higher than all but a
    share FALSE_ALARM of the library's own documents do. 1 for an empty library."""
    if not len(library):
        return 1.0
    own = []
    for entry in library.entries:
        others = [other.centre for other in library.entries if other is not entry]
        total, count = entry.means.astype(np.float64).sum(0), len(entry.means)
        for document in entry.means if count > 1 else ():
            # A document's skill is known without the document itself.
            known = space(np.stack([(total - document) / (count - 1), *others]))
            own.append(_scores(space(document[None]), known, growth)[0])
    scores = document_scores(means, library, space, growth)
    return float(np.mean(scores > np.quantile(own, 1 - FALSE_ALARM))) if own else 1.0


def document_scores(means: np.ndarray, library: Library, space: EmbeddingSpace, growth: GrowthConfig) -> np.ndarray:
    """Novelty of each document, float64 [n], higher for what is newer, from means [n, D] and a library that is not empty.

    similarity: the largest cosine to an entry, negative. energy: the free energy -T log sum_i exp(cos_i / T) over the
    entries (Liu et al. 2020, Energy-based Out-of-distribution Detection).
    """
    known = space(np.stack([entry.centre for entry in library.entries]))
    return _scores(space(means), known, growth)


def _scores(points: np.ndarray, known: np.ndarray, growth: GrowthConfig) -> np.ndarray:
    cosines = points @ known.T
    if growth.document_novelty == "similarity":
        return -cosines.max(1)
    top = cosines.max(1, keepdims=True)
    return -(top[:, 0] + TEMPERATURE * np.log(np.exp((cosines - top) / TEMPERATURE).sum(1)))
