"""The pool of experts: the only place that adds, grows or freezes one, with its gate row and its record."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from dylora_mlx.errors import UserError
from dylora_mlx.growth import gate_init, merge
from dylora_mlx.growth.gate_init import FeatureStatistics
from dylora_mlx.growth.library import Library
from dylora_mlx.growth.phases import ExpertPhase
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.experts import offload
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.model.experts.offload import ExpertCache, FactorNames, OffloadedExpert
from dylora_mlx.model.routing.router import GateRow
from dylora_mlx.system.files import is_number


@dataclass
class ExpertRecord:
    """What is known of one expert, beside its weights. partly: projections that have stopped learning before the rest."""

    skill: str
    rank: int
    alpha: float
    created_at: int
    steps: int = 0
    phase: ExpertPhase = "dense"
    frozen: bool = False
    frozen_projections: list[str] = field(default_factory=list)

    @classmethod
    def from_json(cls, found: Any) -> ExpertRecord:
        """A record as a checkpoint has it. Raises UserError for what is none."""
        try:
            made = cls(**found)
            counts, partly = (made.rank, made.created_at, made.steps), made.frozen_projections
            fits = all(type(count) is int and 0 <= count < 2**31 for count in counts) and made.rank >= 1
            fits = fits and isinstance(made.skill, str) and is_number(made.alpha) and made.alpha > 0
            fits = fits and made.phase in get_args(ExpertPhase) and type(made.frozen) is bool
            if not fits or not isinstance(partly, list) or not all(isinstance(name, str) for name in partly):
                raise ValueError("a value that no expert has")
        except (TypeError, ValueError) as error:
            raise UserError(f"the record of an expert is damaged ({error!r:.100})") from error
        return made


class Pool:
    """Experts of a model and their records; records[e] belongs to model.experts[e], gate column e + 1. shelf: of the frozen
    experts that stand in files, None where all stay in memory."""

    def __init__(self, model: RoutedDecoder, cache: ExpertCache | None = None):
        self.model, self.cache = model, cache
        self.records: list[ExpertRecord] = []

    def __len__(self) -> int:
        return len(self.records)

    def add(
        self,
        record: ExpertRecord,
        key: mx.array,
        own: FeatureStatistics | None = None,
        library: Library | None = None,
        nearest_experts: Sequence[int] = (),
    ) -> int:
        """Append a new expert and its gate row; return its column.

        It starts from what the experts in the columns `kin` have in common; without any B = 0, so that the outputs do not
        change under its gate. With statistics the row starts from the ridge solution of this skill against the library's.
        """
        shape = (record.rank, record.alpha)
        if nearest_experts:
            expert = merge.mean_expert(
                [self.model.experts[expert_id - 1] for expert_id in nearest_experts], *shape, self.model.shapes, key
            )
        else:
            expert = Expert(self.model.shapes, *shape, key)
        dims = self.model.base.args.hidden_size
        row = GateRow(dims) if own is None or library is None else initial_gate_row(dims, own, library)
        mx.eval(expert.parameters(), row.parameters())
        return self.append(expert, record, row)

    def init_null_row(self, library: Library, newcomer: FeatureStatistics) -> None:
        """Give row 0 its ridge start, when the first expert arrives: the base's text against the newcomer's."""
        own = [entry.statistics for entry in library.entries if entry.expert == 0]
        if own:
            _init_row(self.model.router.rows[0], own, [newcomer])

    def freeze(self, expert_id: int) -> None:
        """Freeze an expert; its hash is checked from then on."""
        self.records[expert_id - 1].frozen, self.records[expert_id - 1].phase = True, "frozen"
        self.model.experts[expert_id - 1].freeze()

    def unfreeze(self, expert_id: int) -> None:
        """Let a frozen expert learn again: to refine it, or as a merged one."""
        record = self.records[expert_id - 1]
        record.frozen, record.phase, record.frozen_projections = False, "mature", []
        expert = self.model.experts[expert_id - 1]
        if isinstance(expert, OffloadedExpert):
            self.model.experts[expert_id - 1] = offload.load_expert(expert, self.model.shapes)
        self.model.experts[expert_id - 1].unfreeze()

    def offload(self, expert_id: int, path: Path, names: FactorNames) -> None:
        """Let a frozen expert's weights be those of a file, which must stay as it is; it computes what it did."""
        assert self.cache is not None, "a pool without a shelf keeps its experts in memory"
        record = self.records[expert_id - 1]
        assert record.frozen, "an expert that learns is no file"
        size = 4 * self.expert_parameters(record.rank)
        self.model.experts[expert_id - 1] = OffloadedExpert(path, names, record.rank, record.alpha, size, self.cache)

    def freeze_projections(self, expert_id: int, names: Sequence[str]) -> None:
        """Freeze some projections of an expert in all layers; `part_hash` tells whether they stay as they are."""
        self.records[expert_id - 1].frozen_projections = list(names)
        for projections in self.model.experts[expert_id - 1].layers:
            for name in names:
                if name in projections:
                    projections[name].freeze()

    def frozen_projections_hash(self, expert_id: int) -> str:
        """sha256 of an expert's projections that have stopped learning before the rest."""
        return expert_hash(self.model.experts[expert_id - 1], self.records[expert_id - 1].frozen_projections)

    def grow_rank(self, expert_id: int, rank: int, key: mx.array) -> None:
        """Give an expert more ranks without changing what it computes: new columns of A as in a new expert, new rows of
        B zero, alpha / r as it was."""
        expert, record = self.model.experts[expert_id - 1], self.records[expert_id - 1]
        wider = Expert(self.model.shapes, rank, expert.scale * rank, key)
        for own, new in zip(expert.layers, wider.layers, strict=True):
            for name, held in own.items():
                new[name].lora_a = mx.concatenate([held.lora_a, new[name].lora_a[:, expert.rank :]], axis=1)
                new[name].lora_b = mx.concatenate([held.lora_b, new[name].lora_b[expert.rank :]])
        self.model.experts[expert_id - 1] = wider
        record.rank, record.alpha = rank, wider.alpha
        mx.eval(wider.parameters())

    def remove(self, expert_ids: Collection[int]) -> dict[int, int]:
        """Take experts out, with their gate rows; return {old: new} for the columns that are left, 0 included."""
        left = [expert_id for expert_id in range(len(self) + 1) if expert_id not in expert_ids]
        self.model.experts = [self.model.experts[expert_id - 1] for expert_id in left[1:]]
        self.records = [self.records[expert_id - 1] for expert_id in left[1:]]
        self.model.router.rows = [self.model.router.rows[expert_id] for expert_id in left]
        return {old: new for new, old in enumerate(left)}

    def append(self, expert: Expert, record: ExpertRecord, row: GateRow) -> int:
        """Append an expert that exists already, with its gate row; return its column."""
        self.model.experts.append(expert)
        self.model.router.rows.append(row)
        self.records.append(record)
        return len(self.records)

    def frozen_hashes(self) -> dict[int, str]:
        """sha256 of each frozen expert's weights, by column."""
        return {e + 1: expert_hash(self.model.experts[e]) for e, record in enumerate(self.records) if record.frozen}

    @property
    def trainable(self) -> list[int]:
        """Columns of the experts that are not frozen."""
        return [e + 1 for e, record in enumerate(self.records) if not record.frozen]

    def num_parameters(self) -> int:
        """Adapter parameters of all experts."""
        return sum(self.expert_parameters(record.rank) for record in self.records)

    def expert_parameters(self, rank: int) -> int:
        """Parameters of one expert of this rank."""
        return rank * sum(sum(shape) for named in self.model.shapes.values() for shape in named.values())

    def describe(self) -> list[dict]:
        return [asdict(record) for record in self.records]


def initial_gate_row(dims: int, own: FeatureStatistics, library: Library) -> GateRow:
    """A new gate row over `dims` features: the ridge solution of a skill's statistics against the library's."""
    row = GateRow(dims)
    _init_row(row, [own], [entry.statistics for entry in library.entries])
    return row


def _init_row(row: GateRow, own: list[FeatureStatistics], others: list[FeatureStatistics]) -> None:
    weight, bias = gate_init.ridge_gate_row(own, others)
    row.weight, row.bias = mx.array(weight.astype(np.float32)), mx.array([float(bias)])


def expert_hash(expert: Expert, projections: Sequence[str] | None = None) -> str:
    """sha256 over an expert's parameters, or those of some projections, names and shapes included."""
    found = hashlib.sha256()
    for name, value in sorted(dict(tree_flatten(expert.parameters())).items()):
        if projections is not None and not any(f".{own}." in name for own in projections):
            continue
        found.update(f"{name} {value.shape}".encode())
        found.update(np.array(value).tobytes())
    return found.hexdigest()
