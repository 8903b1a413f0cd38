"""Random numbers of a run: one independent generator for each purpose, derived from the run's seed.

Nothing of a generator is saved or restored. A resumed run derives the same ones again, so it draws the same numbers.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class SeedStream(IntEnum):
    """Purposes that draw independent random numbers. Checkpoints depend on the values: never change or reuse one."""

    BASE_PASS = 1
    """Which documents and tokens of a skill are sampled."""
    EXPERT_INIT = 2
    """Initial weights of a new expert."""
    BATCH_ORDER = 3
    """Order of documents and batches of a skill."""
    REHEARSAL = 4
    """Remembered features and replayed batches of a step."""
    PROBE_SPLIT = 5
    """Which documents a probe trains on, and which it holds out."""
    PROBE_TRIAL = 6
    """Initial weights and order of a trial expert."""
    RANK_GROWTH = 7
    """New ranks of an expert whose rank doubles."""
    REFINE_REPLAY = 8
    """Which earlier documents a refinement replays."""
    MERGE_INIT = 9
    """Initial weights of a merged expert, before its factors are set."""
    MERGE_TRAINING = 10
    """Order of what a merged expert trains on."""
    SKILL_SPLIT = 11
    """How a file that mixes skills is taken apart."""
    DECISION = 12
    """The bandit's draw."""
    EXEMPLARS = 13
    """Which documents of a skill are kept for replay."""
    REFIT_ROUTER = 40
    """Which positions an exported router is fitted to."""


def generator(seed: int, stream: SeedStream, *parts: int) -> np.random.Generator:
    """The generator of one purpose. parts: what tells its uses apart, such as the step or the skill's index."""
    return np.random.default_rng([seed, int(stream), *parts])


def derived_seed(seed: int, stream: SeedStream, *parts: int) -> int:
    """A seed in [0, 2**31) for what takes a seed of its own, such as mx.random.key."""
    return int(generator(seed, stream, *parts).integers(2**31))
