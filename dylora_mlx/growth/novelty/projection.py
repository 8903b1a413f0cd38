"""A projection head that sharpens skill embeddings: a residual MLP, trained contrastively on skills that are known.

Two random batches of one skill's documents should lie close together, and far from batches of other skills and from
batches that mix several: InfoNCE (van den Oord et al. 2018) in SimCLR's symmetric form (Chen et al. 2020, section 2.1).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import AdamW
from mlx.utils import tree_flatten

from dylora_mlx.errors import UserError
from dylora_mlx.growth.novelty.embedding import Reference, normalize
from dylora_mlx.system.files import atomic_write, tensor_offsets

FORMAT = "dylora projection head 1"
MIN_DOCUMENTS = 16
"""Documents that a skill needs: four of them are held out, two batches of two."""
HELD_OUT = 0.25
"""Share of each skill's documents that are held out."""
FOLDS, CHOICES, ROUNDS = 4, 6, 8
"""Of the cross-validation over skills: folds, numbers of steps to choose from, and draws of batches behind a loss."""


class ProjectionHead(nn.Module):
    """normalise(x + W2 gelu(W1 x + b)), for x of unit length.

    W2 starts at zero, so an untrained head changes nothing, and weight decay pulls a trained one back towards that.
    """

    def __init__(self, dims: int, hidden: int, rng: np.random.Generator):
        super().__init__()
        self.expand, self.contract = nn.Linear(dims, hidden), nn.Linear(hidden, dims, bias=False)
        self.expand.weight = mx.array(rng.normal(size=(hidden, dims)).astype(np.float32))
        self.expand.bias = mx.zeros(hidden)
        self.contract.weight = mx.zeros((dims, hidden))

    def __call__(self, embeddings: np.ndarray) -> np.ndarray:
        """Unit vectors float32 [..., D] of unit vectors [..., D], the centred and whitened embeddings."""
        return np.array(self.project(mx.array(embeddings.astype(np.float32))))

    def project(self, x: mx.array) -> mx.array:
        """The same for MLX's arrays, float32."""
        moved = x + self.contract(nn.gelu(self.expand(x)))
        return moved / mx.maximum(mx.linalg.norm(moved, axis=-1, keepdims=True), 1e-12)

    def save(self, path: Path, fingerprint: str, whitening: float) -> None:
        """Write a safetensors file. fingerprint: of the base whose embeddings, whitened with strength
        `whitening`, the head was trained on."""
        weights = dict(tree_flatten(self.parameters()))
        about = {"format": FORMAT, "base": fingerprint, "whitening": repr(whitening), "sha256": _digest(weights)}
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary, temporary.open("wb") as file:  # MLX changes a name without its extension
            mx.save_safetensors(file, weights, metadata=about)


def load_head(path: Path, fingerprint: str, whitening: float, dims: int) -> ProjectionHead:
    """Read a head. Raises UserError for a file that is missing, damaged or of another format, whose weights are not
    finite, or that was trained for another base, hidden size or whitening strength."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; tools/benchmarks/train_projection.py writes a projection head")
    try:
        weights, about = _read(path)
        trained = float(about.get("whitening", "nan"))
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not readable as a projection head; train it again") from error
    if about.get("format") != FORMAT:
        raise UserError(f"{path}: not a projection head of this release ({FORMAT}); train it again")
    if about.get("base") != fingerprint:
        raise UserError(f"{path}: trained for another base; train one for this base")
    if trained != whitening:
        raise UserError(
            f"{path}: trained with whitening {about.get('whitening')}, but growth.whitening is {whitening}; make them agree"
        )
    hidden = weights["expand.bias"].size if "expand.bias" in weights else 0
    if hidden == 0:
        raise UserError(f"{path}: holds no projection head; train it again")
    head = ProjectionHead(dims, hidden, np.random.default_rng(0))
    shapes = {name: value.shape for name, value in dict(tree_flatten(head.parameters())).items()}
    if any(value.dtype != mx.float32 for value in weights.values()):
        raise UserError(f"{path}: some weights are not float32; train it again")
    if {name: value.shape for name, value in weights.items()} != shapes:
        raise UserError(f"{path}: for embeddings of another size than {dims}; train one for this base")
    if about.get("sha256") != _digest(weights):
        raise UserError(f"{path}: damaged, its weights are not those that were saved; train it again")
    if not all(np.isfinite(np.array(value)).all() for value in weights.values()):
        raise UserError(f"{path}: some weights are not finite; train it again")
    head.load_weights(list(weights.items()))
    return head


def _read(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    tensor_offsets(path)
    found: Any = mx.load(str(path), format="safetensors", return_metadata=True)
    weights, about = found
    mx.eval(weights)
    return weights, about


def _digest(weights: dict[str, mx.array]) -> str:
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode() + np.array(weights[name]).tobytes())
    return found.hexdigest()


class ContrastiveBatch(NamedTuple):
    """Unit vectors float32: anchors and positives [G, D], one of each per skill, and mixtures [M, D]."""

    anchors: mx.array
    positives: mx.array
    mixtures: mx.array


def draw_batches(groups: Sequence[np.ndarray], batch: int, mixtures: int, rng: np.random.Generator) -> ContrastiveBatch:
    """Two disjoint batches of each skill's whitened documents [n_i, D], and batches that mix two to four skills.

    Batches hold `batch` documents, or half a skill's where there are fewer. No skill has more than half of a mixture.
    """
    pairs, mixed = [], []
    for documents in groups:
        size = min(batch, len(documents) // 2)
        order = rng.permutation(len(documents))
        pairs.append([documents[order[:size]].mean(0), documents[order[size : 2 * size]].mean(0)])
    for _ in range(mixtures):
        chosen = rng.permutation(len(groups))[: rng.integers(2, 5)]
        each = max(1, batch // len(chosen))
        mixed.append(np.concatenate([groups[g][rng.integers(0, len(groups[g]), each)] for g in chosen]).mean(0))
    anchors, positives = (normalize(np.array(side)) for side in zip(*pairs, strict=True))
    negatives = normalize(np.array(mixed).reshape(mixtures, anchors.shape[1]))
    return ContrastiveBatch(*(mx.array(found.astype(np.float32)) for found in (anchors, positives, negatives)))


def info_nce(head: ProjectionHead, drawn: ContrastiveBatch, temperature: float) -> mx.array:
    """Cross-entropy, nats, of finding each batch's partner among all other batches and the mixtures, float32 [2G]."""
    count = len(drawn.anchors)
    views = mx.concatenate([drawn.anchors, drawn.positives])
    keys = head.project(mx.concatenate([views, drawn.mixtures]))
    logits = keys[: 2 * count] @ keys.T / temperature
    places = mx.arange(2 * count)
    logits = mx.where(places[:, None] == mx.arange(len(keys)), -math.inf, logits)
    return nn.losses.cross_entropy(logits, (places + count) % (2 * count), reduction="none")


