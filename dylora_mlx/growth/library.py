"""What is remembered of every skill seen: document means, router statistics, and a sample of router features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from dylora_mlx.data.packing import Segment
from dylora_mlx.errors import UserError
from dylora_mlx.growth import exemplars
from dylora_mlx.growth.gate_init import FeatureStatistics


@dataclass
class LibraryEntry:
    """One skill: the expert that holds it, document means float32 [n, D] for novelty, statistics for new gate rows,
    and features float32 [m, D] that rehearse the router.

    drift: what later arrivals of the skill have moved its centre by, float32 [D]; arrivals: how many there were, the
    first included; similarity: moving average of the similarities at which the later ones were recognised; exemplars:
    documents that are replayed.
    """

    skill: str
    expert: int
    means: np.ndarray
    statistics: FeatureStatistics
    memory: np.ndarray
    drift: np.ndarray | None = None
    arrivals: int = 1
    similarity: float | None = None
    exemplars: list[Segment] = field(default_factory=list)

    @property
    def centre(self) -> np.ndarray:
        """Moving average of the skill's mean state, float64 [D]."""
        own = self.means.astype(np.float64).mean(0)
        return own if self.drift is None else own + self.drift

    def record_arrival(self, means: np.ndarray, similarity: float, share: float) -> None:
        """More of this skill was seen, document means [n, D], recognised at a cosine of `similarity`.

        The averages are exponential: the new part counts `share`. A share of 0 changes nothing but the count.
        """
        self.arrivals += 1
        if share:
            centre = self.centre
            moved = centre + share * (means.astype(np.float64).mean(0) - centre)
            self.drift = (moved - self.means.astype(np.float64).mean(0)).astype(np.float32)
            before = similarity if self.similarity is None else self.similarity
            self.similarity = before + share * (similarity - before)


@dataclass
class Library:
    """Entries in order of arrival. `base` is the fingerprint of the base they were made with."""

    base: str
    entries: list[LibraryEntry] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, entry: LibraryEntry) -> None:
        self.entries.append(entry)

    def find(self, skill: str) -> LibraryEntry:
        return next(entry for entry in self.entries if entry.skill == skill)

    @property
    def experts_of(self) -> dict[str, int]:
        """The gate column of each known skill."""
        return {entry.skill: entry.expert for entry in self.entries}

    def nearest_experts(self, similarities: Mapping[str, float], count: int) -> list[int]:
        """The columns of up to `count` experts whose skills are most similar to a new one, the most similar first; the null
        expert is none. similarities: by skill."""
        ranked = sorted(self.experts_of.items(), key=lambda held: -similarities.get(held[0], -1.0))
        return list(dict.fromkeys(expert_id for _, expert_id in ranked if expert_id))[:count]

    def renumber_experts(self, expert_ids: dict[int, int]) -> None:
        """Experts have other columns now: {old: new}; a column that is not named stays."""
        for entry in self.entries:
            entry.expert = expert_ids.get(entry.expert, entry.expert)

    def sample_memory(self, tokens: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw remembered features, equally many from every skill.

        Returns features float32 [n, D], experts int32 [n] and weights float32 [n] that sum to the number of skills.
        Empty arrays when nothing is remembered.
        """
        if not self.entries:
            return np.zeros((0, 0), np.float32), np.zeros(0, np.int32), np.zeros(0, np.float32)
        each = max(1, tokens // len(self.entries))
        features, experts, weights = [], [], []
        for entry in self.entries:
            rows = rng.integers(0, len(entry.memory), each)
            features.append(entry.memory[rows])
            experts.append(np.full(each, entry.expert, np.int32))
            weights.append(np.full(each, 1 / each, np.float32))
        return np.concatenate(features), np.concatenate(experts), np.concatenate(weights)

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name, for a checkpoint."""
        found = {}
        for i, entry in enumerate(self.entries):
            parts = {"means": entry.means, "memory": entry.memory, **entry.statistics.arrays()}
            parts |= {} if entry.drift is None else {"drift": entry.drift}
            parts |= exemplars.to_arrays(entry.exemplars)
            found |= {f"{i}.{name}": value for name, value in parts.items()}
        return found

    def describe(self) -> dict:
        """What goes beside the arrays, in pool.json."""
        names = ("skill", "expert", "arrivals", "similarity")
        return {"base": self.base, "entries": [{name: getattr(e, name) for name in names} for e in self.entries]}

    @classmethod
    def restore(cls, description: dict, arrays: dict[str, np.ndarray]) -> Library:
        """Back from `describe` and `arrays`. Raises UserError for what these never were."""
        try:
            entries = [_entry(item, _of_entry(i, arrays)) for i, item in enumerate(description["entries"])]
            return cls(description["base"], entries)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(
                f"the library of this checkpoint is damaged ({error!r:.100}); use an earlier one"
            ) from error


def _of_entry(number: int, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    prefix = f"{number}."
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def _entry(item: dict, arrays: dict[str, np.ndarray]) -> LibraryEntry:
    """Raises KeyError, TypeError, ValueError for what is no entry."""
    means, memory, drift = arrays["means"], arrays["memory"], arrays.get("drift")
    if any(arrays[name].dtype.kind != "f" for name in ("means", "memory", "gram", "total", "count")):
        raise TypeError("an array that holds no numbers")
    statistics = FeatureStatistics(arrays["gram"], arrays["total"], float(arrays["count"][0]))
    documents, dims = means.shape
    shapes = {"means": means, "memory": memory, "gram": statistics.gram, "total": statistics.total, "drift": drift}
    expected = {"memory": (len(memory), dims), "gram": (dims, dims), "total": (dims,), "drift": (dims,)}
    for name, value in shapes.items():
        if value is not None and (value.shape != expected.get(name, value.shape) or not np.isfinite(value).all()):
            raise ValueError(f"{name} {value.shape}")
    if not (documents and len(memory) and statistics.num_rows > 0):
        raise ValueError("nothing is remembered")
    if not isinstance(item["skill"], str) or type(item["expert"]) is not int or item["expert"] < 0:
        raise TypeError("skill or expert")
    similarity = None if item["similarity"] is None else float(item["similarity"])
    kept = exemplars.from_arrays(arrays)
    return LibraryEntry(
        item["skill"], item["expert"], means, statistics, memory, drift, int(item["arrivals"]), similarity, kept
    )
