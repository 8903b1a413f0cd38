"""Router features of tokens after a turn: texts that are spliced from exemplars of several skills.

The base attends to all of the text so far. So a token that follows text of another skill has other features than the same
token in a document of its own. Documents of one skill do not show this; spliced ones do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dylora_mlx.config import Config
from dylora_mlx.data.packing import Segment
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.routing import document_mean
from dylora_mlx.system.seeds import SeedStream, generator
from dylora_mlx.training.skill.base_pass import base_states, rows_by_segment

TOKENS = 4096
"""Limit on the positions of all spliced texts together, whatever the number of skills."""
PIECES = 3
"""Pieces of a spliced text, each of another skill than the one before."""
PIECE_TOKENS = (40, 100)
"""Smallest and largest size of a piece, where the documents and the rows are long enough."""


class Exemplars(NamedTuple):
    """Documents of one skill."""

    segments: Sequence[Segment]
    expert: int
    """id of the expert that the skill belongs to."""


class TurnFeatures(NamedTuple):
    """Router features of one expert's tokens in texts that turn to it from another skill."""

    features: np.ndarray
    """float32 [m, D], text after text."""
    expert: int


def turn_features(model: RoutedDecoder, skills: Sequence[Exemplars], config: Config) -> list[TurnFeatures]:
    """Return the features after turns of every expert that has any. Empty if fewer than two experts have exemplars.

    They depend on the exemplars and the run's seed only.
    """
    texts = splice(skills, config.data.max_seq_length, _generator(config))
    segments = _segments(texts)
    features: dict[int, list[np.ndarray]] = {}
    found: list[tuple[int, np.ndarray]] = []
    for states in base_states(model, segments, config.data.max_seq_length, config.training.batch_size):
        mixed = document_mean.mix_document_mean_packed(states.features, states.batch.segment_ids, model.document_mean)
        found += [(index, mixed[rows]) for index, rows in rows_by_segment(states.batch, segments)]
    for index, rows in sorted(found, key=lambda pair: pair[0]):
        experts = texts[index][1][: len(rows)]
        for expert_id in np.unique(experts[experts >= 0]):
            features.setdefault(int(expert_id), []).append(rows[experts == expert_id])
    return [TurnFeatures(np.concatenate(parts), expert_id) for expert_id, parts in sorted(features.items())]


def spliced_segments(skills: Sequence[Exemplars], config: Config) -> list[Segment]:
    """Return the spliced texts that `turn_features` reads, in its order."""
    return _segments(splice(skills, config.data.max_seq_length, _generator(config)))


def _generator(config: Config) -> np.random.Generator:
    return generator(config.seed, SeedStream.TURNS)


def _segments(texts: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Segment]:
    return [Segment(tokens, np.ones(len(tokens), bool), number, 1) for number, (tokens, _) in enumerate(texts)]


def splice(skills: Sequence[Exemplars], length: int, rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return spliced texts: token ids, int32 [n], and the expert_id of each token, -1 in the first piece, int32 [n].

    Args:
        skills: exemplars of each skill.
        length: longest row, in positions.
        rng: source of the draws.
    """
    by_expert: dict[int, list[Segment]] = {}
    for skill in skills:
        by_expert.setdefault(skill.expert, []).extend(skill.segments)
    experts = [expert_id for expert_id, segments in sorted(by_expert.items()) if segments]
    texts, left = [], TOKENS
    if len(experts) < 2:
        return []
    longest = max(1, min(PIECE_TOKENS[1], length // PIECES))
    while left > 0:
        tokens, owners, last = [], [], -1
        for number in range(PIECES):
            expert_id = int(rng.choice([each for each in experts if each != last]))
            document = by_expert[expert_id][rng.integers(len(by_expert[expert_id]))].tokens
            size = int(rng.integers(min(PIECE_TOKENS[0], longest), longest + 1))
            # Only the text's own beginning may have a BOS.
            start = int(rng.integers(min(1, number), max(min(1, number), len(document) - size) + 1))
            tokens.append(document[start : start + size])
            owners.append(np.full(len(tokens[-1]), expert_id if number else -1, np.int32))
            last = expert_id
        texts.append((np.concatenate(tokens).astype(np.int32), np.concatenate(owners)))
        left -= len(texts[-1][0]) - 1
    return texts
