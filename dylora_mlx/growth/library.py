"""Library of skills: document means, router statistics, and a sample of router features for every skill seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dylora_mlx.data.packing import Segment
from dylora_mlx.errors import UserError
from dylora_mlx.growth import exemplars
from dylora_mlx.growth.feature_statistics import FeatureStatistics, PooledStatistics, second_moment
from dylora_mlx.system.files import map_arrays
from dylora_mlx.system.frozen_arrays import FrozenArrays
from dylora_mlx.system.process import allow_open_files

MAX_REHEARSED = 64
"""Largest number of skills that one rehearsal batch is drawn from."""
PARTS = ("statistics", "memory", "exemplars", "drift")
"""The files of an entry in a checkpoint."""


@dataclass
class LibraryEntry:
    """Record of one skill, kept after the skill has been learned."""

    skill: str
    expert: int
    """expert_id of the expert that serves the skill; 0 is the null expert."""
    means: np.ndarray
    """Mean base state of each embedded document, float32 [n, D], to measure novelty against."""
    statistics: FeatureStatistics
    """Feature statistics of all its tokens, for the discriminant that gate rows are fitted from."""
    memory: np.ndarray
    """Router features of randomly drawn tokens, [m, D], for the router's fit and rehearsal; document after document. In
    half precision (see `half_precision`); float32 in runs of format 1."""
    drift: np.ndarray | None = None
    """Offset by which later arrivals of the skill have moved its centre, float32 [D]."""
    arrivals: int = 1
    """Number of arrivals of the skill, including the first."""
    exemplars: list[Segment] = field(default_factory=list)
    """Documents stored for replay."""
    format: str = ""
    """Form of the skill's records, as `SkillFormat` writes it; empty in runs that did not record it."""

    def parts(self) -> Iterator[tuple[str, FrozenArrays]]:
        """Yield the arrays of a checkpoint by part. Each part is a file, which is written again only if the part changes."""
        statistics = {"means": self.means, **self.statistics.arrays()}
        yield "statistics", FrozenArrays(statistics, (self.means, self.statistics.gram, self.statistics.total))
        yield "memory", FrozenArrays({"memory": self.memory})
        if self.exemplars:
            yield "exemplars", FrozenArrays(exemplars.to_arrays(self.exemplars), (self.exemplars,))
        if self.drift is not None:
            yield "drift", FrozenArrays({"drift": self.drift})

    @property
    def centre(self) -> np.ndarray:
        """Moving average of the skill's mean state, float64 [D]."""
        first_centre = self.means.astype(np.float64).mean(0)
        return first_centre if self.drift is None else first_centre + self.drift

    def record_arrival(self, means: np.ndarray, share: float) -> None:
        """Update the moving average of the centre with another arrival of this skill.

        Args:
            means: Document means of the new arrival, [n, D].
            share: Weight of the new arrival in the exponential moving average. 0 updates only the count.
        """
        self.arrivals += 1
        if share:
            centre = self.centre
            moved = centre + share * (means.astype(np.float64).mean(0) - centre)
            self.drift = (moved - self.means.astype(np.float64).mean(0)).astype(np.float32)


