"""Merging of experts: distances between their LoRA updates, clustering, and low-rank approximation of their sum.

An expert's update of one projection is U = (alpha / r) A B, [inputs, outputs]. All functions work on the factors, in
float64, and never materialise a matrix of the size of U.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx.model.experts.lora import Expert, Shapes

Factors = dict[int, dict[str, tuple[np.ndarray, np.ndarray]]]
"""Factors a float32 [inputs, r] and b float32 [r, outputs] by layer and projection."""


class MergedFactors(NamedTuple):
    """LoRA factors whose update (alpha / rank) a b approximates a weighted sum of experts."""

    factors: Factors
    rank: int
    alpha: float
    error: float
    """Relative truncation error ||sum - update||_F / ||sum||_F over all projections; 0 for a zero sum."""


def inner_product(first: Expert, second: Expert) -> float:
    """Return the Frobenius inner product of two experts' updates, summed over all projections."""
    return float(gram_matrix([first, second])[0, 1])


def gram_matrix(experts: Sequence[Expert]) -> np.ndarray:
    """Return the inner products of all pairs of updates, float64 [n, n].

    Computed from the factors: <A1 B1, A2 B2> = sum((A1^T A2) * (B1 B2^T)).
    """
    starts = np.cumsum([0, *(expert.rank for expert in experts)])[:-1]
    products = np.zeros((len(experts), len(experts)))
    for _, _, a, b in _concatenated_factors(experts, np.ones(len(experts))):
        by_rank = (a.T @ a) * (b @ b.T)
        # Sum the [R, R] products over each expert's block of ranks.
        products += np.add.reduceat(np.add.reduceat(by_rank, starts, axis=0), starts, axis=1)
    return products


def distances(experts: Sequence[Expert]) -> np.ndarray:
    """Return ||U_i - U_j||_F / sqrt(||U_i||^2 + ||U_j||^2) of all pairs, float64 [n, n].

    The distance is 0 for equal updates, 1 for orthogonal ones and sqrt(2) for opposite ones. Two zero updates are
    equal.
    """
    if not experts:
        return np.zeros((0, 0))
    products = gram_matrix(experts)
    energy = np.diag(products)[:, None] + np.diag(products)[None, :]
    # Rounding can make the squared distance of nearly equal updates negative.
    difference = np.maximum(energy - 2 * products, 0)
    relative = np.sqrt(np.divide(difference, energy, out=np.zeros_like(energy), where=energy > 0))
    np.fill_diagonal(relative, 0)
    return relative


def clusters(distance: np.ndarray, candidates: Sequence[int], limit: float) -> list[list[int]]:
    """Partition experts by agglomerative clustering with average linkage.

    The two groups with the smallest mean distance between members are joined as long as that distance is at most
    `limit`.

    Args:
        distance: Distances between all experts, [n, n].
        candidates: Indices into `distance` of the experts to cluster.
        limit: Largest mean distance at which two groups are joined.

    Returns:
        The groups. Groups and their members are in ascending order; a candidate close to no other is a group of one.
    """
    groups = [[index] for index in candidates]
    linkage = distance[np.ix_(candidates, candidates)].astype(np.float64)
    np.fill_diagonal(linkage, np.inf)
    while len(groups) > 1:
        i, j = sorted(int(k) for k in np.unravel_index(np.argmin(linkage), linkage.shape))
        if not linkage[i, j] <= limit:
            break
        sizes = len(groups[i]), len(groups[j])
        linkage[i] = linkage[:, i] = (sizes[0] * linkage[i] + sizes[1] * linkage[j]) / sum(sizes)
        linkage = np.delete(np.delete(linkage, j, axis=0), j, axis=1)
        groups[i] += groups.pop(j)
    return sorted(sorted(group) for group in groups)