class ProjectionSettings(NamedTuple):
    """hidden: width; batch: documents in a batch, so few that finding partners is hard; steps: the most that are tried;
    learning_rate, weight_decay: AdamW's; temperature: of InfoNCE; seed: of splits, batches and initial weights."""

    hidden: int = 256
    batch: int = 4
    steps: int = 160
    learning_rate: float = 1e-5
    weight_decay: float = 0.1
    temperature: float = 0.1
    seed: int = 0


DEFAULT = ProjectionSettings()


def train_head(
    groups: Sequence[np.ndarray], reference: Reference, whitening: float, settings: ProjectionSettings = DEFAULT
) -> ProjectionHead:
    """Train a head on document means [n_i, D] of different skills.

    What counts is skills to come, and a head soon fits those it is shown: how many steps it gets is chosen by
    cross-validation over skills, as the number after which held-out documents of skills not trained on find their
    partners best. If that is none, the head stays the identity. Raises UserError for fewer than three skills or one of
    fewer than FEWEST documents.
    """
    if len(groups) < 3 or min(map(len, groups)) < MIN_DOCUMENTS:
        raise UserError(
            f"a projection head needs at least three skills of {MIN_DOCUMENTS} documents each; give it more"
        )
    whitener, parts = reference.whitener(whitening), []
    rng = np.random.default_rng(settings.seed)
    for means in groups:
        white = (means[rng.permutation(len(means))].astype(np.float64) - reference.mean) @ whitener
        parts.append(np.split(white, [round(HELD_OUT * len(white))]))
    held_out, taught = ([part[side] for part in parts] for side in (0, 1))
    looks = [draw_batches(held_out, settings.batch, len(groups), rng) for _ in range(ROUNDS)]
    folds = np.array_split(rng.permutation(len(groups)), min(FOLDS, len(groups)))
    losses = np.sum([_unseen(taught, fold, looks, settings) for fold in folds], axis=0)
    steps = _schedule(settings.steps)[int(losses.argmin())]
    *_, head = _course(taught, [steps], settings)
    return head


def _schedule(steps: int) -> list[int]:
    """Numbers of steps to choose from: none, and doubling up to `steps`."""
    return [0, *(steps >> halvings for halvings in reversed(range(CHOICES)) if steps >> halvings)]


def _unseen(
    taught: list[np.ndarray], fold: np.ndarray, looks: list[ContrastiveBatch], settings: ProjectionSettings
) -> np.ndarray:
    """Summed loss of the fold's skills, after each number of steps, of a head trained on all other skills."""
    others = [documents for skill, documents in enumerate(taught) if skill not in fold]
    rows, found = mx.array(np.concatenate([fold, fold + len(taught)])), []
    for head in _course(others, _schedule(settings.steps), settings):
        found.append(sum(info_nce(head, drawn, settings.temperature)[rows].sum().item() for drawn in looks))
    return np.array(found)


def _course(groups: list[np.ndarray], stops: list[int], settings: ProjectionSettings) -> Iterator[ProjectionHead]:
    """The same head after each of some numbers of steps."""
    rng = np.random.default_rng([settings.seed, 1])
    head = ProjectionHead(groups[0].shape[1], settings.hidden, rng)
    optimizer = AdamW(learning_rate=settings.learning_rate, weight_decay=settings.weight_decay)
    gradient = nn.value_and_grad(head, lambda drawn: info_nce(head, drawn, settings.temperature).mean())
    for step in range(stops[-1] + 1):
        if step:
            _, gradients = gradient(draw_batches(groups, settings.batch, len(groups), rng))
            optimizer.update(head, gradients)
            mx.eval(head.parameters(), optimizer.state)
        if step in stops:
            yield head
