"""Exemplars: some of a skill's documents, kept for replay within a budget of tokens (Robins 1995; Chaudhry et al. 2019,
"On Tiny Episodic Memories in Continual Learning")."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dylora_mlx.data.packing import Segment


def choose_exemplars(pieces: Sequence[Segment], tokens: int, rng: np.random.Generator) -> list[Segment]:
    """Whole pieces drawn at random, every one as likely as another, until the next one would exceed `tokens` positions."""
    found, used = [], 0
    for index in rng.permutation(len(pieces)):
        used += pieces[index].positions
        if used > tokens:
            break
        found.append(pieces[index])
    return found


def combine(kept: Sequence[Sequence[Segment]]) -> list[Segment]:
    """The exemplars of several skills, their documents numbered apart."""
    everything = [piece for pieces in kept for piece in pieces]
    return [piece._replace(document=number) for number, piece in enumerate(everything)]


def to_arrays(pieces: Sequence[Segment]) -> dict[str, np.ndarray]:
    """As arrays for a checkpoint: exemplar_tokens int32 and exemplar_loss_mask uint8, one after the other, and
    exemplar_lengths int32 [n]. None for no pieces."""
    if not pieces:
        return {}
    return {
        "exemplar_tokens": np.concatenate([piece.tokens for piece in pieces]).astype(np.int32),
        "exemplar_loss_mask": np.concatenate([piece.loss_mask for piece in pieces]).astype(np.uint8),
        "exemplar_lengths": np.array([len(piece.tokens) for piece in pieces], np.int32),
    }


def from_arrays(found: dict[str, np.ndarray]) -> list[Segment]:
    """Back from `arrays`, with documents numbered in order. Raises KeyError, ValueError for arrays that do not agree."""
    if "exemplar_lengths" not in found:
        return []
    lengths = found["exemplar_lengths"]
    shape = (int(lengths.sum()),)
    if (
        lengths.ndim != 1
        or (lengths < 2).any()
        or any(found[f"exemplar_{name}"].shape != shape for name in ("tokens", "loss_mask"))
    ):
        raise ValueError("exemplars of other lengths")
    ends = np.cumsum(lengths)[:-1]
    tokens, loss_mask = (np.split(found[f"exemplar_{name}"], ends) for name in ("tokens", "loss_mask"))
    return [Segment(t, flag.astype(bool), i, 1) for i, (t, flag) in enumerate(zip(tokens, loss_mask, strict=True))]
