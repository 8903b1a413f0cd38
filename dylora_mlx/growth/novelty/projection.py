"""Projection head that sharpens skill embeddings: a residual MLP, trained contrastively on known skills.

Two random batches of documents of the same skill should be close, and far from batches of other skills and from
batches that mix several skills. The loss is InfoNCE (van den Oord et al. 2018) in SimCLR's symmetric form (Chen et al.
2020, section 2.1).
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
"""Format tag in the metadata of a saved head."""
MIN_DOCUMENTS = 16
"""Minimum number of documents of a skill: four of them are held out, for two batches of two."""
HELD_OUT = 0.25
"""Share of each skill's documents that are held out."""
FOLDS, CHOICES, ROUNDS = 4, 6, 8
"""Cross-validation over skills: folds, numbers of steps to try (besides 0), evaluation batches per loss."""


class ProjectionHead(nn.Module):
    """Residual MLP normalise(x + W2 gelu(W1 x + b)), for x of unit length.

    W2 starts at zero, so an untrained head is the identity. Weight decay pulls a trained head back towards it.
    """

    def __init__(self, dims: int, hidden: int, rng: np.random.Generator):
        super().__init__()
        self.expand, self.contract = nn.Linear(dims, hidden), nn.Linear(hidden, dims, bias=False)
        self.expand.weight = mx.array(rng.normal(size=(hidden, dims)).astype(np.float32))
        self.expand.bias = mx.zeros(hidden)
        self.contract.weight = mx.zeros((dims, hidden))

    def __call__(self, embeddings: np.ndarray) -> np.ndarray:
        """Project centred and whitened embeddings, unit vectors [..., D], to unit vectors float32 [..., D]."""
        return np.array(self.project(mx.array(embeddings.astype(np.float32))))

    def project(self, x: mx.array) -> mx.array:
        """Project MLX arrays, float32 [..., D]; the differentiable form of `__call__`."""
        moved = x + self.contract(nn.gelu(self.expand(x)))
        return moved / mx.maximum(mx.linalg.norm(moved, axis=-1, keepdims=True), 1e-12)

    def save(self, path: Path, fingerprint: str, whitening: float) -> None:
        """Write the head to a safetensors file.

        Args:
            path: The file.
            fingerprint: Fingerprint of the base whose embeddings the head was trained on.
            whitening: Whitening strength of these embeddings.
        """
        weights = dict(tree_flatten(self.parameters()))
        file_metadata = {
            "format": FORMAT,
            "base": fingerprint,
            "whitening": repr(whitening),
            "sha256": _digest(weights),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        # Pass an open file: MLX would append its extension to the temporary file's name.
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            mx.save_safetensors(file, weights, metadata=file_metadata)


def load_head(path: Path, fingerprint: str, whitening: float, dims: int) -> ProjectionHead:
    """Load a projection head.

    Raises UserError for a file that is missing, damaged or of another format, whose weights are not finite, or that was
    trained for another base, hidden size or whitening strength.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; tools/benchmarks/train_projection.py writes a projection head")
    try:
        weights, metadata = _read(path)
        trained = float(metadata.get("whitening", "nan"))
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not readable as a projection head; train it again") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: not a projection head of this release ({FORMAT}); train it again")
    if metadata.get("base") != fingerprint:
        raise UserError(f"{path}: trained for another base; train one for this base")
    if trained != whitening:
        raise UserError(
            f"{path}: trained with whitening {metadata.get('whitening')}, but growth.whitening is {whitening}; make them agree"
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
    if metadata.get("sha256") != _digest(weights):
        raise UserError(f"{path}: damaged, its weights are not those that were saved; train it again")
    if not all(np.isfinite(np.array(value)).all() for value in weights.values()):
        raise UserError(f"{path}: some weights are not finite; train it again")
    head.load_weights(list(weights.items()))
    return head


def _read(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    tensor_offsets(path)
    loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
    weights, metadata = loaded
    # MLX reads lazily: evaluate here, where the caller handles read errors.
    mx.eval(weights)
    return weights, metadata


def _digest(weights: dict[str, mx.array]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + np.array(weights[name]).tobytes())
    return digest.hexdigest()


class ContrastiveBatch(NamedTuple):
    """Embeddings of document batches, unit vectors in float32."""

    anchors: mx.array
    """One batch per skill, [G, D]."""
    positives: mx.array
    """Another batch of each of these skills, [G, D]."""
    mixtures: mx.array
    """Batches that mix several skills, [M, D]."""


def draw_batches(groups: Sequence[np.ndarray], batch: int, mixtures: int, rng: np.random.Generator) -> ContrastiveBatch:
    """Draw two disjoint batches of each skill, and `mixtures` batches that mix two to four skills.

    `groups` holds the whitened documents of each skill, [n_i, D]. A batch has `batch` documents, or half of the skill's
    documents if these are fewer. No skill makes up more than half of a mixture.
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
    return ContrastiveBatch(*(mx.array(vectors.astype(np.float32)) for vectors in (anchors, positives, negatives)))


def info_nce(head: ProjectionHead, batch: ContrastiveBatch, temperature: float) -> mx.array:
    """Return the InfoNCE loss of each anchor and positive, float32 [2G], in nats.

    It is the cross-entropy of identifying a batch's partner among all other batches and the mixtures.
    """
    count = len(batch.anchors)
    views = mx.concatenate([batch.anchors, batch.positives])
    keys = head.project(mx.concatenate([views, batch.mixtures]))
    logits = keys[: 2 * count] @ keys.T / temperature
    indices = mx.arange(2 * count)
    # Mask each batch's similarity to itself.
    logits = mx.where(indices[:, None] == mx.arange(len(keys)), -math.inf, logits)
    return nn.losses.cross_entropy(logits, (indices + count) % (2 * count), reduction="none")


class ProjectionSettings(NamedTuple):
    """Hyperparameters of the training of a projection head."""

    hidden: int = 256
    """Hidden width of the MLP."""
    batch: int = 4
    """Documents per batch, few enough to make identifying partners hard."""
    steps: int = 160
    """Largest number of training steps that is tried."""
    learning_rate: float = 1e-5
    """Learning rate of AdamW."""
    weight_decay: float = 0.1
    """Weight decay of AdamW."""
    temperature: float = 0.1
    """Softmax temperature of InfoNCE."""
    seed: int = 0
    """Seed of the splits, the batches and the initial weights."""


DEFAULT = ProjectionSettings()


def train_head(
    groups: Sequence[np.ndarray], reference: Reference, whitening: float, settings: ProjectionSettings = DEFAULT
) -> ProjectionHead:
    """Train a head on the document means, [n_i, D], of different skills.

    The head must generalise to future skills, but it soon overfits the skills it is trained on. Cross-validation over
    skills therefore chooses the number of steps: the one with the lowest loss on held-out documents of skills not
    trained on. If that is 0, the head stays the identity. Raises UserError for fewer than three skills, or for a skill
    with fewer than MIN_DOCUMENTS documents.
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
    held_out, train = ([part[side] for part in parts] for side in (0, 1))
    eval_batches = [draw_batches(held_out, settings.batch, len(groups), rng) for _ in range(ROUNDS)]
    folds = np.array_split(rng.permutation(len(groups)), min(FOLDS, len(groups)))
    losses = np.sum([_held_out_losses(train, fold, eval_batches, settings) for fold in folds], axis=0)
    steps = _step_choices(settings.steps)[int(losses.argmin())]
    *_, head = _train_steps(train, [steps], settings)
    return head


def _step_choices(steps: int) -> list[int]:
    """Return the candidate numbers of steps, ascending: 0, and up to CHOICES doublings that end at `steps`."""
    return [0, *(steps >> halvings for halvings in reversed(range(CHOICES)) if steps >> halvings)]


def _held_out_losses(
    train: list[np.ndarray], fold: np.ndarray, eval_batches: list[ContrastiveBatch], settings: ProjectionSettings
) -> np.ndarray:
    """Train on all skills outside the fold; return the fold's summed loss after each candidate number of steps."""
    others = [documents for skill, documents in enumerate(train) if skill not in fold]
    # The loss has a row for each skill's anchor, then one for each skill's positive.
    rows, losses = mx.array(np.concatenate([fold, fold + len(train)])), []
    for head in _train_steps(others, _step_choices(settings.steps), settings):
        losses.append(sum(info_nce(head, batch, settings.temperature)[rows].sum().item() for batch in eval_batches))
    return np.array(losses)


def _train_steps(groups: list[np.ndarray], stops: list[int], settings: ProjectionSettings) -> Iterator[ProjectionHead]:
    """Train one head and yield it, the same object each time, after each number of steps in ascending `stops`."""
    rng = np.random.default_rng([settings.seed, 1])
    head = ProjectionHead(groups[0].shape[1], settings.hidden, rng)
    optimizer = AdamW(learning_rate=settings.learning_rate, weight_decay=settings.weight_decay)
    gradient = nn.value_and_grad(head, lambda batch: info_nce(head, batch, settings.temperature).mean())
    for step in range(stops[-1] + 1):
        if step:
            _, gradients = gradient(draw_batches(groups, settings.batch, len(groups), rng))
            optimizer.update(head, gradients)
            # MLX is lazy: evaluate every step, or the graph would grow over all of them.
            mx.eval(head.parameters(), optimizer.state)
        if step in stops:
            yield head
