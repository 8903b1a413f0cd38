"""Random generators of a run: one independent stream for each purpose, derived from the run's seed.

Checkpoints hold no generator state. A resumed run derives the same generators again, so it draws the same numbers.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class SeedStream(IntEnum):
    """Purposes that draw independent random numbers. Checkpoints depend on the values: never change or reuse one."""

    BASE_PASS = 1
    """Documents and tokens that the base pass samples from a skill."""
    EXPERT_INIT = 2
    """Initial weights of a new expert."""
    BATCH_ORDER = 3
    """Order of documents and batches of a skill."""
    REHEARSAL = 4
    """Remembered features and replayed batches of a step."""
    PROBE_SPLIT = 5
    """Split of a probe's documents into training and held-out ones."""
    PROBE_TRIAL = 6
    """Initial weights and order of a trial expert."""
    RANK_GROWTH = 7
    """New ranks of an expert whose rank doubles."""
    REFINE_REPLAY = 8
    """Earlier documents that a refinement replays."""
    MERGE_INIT = 9
    """Initial weights of a merged expert, before its factors are set."""
    MERGE_TRAINING = 10
    """Order of a merged expert's training batches."""
    SKILL_SPLIT = 11
    """Clustering of a file that mixes skills (split_skill)."""
    DECISION = 12
    """The bandit policy's action draw."""
    EXEMPLARS = 13
    """Documents of a skill that are kept as exemplars for replay."""
    DROPOUT = 14
    """Masks of LoRA dropout of a step's micro-batch."""
    TURNS = 15
    """Spliced texts that the router is fitted to."""
    REFIT_ROUTER = 40
    """Positions that an exported router is fitted to."""
    SELECTION = 16
    """Earlier skills that are evaluated after a skill, where not all are."""
    EVALUATION = 50
    """Held-out documents of a domain that are evaluated."""
    ACCEPTANCE = 52
    """Documents that the intervals behind an expert's acceptance draw."""
    INTERVAL = 51
    """Documents that a loss's bootstrap interval draws."""


def generator(seed: int, stream: SeedStream, *parts: int) -> np.random.Generator:
    """Return the generator of one purpose.

    Args:
        seed: the run's seed.
        stream: the purpose.
        parts: integers that distinguish the uses of one purpose, such as the step or the skill's index.
    """
    return np.random.default_rng([seed, int(stream), *parts])


def derived_seed(seed: int, stream: SeedStream, *parts: int) -> int:
    """Return a seed in [0, 2**31) for APIs that take an integer, such as mx.random.key. Arguments as for `generator`."""
    return int(generator(seed, stream, *parts).integers(2**31))
