"""Merging experts: how alike their updates are, which belong together, and the best expert of a given rank for several.

An expert's update of one projection is U = (alpha / r) A B, [inputs, outputs]. Everything here works on the factors, in
float64, and never makes a matrix as large as U.
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
    """Factors whose update (alpha / rank) a b stands for a weighted sum of experts.

    error: ||sum - update||_F / ||sum||_F over all projections, what the truncation to this rank lost; 0 for a zero sum.
    """

    factors: Factors
    rank: int
    alpha: float
    error: float


def inner_product(first: Expert, second: Expert) -> float:
    """Frobenius inner product of two experts' updates, summed over all projections."""
    return float(gram_matrix([first, second])[0, 1])


def gram_matrix(experts: Sequence[Expert]) -> np.ndarray:
    """Inner products of all pairs of updates, float64 [n, n], from <A1 B1, A2 B2> = sum((A1^T A2) * (B1 B2^T))."""
    starts = np.cumsum([0, *(expert.rank for expert in experts)])[:-1]
    found = np.zeros((len(experts), len(experts)))
    for _, _, a, b in _stacked(experts, np.ones(len(experts))):
        by_rank = (a.T @ a) * (b @ b.T)
        found += np.add.reduceat(np.add.reduceat(by_rank, starts, axis=0), starts, axis=1)
    return found


def distances(experts: Sequence[Expert]) -> np.ndarray:
    """||U_i - U_j||_F / sqrt(||U_i||^2 + ||U_j||^2) of all pairs, float64 [n, n].

    0 for equal updates, 1 for orthogonal ones, sqrt(2) for opposite ones. Two zero updates are equal.
    """
    if not experts:
        return np.zeros((0, 0))
    products = gram_matrix(experts)
    energy = np.diag(products)[:, None] + np.diag(products)[None, :]
    difference = np.maximum(energy - 2 * products, 0)
    found = np.sqrt(np.divide(difference, energy, out=np.zeros_like(energy), where=energy > 0))
    np.fill_diagonal(found, 0)
    return found


def clusters(distance: np.ndarray, candidates: Sequence[int], limit: float) -> list[list[int]]:
    """Partition candidates, indices into distance [n, n], by agglomerative clustering with average linkage.

    The two groups whose members are nearest on average are joined while that mean distance is at most `limit`. Groups
    and members are in ascending order; a candidate near no other is a group by itself.
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
    """The best approximation of sum_i weights_i U_i by one expert's factors of this rank and alpha.

    By projection a truncated singular value decomposition (Eckart and Young 1936), of the small matrix between the
    orthogonal factors of the concatenated A and B^T. Columns beyond the sum's own rank are zero.
    """
    factors: Factors = {}
    lost = total = 0.0
    for layer, name, a, b in _stacked(experts, weights):
        left, values, right = _svd(a, b)
        lost, total = lost + float(np.square(values[rank:]).sum()), total + float(np.square(values).sum())
        root = np.sqrt(values[:rank] * rank / alpha)
        spare = (0, rank - len(root))
        new_a = np.pad(left[:, :rank] * root, ((0, 0), spare)).astype(np.float32)
        new_b = np.pad(root[:, None] * right[:rank], (spare, (0, 0))).astype(np.float32)
        factors.setdefault(layer, {})[name] = (new_a, new_b)
    return MergedFactors(factors, rank, alpha, float(np.sqrt(lost / total)) if total else 0.0)


def mean_expert(experts: Sequence[Expert], rank: int, alpha: float, shapes: Shapes, key: mx.array) -> Expert:
    """A new expert that starts from the mean of some experts' updates, as much of it as its rank holds: what they share adds
    up, what each has for itself fades (Wortsman et al. 2022, "Model soups", of adapters)."""
    weights = [1 / len(experts)] * len(experts)
    return expert_from_factors(merge_factors(experts, weights, rank, alpha), shapes, key)


def expert_from_factors(found: MergedFactors, shapes: Shapes, key: mx.array) -> Expert:
    """A new expert with merged factors.

    A rank that the sum left empty keeps the A drawn from `key` beside its zero B, as in any new expert: with both zero
    it could never learn.
    """
    expert = Expert(shapes, found.rank, found.alpha, key)
    for layer, named in found.factors.items():
        for name, (a, b) in named.items():
            own = expert.layers[layer][name]
            own.lora_b = mx.array(b)
            own.lora_a = mx.where((own.lora_b != 0).any(axis=1), mx.array(a), own.lora_a)
    mx.eval(expert.parameters())
    return expert


def _stacked(
    experts: Sequence[Expert], weights: Sequence[float] | np.ndarray
) -> Iterator[tuple[int, str, np.ndarray, np.ndarray]]:
    """By layer and projection a [inputs, R] and b [R, outputs], float64, whose product is sum_i weights_i U_i."""
    laid_out = [expert.layers for expert in experts]
    for layer, named in enumerate(laid_out[0]):
        for name in named:
            parts = [layers[layer][name] for layers in laid_out]
            scaled = [
                weight * expert.scale * np.array(part.lora_a, np.float64)
                for part, expert, weight in zip(parts, experts, weights, strict=True)
            ]
            b = [np.array(part.lora_b, np.float64) for part in parts]
            yield layer, name, np.concatenate(scaled, axis=1), np.concatenate(b)


def _svd(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Singular value decomposition of a b, as many values as are not rounding errors."""
    (q_a, r_a), (q_b, r_b) = np.linalg.qr(a), np.linalg.qr(b.T)
    left, values, right = np.linalg.svd(r_a @ r_b.T, full_matrices=False)
    rounding = max(a.shape[0], b.shape[1]) * np.finfo(np.float64).eps * np.linalg.norm(r_a) * np.linalg.norm(r_b)
    count = int((values > rounding).sum())
    return q_a @ left[:, :count], values[:count], right[:count] @ q_b.T
