"""Exemplars: documents of each skill that are stored for replay, within a token budget.

Sources: Robins 1995; Chaudhry et al. 2019, "On Tiny Episodic Memories in Continual Learning".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dylora_mlx.data.packing import Segment
from dylora_mlx.data.stream import draw_within


def choose_exemplars(segments: Sequence[Segment], tokens: int, rng: np.random.Generator) -> list[Segment]:
    """Draw whole segments uniformly at random until the next one would exceed a budget of `tokens` positions."""
    return [segments[index] for index in draw_within([segment.positions for segment in segments], tokens, rng)]


def combine(by_skill: Sequence[Sequence[Segment]]) -> list[Segment]:
    """Concatenate the exemplars of several skills and give every segment a document number of its own."""
    everything = [segment for segments in by_skill for segment in segments]
    return [segment._replace(document=number) for number, segment in enumerate(everything)]


def to_arrays(segments: Sequence[Segment]) -> dict[str, np.ndarray]:
    """Return exemplars as arrays for a checkpoint; an empty dict if there are none.

    exemplar_tokens (int32) and exemplar_loss_mask (uint8) are the segments' arrays, concatenated. exemplar_lengths
    (int32 [n]) holds the number of tokens of each segment.
    """
    if not segments:
        return {}
    return {
        "exemplar_tokens": np.concatenate([segment.tokens for segment in segments]).astype(np.int32),
        "exemplar_loss_mask": np.concatenate([segment.loss_mask for segment in segments]).astype(np.uint8),
        "exemplar_lengths": np.array([len(segment.tokens) for segment in segments], np.int32),
    }


def from_arrays(arrays: dict[str, np.ndarray]) -> list[Segment]:
    """Rebuild exemplars from the arrays of `to_arrays`, with documents numbered in order.

    Raises KeyError for a missing array and ValueError for arrays whose lengths do not agree.
    """
    if "exemplar_lengths" not in arrays:
        return []
    lengths = arrays["exemplar_lengths"]
    shape = (int(lengths.sum()),)
    if (
        lengths.ndim != 1
        or (lengths < 2).any()
        or any(arrays[f"exemplar_{name}"].shape != shape for name in ("tokens", "loss_mask"))
    ):
        raise ValueError("exemplar_lengths does not fit the exemplars")
    ends = np.cumsum(lengths)[:-1]
    tokens, loss_mask = (np.split(arrays[f"exemplar_{name}"], ends) for name in ("tokens", "loss_mask"))
    return [Segment(t, flag.astype(bool), i, 1) for i, (t, flag) in enumerate(zip(tokens, loss_mask, strict=True))]
