"""Split a skill's file that mixes several skills, and assign its documents to the parts.

Documents are compared pairwise, by their embeddings and, if token ids are given, by their tokens too. Their graph of
nearest neighbours is cut in two by normalised cut (Shi and Malik 2000). Any set of documents can be cut, so a file
counts as mixed only if two conditions hold. The cut separates few neighbours: single skills, however broad, do not
allow that. And the parts differ as two skills do, on documents that the cut has not seen. Parts are cut again by the
same rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dylora_mlx.config import GrowthConfig
from dylora_mlx.growth.library import Library
from dylora_mlx.growth.novelty import bag_of_tokens
from dylora_mlx.growth.novelty.bag_of_tokens import BagOfTokens
from dylora_mlx.growth.novelty.embedding import EmbeddingSpace, normalize

CUT, CUT_WITH_TOKENS = 0.23, 0.40
"""Largest normalised cut of a mixture, without and with tokens.

The value is 0 if no document has a neighbour in the other part, and 1 if neighbours are random. These limits and
MAX_PART_SIMILARITY were chosen on the development half of tools/benchmarks/novelty_benchmark.py.
"""
MAX_PART_SIMILARITY = 0.63
"""Parts whose embeddings have at least this cosine are one skill, or at least growth.threshold if that is lower."""
TOKEN_WEIGHT = 9.0
"""Weight of the cosine of tokens relative to the cosine of states, which varies more."""
NEIGHBOUR_FRACTION = 1 / 8
"""Nearest neighbours of a document in the graph, as a share of all documents."""
MIN_PART_FRACTION = 0.2
"""Smallest share of the documents in a part: every file has a few outliers."""
HALVINGS = 2
"""Random halvings over which the similarity of the parts is measured."""
RIDGE = 1.0
"""Regularisation of the discriminant: added to the covariance within parts, as a multiple of its mean eigenvalue."""
MAX_CLUSTERED = 512
"""Maximum number of documents in which parts are searched; the others are assigned to the parts."""
FALSE_ALARM = 0.05
"""Share of the library's own documents that count as novel when each is compared separately."""
MAX_SCORED = 64
"""Maximum number of entries whose own documents tell which scores are usual."""
TEMPERATURE = 0.1
"""Temperature of the free energy, in units of the cosine."""


class Partition(NamedTuple):
    """Parts of a file in order of size, the largest first, with a linear rule that assigns other documents.

    The rule's features are embeddings in `space`, or token shares if the parts were found with tokens.
    """

    labels: np.ndarray
    """Part of each document, int64 [n]."""
    centres: np.ndarray
    """Embeddings of the parts, float64 [k, K], of unit length."""
    weights: np.ndarray
    """Weights of the rule, float64 [k, F]."""
    offsets: np.ndarray
    """Offsets of the rule, float64 [k]."""
    space: EmbeddingSpace
    vocabulary: np.ndarray | None = None
    """Token ids of the rule's features, [F]; None if no tokens were used."""

    @property
    def parts(self) -> int:
        """The number of parts."""
        return len(self.centres)

    def assign(self, means: np.ndarray, tokens: Sequence[np.ndarray] | None = None) -> np.ndarray:
        """Assign other documents to the parts, int64 [m].

        Uses their mean states [m, D], or their token ids if the parts were found with tokens. Raises ValueError if
        `tokens` is needed but missing.
        """
        if self.vocabulary is None:
            return (self.space(means) @ self.weights.T + self.offsets).argmax(1)
        if tokens is None:
            raise ValueError("the parts were found with tokens; assign needs tokens too")
        shares = BagOfTokens(self.vocabulary, bag_of_tokens.presence(tokens, self.vocabulary)).shares()
        return (shares @ self.weights.T + self.offsets).argmax(1)