@dataclass
class Library:
    """All entries, in order of arrival."""

    base: str
    """Fingerprint of the base model that computed the entries."""
    entries: list[LibraryEntry] = field(default_factory=list)
    _moments: tuple[list[FeatureStatistics], np.ndarray] | None = field(default=None, repr=False, compare=False)
    """Statistics that were added up, and the sum of their second moments."""

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, entry: LibraryEntry) -> None:
        """Append an entry."""
        self.entries.append(entry)

    def find(self, skill: str) -> LibraryEntry:
        """Return the first entry of this skill. Raises StopIteration if there is none."""
        return next(entry for entry in self.entries if entry.skill == skill)

    def pooled_statistics(self, newcomer: FeatureStatistics | None = None) -> PooledStatistics:
        """Return the statistics of all entries together, with those of a newcomer if given; of one skill at least.

        Only what is new among the entries is added to the sum of before.
        """
        if not self.entries:
            assert newcomer is not None, "statistics of no skill"
            return PooledStatistics.of([newcomer])
        statistics = [entry.statistics for entry in self.entries]
        summed, total = self._moments or ([], np.zeros(statistics[0].gram.shape))
        if len(summed) > len(statistics) or any(a is not b for a, b in zip(summed, statistics, strict=False)):
            summed, total = [], np.zeros(total.shape)
        # In the order of the entries, so that a resumed run has the same bits.
        for each in statistics[len(summed) :]:
            total = total + second_moment(each)
        self._moments = statistics, total
        pooled = PooledStatistics(np.stack([each.mean for each in statistics]), total / len(statistics))
        return pooled if newcomer is None else pooled.with_skill(newcomer)

    def map_memories(self, folder: Path) -> dict[str, FrozenArrays]:
        """Map the remembered features of the entries that hold them in memory from the files of a checkpoint instead.

        Returns the arrays of these files, by name.
        """
        mapped = {}
        allow_open_files()
        for i, entry in enumerate(self.entries):
            if not isinstance(entry.memory, np.memmap):
                entry.memory = map_arrays(folder / entry_file(i, "memory"))["memory"]
                mapped[entry_file(i, "memory")] = FrozenArrays({"memory": entry.memory})
        return mapped

    def record_known(self, nearest: str, expert: int, means: np.ndarray, share: float) -> None:
        """Count text that is known as an arrival of the nearest skill, if the expert that is to serve it serves that skill.

        Measured losses may have chosen the expert of another skill. Then the text is none of the nearest skill's, whose
        centre stays. Arguments as for `LibraryEntry.record_arrival`.
        """
        entry = self.find(nearest)
        if entry.expert == expert:
            entry.record_arrival(means, share)

    @property
    def experts_of(self) -> dict[str, int]:
        """The expert_id of each known skill."""
        return {entry.skill: entry.expert for entry in self.entries}

    def nearest_experts(self, similarities: Mapping[str, float], count: int) -> list[int]:
        """Return the expert_ids of up to `count` experts whose skills are most similar to a new one, best first.

        `similarities` maps skills to cosines. The null expert is never returned.
        """
        ranked = sorted(self.experts_of.items(), key=lambda item: -similarities.get(item[0], -1.0))
        return list(dict.fromkeys(expert_id for _, expert_id in ranked if expert_id))[:count]

    def renumber_experts(self, expert_ids: dict[int, int]) -> None:
        """Apply a mapping {old expert_id: new expert_id}; an id missing from it stays as it is."""
        for entry in self.entries:
            entry.expert = expert_ids.get(entry.expert, entry.expert)

    def sample_memory(self, tokens: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw a rehearsal batch of remembered router features, with the same number from every skill.

        Returns features float32 [n, D], expert_ids int32 [n] and weights float32 [n]. The weights sum to the number of
        skills. The arrays are empty if the library is. Of more than MAX_REHEARSED skills so many are drawn.
        """
        if not self.entries:
            return np.zeros((0, 0), np.float32), np.zeros(0, np.int32), np.zeros(0, np.float32)
        drawn = self.entries
        if len(drawn) > MAX_REHEARSED:
            drawn = [drawn[number] for number in rng.choice(len(drawn), MAX_REHEARSED, replace=False)]
        each = max(1, tokens // len(drawn))
        features, experts, weights = [], [], []
        for entry in drawn:
            rows = rng.integers(0, len(entry.memory), each)
            features.append(entry.memory[rows].astype(np.float32))
            experts.append(np.full(each, entry.expert, np.int32))
            weights.append(np.full(each, len(self.entries) / len(drawn) / each, np.float32))
        return np.concatenate(features), np.concatenate(experts), np.concatenate(weights)

    def files(self) -> dict[str, FrozenArrays]:
        """Return the arrays of all entries as files of a checkpoint, by name. Parts that an entry lacks have no file."""
        return {entry_file(i, part): arrays for i, entry in enumerate(self.entries) for part, arrays in entry.parts()}

    def describe(self) -> dict:
        """Return the JSON part of a checkpoint, stored in pool.json; `files` returns the rest."""
        names = ("skill", "expert", "arrivals", "format")
        return {"base": self.base, "entries": [{name: getattr(e, name) for name in names} for e in self.entries]}

    @classmethod
    def restore(cls, description: dict, files: Mapping[str, Any]) -> Library:
        """Rebuild a library from the values of `describe`, and the files of a checkpoint, of which it uses its own.

        Raises UserError if they are damaged.
        """
        try:
            entries = [_restore_entry(item, _entry_arrays(i, files)) for i, item in enumerate(description["entries"])]
            return cls(description["base"], entries)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(
                f"the library of this checkpoint is damaged ({error!r:.100}); use an earlier one"
            ) from error


def half_precision(features: np.ndarray) -> np.ndarray:
    """Return features as float16, or unchanged if some are beyond its range, as states of inner layers may be."""
    with np.errstate(over="ignore"):
        half = features.astype(np.float16)
    return half if np.isfinite(half).all() else features


def entry_file(number: int, part: str) -> str:
    """Return the name of a file in a checkpoint: a part of the entry with this number, from 0."""
    return f"library/entry_{number}.{part}.safetensors"


def is_memory(file: str) -> bool:
    """Return whether a file of a checkpoint holds remembered features, which may be more than fits into memory."""
    return file.startswith("library/") and file.endswith(".memory.safetensors")


def part_of_array(name: str) -> str:
    """Return the part of an entry that an array belongs to."""
    if name in ("memory", "drift"):
        return name
    return "exemplars" if name.startswith("exemplar_") else "statistics"


def _entry_arrays(number: int, files: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the arrays of all parts of an entry, as NumPy arrays."""
    parts = (files.get(entry_file(number, part), {}) for part in PARTS)
    # No copies of what is an array of NumPy already: remembered features stay mapped from their file.
    return {name: np.asarray(value) for part in parts for name, value in part.items()}


def _restore_entry(item: dict, arrays: dict[str, np.ndarray]) -> LibraryEntry:
    """Rebuild and validate one entry. Raises KeyError, TypeError or ValueError if it is damaged."""
    means, memory, drift = arrays["means"], arrays["memory"], arrays.get("drift")
    if any(arrays[name].dtype.kind != "f" for name in ("means", "memory", "gram", "total", "count")):
        raise TypeError("an array that holds no numbers")
    statistics = FeatureStatistics(arrays["gram"], arrays["total"], float(arrays["count"][0]))
    documents, dims = means.shape
    by_name = {"means": means, "memory": memory, "gram": statistics.gram, "total": statistics.total, "drift": drift}
    expected = {"memory": (len(memory), dims), "gram": (dims, dims), "total": (dims,), "drift": (dims,)}
    for name, value in by_name.items():
        if value is not None and (value.shape != expected.get(name, value.shape) or not np.isfinite(value).all()):
            raise ValueError(f"{name} {value.shape}")
    if not (documents and len(memory) and statistics.num_rows > 0):
        raise ValueError("nothing is remembered")
    if not isinstance(item["skill"], str) or type(item["expert"]) is not int or item["expert"] < 0:
        raise TypeError("skill or expert")
    segments, form = exemplars.from_arrays(arrays), item.get("format", "")
    if not isinstance(form, str):
        raise TypeError("format")
    return LibraryEntry(
        item["skill"],
        item["expert"],
        means,
        statistics,
        memory,
        drift,
        int(item["arrivals"]),
        segments,
        form,
    )
