"""Is a skill's file a mixture of several skills, and which document belongs to which?

Documents are compared one by one in the space of skill embeddings. Their graph of nearest neighbours is cut in two where
that separates least (Shi and Malik 2000, Normalized Cuts). Every set of documents can be cut, so two things must hold
before a file counts as mixed: few neighbours are separated, which single skills do not allow, however wide; and the parts
differ as two skills do, on documents that the cut has not seen. Parts are cut again by the same rule.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dylora_mlx.config import Growth
from dylora_mlx.growth.embedding import Space, normalised
from dylora_mlx.growth.library import Library

CUT = 0.23
"""Largest normalised cut of a mixture: 0 if no document has a neighbour in the other part, 1 for neighbours at random."""
ALIKE = 0.5
"""Parts whose embeddings have a larger cosine are one skill, also where growth.threshold is higher."""
NEIGHBOURS = 1 / 8
"""Nearest neighbours of a document in the graph, as a share of all documents."""
SMALLEST = 0.15
"""Share of the documents that a cut leaves on either side, at least."""
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
    weights float64 [k, K] and offsets float64 [k]: of the linear discriminant that assigns other documents; space: where
    all of this is.
    """

    labels: np.ndarray
    centres: np.ndarray
    weights: np.ndarray
    offsets: np.ndarray
    space: Space

    @property
    def parts(self) -> int:
        return len(self.centres)

    def assign(self, means: np.ndarray) -> np.ndarray:
        """The part of each of some other documents, int64 [m], from their mean states [m, D]."""
        return (self.space(means) @ self.weights.T + self.offsets).argmax(1)


def partition(means: np.ndarray, space: Space, growth: Growth, rng: np.random.Generator) -> Partition:
    """Find the skills that document means [n, D] are a mixture of; one part if they are of one skill.

    No part has fewer than growth.min_samples documents.
    """
    points = space(means)
    used = np.sort(rng.permutation(len(points))[:MOST])
    least = max(2, round(growth.min_samples * len(used) / max(1, len(points))))
    groups = sorted(_parts(points[used], least, min(ALIKE, growth.threshold), rng), key=len, reverse=True)
    labels = np.zeros(len(used), int)
    for number, group in enumerate(groups):
        labels[group] = number
    weights, offsets = _discriminant(points[used], labels)
    found = (points @ weights.T + offsets).argmax(1)
    found[used] = labels
    centres = np.stack([space(means[found == number].mean(0)) for number in range(len(groups))])
    return Partition(found, centres, weights, offsets, space)


def _parts(points: np.ndarray, least: int, limit: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Indices of the documents of each part, cut in two again and again."""
    everything = [np.arange(len(points))]
    if len(points) < 2 * least:
        return everything
    sides, value = normalised_cut(points)
    first, second = np.flatnonzero(~sides), np.flatnonzero(sides)
    if value > CUT or min(len(first), len(second)) < least or likeness(points, rng) >= limit:
        return everything
    return [side[inner] for side in (first, second) for inner in _parts(points[side], least, limit, rng)]


def likeness(points: np.ndarray, rng: np.random.Generator) -> float:
    """Cosine of the embeddings of the two parts of documents, unit vectors [n, K], that the cut has not seen.

    Halves are cut, and the discriminant of one half's parts divides the other half, whose parts are compared.
    """
    found = []
    for _ in range(HALVINGS):
        halves = np.array_split(rng.permutation(len(points)), 2)
        for own, other in (halves, halves[::-1]):
            weights, offsets = _discriminant(points[own], normalised_cut(points[own])[0].astype(int))
            sides = (points[other] @ weights.T + offsets).argmax(1)
            sums = normalised(np.stack([points[other][sides == side].sum(0) for side in (0, 1)]))
            found.append(float(sums[0] @ sums[1]) if 0 < sides.sum() < len(sides) else 1.0)
    return float(np.median(found))


def normalised_cut(points: np.ndarray) -> tuple[np.ndarray, float]:
    """The sides bool [n] of the best cut of documents, unit vectors [n, K], along the second eigenvector of the graph of
    their nearest neighbours, and its value: cut / volume, summed over both sides."""
    count = len(points)
    cosines = points @ points.T
    np.fill_diagonal(cosines, -np.inf)
    neighbours = min(count - 1, max(5, round(NEIGHBOURS * count)))
    graph = np.zeros((count, count))
    graph[np.arange(count)[:, None], np.argpartition(-cosines, neighbours - 1, axis=1)[:, :neighbours]] = 0.5
    graph += graph.T
    degrees = graph.sum(1)
    scale = 1 / np.sqrt(degrees)
    order = np.argsort(np.linalg.eigh(graph * scale[:, None] * scale)[1][:, -2] * scale)
    volumes = degrees[order].cumsum()
    inside = graph[order][:, order].cumsum(0).cumsum(1).diagonal()
    between = volumes - inside
    values = between / volumes + between / np.maximum(volumes[-1] - volumes, 1e-12)
    smallest = max(1, round(SMALLEST * count))
    best = smallest - 1 + int(values[smallest - 1 : count - smallest].argmin())
    sides = np.zeros(count, bool)
    sides[order[best + 1 :]] = True
    return sides, float(values[best])


def _discriminant(points: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights [k, K] and offsets [k] of a regularised linear discriminant (Friedman 1989) with equal priors."""
    centres = np.stack([points[labels == number].mean(0) for number in range(labels.max() + 1)])
    rest = points - centres[labels]
    covariance = rest.T @ rest / len(points)
    ridge = max(RIDGE * np.trace(covariance) / len(covariance), 1e-12)
    weights = np.linalg.solve(covariance + ridge * np.eye(len(covariance)), centres.T).T
    return weights, -0.5 * np.sum(weights * centres, axis=1)


def novelty(means: np.ndarray, library: Library, space: Space, growth: Growth) -> float:
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


def document_scores(means: np.ndarray, library: Library, space: Space, growth: Growth) -> np.ndarray:
    """Novelty of each document, float64 [n], higher for what is newer, from means [n, D] and a library that is not empty.

    similarity: the largest cosine to an entry, negative. energy: the free energy -T log sum_i exp(cos_i / T) over the
    entries (Liu et al. 2020, Energy-based Out-of-distribution Detection).
    """
    known = space(np.stack([entry.centre for entry in library.entries]))
    return _scores(space(means), known, growth)


def _scores(points: np.ndarray, known: np.ndarray, growth: Growth) -> np.ndarray:
    cosines = points @ known.T
    if growth.document_novelty == "similarity":
        return -cosines.max(1)
    top = cosines.max(1, keepdims=True)
    return -(top[:, 0] + TEMPERATURE * np.log(np.exp((cosines - top) / TEMPERATURE).sum(1)))