class EmbeddedDocuments(NamedTuple):
    """Documents to split: their embeddings and, optionally, their tokens."""

    points: np.ndarray
    """Embeddings, float64 [n, K]."""
    bag: BagOfTokens | None
    """Tokens of the documents; None if only embeddings are compared."""

    def take(self, chosen: np.ndarray) -> EmbeddedDocuments:
        """Select documents by index."""
        return EmbeddedDocuments(self.points[chosen], None if self.bag is None else self.bag.take(chosen))

    def similarities(self) -> np.ndarray:
        """Return pairwise similarities, [n, n]: cosines of the embeddings plus weighted cosines of the tokens."""
        cosines = self.points @ self.points.T
        return cosines if self.bag is None else cosines + TOKEN_WEIGHT * self.bag.cosines()

    def fit_rule(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Fit a linear rule to the parts; return its weights [k, F] and offsets [k].

        The rule is naive Bayes if there are tokens, otherwise a linear discriminant of the embeddings.
        """
        if self.bag is None:
            return discriminant(self.points, labels)
        return self.bag.class_weights(labels), np.zeros(labels.max() + 1)

    def apply_rule(self, rule: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Assign each document to a part by a rule of `fit_rule`, int64 [n]."""
        features = self.points if self.bag is None else self.bag.shares()
        return (features @ rule[0].T + rule[1]).argmax(1)


def find_parts(
    means: np.ndarray,
    space: EmbeddingSpace,
    growth: GrowthConfig,
    rng: np.random.Generator,
    tokens: Sequence[np.ndarray] | None = None,
) -> Partition:
    """Split documents into one part per skill; a single part if they are of one skill.

    No part has fewer than growth.min_samples documents.

    Args:
        means: Document means, [n, D].
        space: Embedding space of the document means.
        growth: Options: min_samples and threshold.
        rng: Generator of the sample and of the halvings.
        tokens: Token ids of each document, int [any]; None compares embeddings alone.
    """
    bag = None if tokens is None else BagOfTokens.from_documents(tokens)
    everything = EmbeddedDocuments(space(means), bag if bag is not None and len(bag.vocabulary) else None)
    used = np.sort(rng.permutation(len(means))[:MAX_CLUSTERED])
    documents = everything.take(used)
    min_documents = max(2, round(growth.min_samples * len(used) / max(1, len(means))))
    limit = MAX_PART_SIMILARITY if growth.threshold is None else min(MAX_PART_SIMILARITY, growth.threshold)
    groups = sorted(_split_recursively(documents, min_documents, limit, rng), key=len, reverse=True)
    labels = np.zeros(len(used), int)
    for number, group in enumerate(groups):
        labels[group] = number
    rule = documents.fit_rule(labels)
    # Sampled documents keep the part that they were clustered into; the rule assigns the others.
    all_labels = everything.apply_rule(rule)
    all_labels[used] = labels
    centres = np.stack([space(means[all_labels == number].mean(0)) for number in range(len(groups))])
    return Partition(all_labels, centres, *rule, space, None if everything.bag is None else everything.bag.vocabulary)


def _split_recursively(
    documents: EmbeddedDocuments, min_documents: int, limit: float, rng: np.random.Generator
) -> list[np.ndarray]:
    """Return the indices of the documents of each part, by cutting in two recursively."""
    everything = [np.arange(len(documents.points))]
    if len(documents.points) < 2 * min_documents:
        return everything
    labels, value = best_cut(documents)
    parts = [np.flatnonzero(labels == side) for side in (0, 1)]
    max_cut = CUT if documents.bag is None else CUT_WITH_TOKENS
    min_size = max(min_documents, MIN_PART_FRACTION * len(labels))
    if value > max_cut or min(map(len, parts)) < min_size or part_similarity(documents, rng) >= limit:
        return everything
    return [
        part[inner] for part in parts for inner in _split_recursively(documents.take(part), min_documents, limit, rng)
    ]


def best_cut(documents: EmbeddedDocuments) -> tuple[np.ndarray, float]:
    """Cut documents in two; return each document's side, int64 [n] of 0 and 1, and the value of the normalised cut.

    With tokens, the sides are refined by reassigning documents. The value is that of the cut before.
    """
    sides, value = normalised_cut(documents.similarities())
    labels = sides.astype(int)
    return labels if documents.bag is None else documents.bag.reassigned(labels), value


def part_similarity(documents: EmbeddedDocuments, rng: np.random.Generator) -> float:
    """Return the cosine of the two parts' embeddings, on documents that the cut has not seen.

    The documents are halved. One half is cut, a rule fitted to its parts divides the other half, and the parts of the
    other half are compared. The result is the median over both directions and HALVINGS random halvings.
    """
    cosines = []
    for _ in range(HALVINGS):
        halves = [documents.take(half) for half in np.array_split(rng.permutation(len(documents.points)), 2)]
        for fitted, other in (halves, halves[::-1]):
            sides = other.apply_rule(fitted.fit_rule(best_cut(fitted)[0]))
            sums = normalize(np.stack([other.points[sides == side].sum(0) for side in (0, 1)]))
            # With an empty side there is a single part: count it as identical.
            cosines.append(float(sums[0] @ sums[1]) if 0 < sides.sum() < len(sides) else 1.0)
    return float(np.median(cosines))


def normalised_cut(similarities: np.ndarray) -> tuple[np.ndarray, float]:
    """Cut the nearest-neighbour graph of documents in two, given their similarities [n, n].

    Returns the sides, bool [n], of the best cut along the graph's second eigenvector, and its value: cut / volume,
    summed over both sides.
    """
    count = len(similarities)
    others = np.where(np.eye(count, dtype=bool), -np.inf, similarities)
    neighbours = min(count - 1, max(5, round(NEIGHBOUR_FRACTION * count)))
    graph = np.zeros((count, count))
    graph[np.arange(count)[:, None], np.argpartition(-others, neighbours - 1, axis=1)[:, :neighbours]] = 0.5
    # Symmetric weights: 1 between mutual nearest neighbours, 0.5 if only one counts the other.
    graph += graph.T
    scale = 1 / np.sqrt(graph.sum(1))
    order = np.argsort(np.linalg.eigh(graph * scale[:, None] * scale)[1][:, -2] * scale)
    # Value of every cut into the first i and the remaining documents in this order, from cumulative sums.
    volumes = graph.sum(1)[order].cumsum()
    between = volumes - graph[order][:, order].cumsum(0).cumsum(1).diagonal()
    values = between / volumes + between / np.maximum(volumes[-1] - volumes, 1e-12)
    min_size = max(1, round(MIN_PART_FRACTION * count))
    best = min_size - 1 + int(values[min_size - 1 : count - min_size].argmin())
    sides = np.zeros(count, bool)
    sides[order[best + 1 :]] = True
    return sides, float(values[best])


def discriminant(points: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return weights [k, K] and offsets [k] of a regularised linear discriminant (Friedman 1989) with equal priors."""
    centres = np.stack([points[labels == number].mean(0) for number in range(labels.max() + 1)])
    rest = points - centres[labels]
    covariance = rest.T @ rest / len(points)
    ridge = max(RIDGE * np.trace(covariance) / len(covariance), 1e-12)
    weights = np.linalg.solve(covariance + ridge * np.eye(len(covariance)), centres.T).T
    return weights, -0.5 * np.sum(weights * centres, axis=1)


def novel_fraction(means: np.ndarray, library: Library, space: EmbeddingSpace, growth: GrowthConfig) -> float:
    """Return the share of documents that are novel when each is compared with the library separately.

    A document, given by its row in `means` [n, D], is novel if it scores higher than all but a share FALSE_ALARM of the
    library's own documents: those of at most MAX_SCORED entries, evenly chosen. The share is 1 for an empty library.
    """
    if not len(library):
        return 1.0
    known = space(np.stack([entry.centre for entry in library.entries]))
    library_scores = []
    for number in range(0, len(library), math.ceil(len(library) / MAX_SCORED)):
        documents = library.entries[number].means.astype(np.float64)
        if len(documents) < 2:
            continue
        points = space(documents)
        cosines = points @ known.T
        # Leave each document out of its own skill's centre, or it would seem less novel than an unseen document.
        centres = space((documents.sum(0) - documents) / (len(documents) - 1))
        cosines[:, number] = np.sum(points * centres, axis=1)
        library_scores.append(_scores(cosines, growth))
    if not library_scores:
        return 1.0
    limit = np.quantile(np.concatenate(library_scores), 1 - FALSE_ALARM)
    return float(np.mean(document_scores(means, library, space, growth) > limit))


def document_scores(means: np.ndarray, library: Library, space: EmbeddingSpace, growth: GrowthConfig) -> np.ndarray:
    """Return the novelty score of each document, float64 [n], from means [n, D]; a higher score is more novel.

    growth.document_novelty chooses the score. `similarity` is the negative largest cosine to an entry. `energy` is the
    free energy -T log sum_i exp(cos_i / T) over the entries (Liu et al. 2020, Energy-based Out-of-distribution
    Detection). The library must not be empty.
    """
    known = space(np.stack([entry.centre for entry in library.entries]))
    return _scores(space(means) @ known.T, growth)


def _scores(cosines: np.ndarray, growth: GrowthConfig) -> np.ndarray:
    if growth.document_novelty == "similarity":
        return -cosines.max(1)
    # Log-sum-exp relative to the maximum, so that exp does not overflow.
    top = cosines.max(1, keepdims=True)
    return -(top[:, 0] + TEMPERATURE * np.log(np.exp((cosines - top) / TEMPERATURE).sum(1)))