def merge_factors(experts: Sequence[Expert], weights: Sequence[float], rank: int, alpha: float) -> MergedFactors:
    """Return the best approximation of sum_i weights_i U_i by factors of the given LoRA rank and alpha.

    Each projection uses a truncated singular value decomposition (Eckart and Young 1936) of the small matrix between
    the orthogonal factors of the concatenated A and B^T. Ranks beyond the rank of the sum are zero in both factors.
    """
    factors: Factors = {}
    lost = total = 0.0
    for layer, name, a, b in _concatenated_factors(experts, weights):
        left, values, right = _svd(a, b)
        lost, total = lost + float(np.square(values[rank:]).sum()), total + float(np.square(values).sum())
        # Split each singular value evenly between A and B, and divide out the scale alpha / rank.
        root = np.sqrt(values[:rank] * rank / alpha)
        padding = (0, rank - len(root))
        new_a = np.pad(left[:, :rank] * root, ((0, 0), padding)).astype(np.float32)
        new_b = np.pad(root[:, None] * right[:rank], (padding, (0, 0))).astype(np.float32)
        factors.setdefault(layer, {})[name] = (new_a, new_b)
    return MergedFactors(factors, rank, alpha, float(np.sqrt(lost / total)) if total else 0.0)


def mean_expert(experts: Sequence[Expert], rank: int, alpha: float, shapes: Shapes, key: mx.array) -> Expert:
    """Return a new expert that starts from the mean of other experts' updates, truncated to its rank.

    In the mean, shared directions add up and directions of a single expert fade (Wortsman et al. 2022, "Model soups",
    applied to adapters).
    """
    weights = [1 / len(experts)] * len(experts)
    return expert_from_factors(merge_factors(experts, weights, rank, alpha), shapes, key)


def expert_from_factors(merged: MergedFactors, shapes: Shapes, key: mx.array) -> Expert:
    """Return a new expert with merged factors.

    A rank that is empty in the sum keeps the random A drawn from `key`, with its zero B, as in any new expert. If both
    were zero, that rank would get no gradient.
    """
    expert = Expert(shapes, merged.rank, merged.alpha, key)
    for layer, named in merged.factors.items():
        for name, (a, b) in named.items():
            lora = expert.layers[layer][name]
            lora.lora_b = mx.array(b)
            lora.lora_a = mx.where((lora.lora_b != 0).any(axis=1), mx.array(a), lora.lora_a)
    mx.eval(expert.parameters())
    return expert


def _concatenated_factors(
    experts: Sequence[Expert], weights: Sequence[float] | np.ndarray
) -> Iterator[tuple[int, str, np.ndarray, np.ndarray]]:
    """Yield layer, projection, a [inputs, R] and b [R, outputs], float64, with a b = sum_i weights_i U_i.

    R is the sum of the experts' ranks.
    """
    # Read `layers` once per expert: that of an offloaded expert opens its file at every access.
    layers_by_expert = [expert.layers for expert in experts]
    for layer, named in enumerate(layers_by_expert[0]):
        for name in named:
            parts = [layers[layer][name] for layers in layers_by_expert]
            scaled = [
                weight * expert.scale * np.array(part.lora_a, np.float64)
                for part, expert, weight in zip(parts, experts, weights, strict=True)
            ]
            b = [np.array(part.lora_b, np.float64) for part in parts]
            yield layer, name, np.concatenate(scaled, axis=1), np.concatenate(b)


def _svd(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the singular value decomposition of a b, without singular values that are rounding errors.

    QR decompositions of a and b^T reduce the problem to a small matrix of at most [R, R].
    """
    (q_a, r_a), (q_b, r_b) = np.linalg.qr(a), np.linalg.qr(b.T)
    left, values, right = np.linalg.svd(r_a @ r_b.T, full_matrices=False)
    rounding = max(a.shape[0], b.shape[1]) * np.finfo(np.float64).eps * np.linalg.norm(r_a) * np.linalg.norm(r_b)
    count = int((values > rounding).sum())
    return q_a @ left[:, :count], values[:count], right[:count] @ q_b.T
