"""The pool of experts: the only place that adds, grows or freezes one, with its gate row and its record."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from dylora_mlx.growth import ridge
from dylora_mlx.growth.library import Library
from dylora_mlx.growth.maturity import Phase
from dylora_mlx.growth.ridge import Statistics
from dylora_mlx.model.gemma3 import RoutedGemma3
from dylora_mlx.model.lora import Expert
from dylora_mlx.model.router import GateRow


@dataclass
class Record:
    """What is known of one expert, beside its weights."""

    skill: str
    rank: int
    alpha: float
    created_at: int
    steps: int = 0
    phase: Phase = "young"
    frozen: bool = False


class Pool:
    """Experts of a model and their records; records[e] belongs to model.experts[e], gate column e + 1."""

    def __init__(self, model: RoutedGemma3):
        self.model = model
        self.records: list[Record] = []

    def __len__(self) -> int:
        return len(self.records)

    def add(self, record: Record, key: mx.array, own: Statistics | None = None, library: Library | None = None) -> int:
        """Append a new expert (B = 0, so the outputs do not change under its gate) and its gate row; return its column.

        With statistics the row starts from the ridge solution of this skill against the library's.
        """
        expert = Expert(self.model.shapes, record.rank, record.alpha, key)
        row = GateRow(self.model.base.args.hidden_size)
        if own is not None and library is not None:
            _start(row, [own], [entry.statistics for entry in library.entries])
        self.model.experts.append(expert)
        self.model.router.rows.append(row)
        self.records.append(record)
        mx.eval(expert.parameters(), row.parameters())
        return len(self.records)

    def start_null_row(self, library: Library, newcomer: Statistics) -> None:
        """Give row 0 its ridge start, when the first expert arrives: the base's text against the newcomer's."""
        own = [entry.statistics for entry in library.entries if entry.expert == 0]
        if own:
            _start(self.model.router.rows[0], own, [newcomer])

    def freeze(self, column: int) -> None:
        """Freeze an expert for good; its hash is checked from then on."""
        self.records[column - 1].frozen = True
        self.model.experts[column - 1].freeze()

    def frozen_hashes(self) -> dict[int, str]:
        """sha256 of each frozen expert's weights, by column."""
        return {e + 1: digest(self.model.experts[e]) for e, record in enumerate(self.records) if record.frozen}

    @property
    def trainable(self) -> list[int]:
        """Columns of the experts that are not frozen."""
        return [e + 1 for e, record in enumerate(self.records) if not record.frozen]

    def parameters(self) -> int:
        """Adapter parameters of all experts."""
        return sum(v.size for expert in self.model.experts for v in dict(tree_flatten(expert.parameters())).values())

    def describe(self) -> list[dict]:
        return [asdict(record) for record in self.records]


def _start(row: GateRow, own: list[Statistics], others: list[Statistics]) -> None:
    weight, bias = ridge.gate_row(own, others)
    row.weight, row.bias = mx.array(weight.astype(np.float32)), mx.array([float(bias)])


def digest(expert: Expert) -> str:
    """sha256 over an expert's parameters, names and shapes included."""
    found = hashlib.sha256()
    for name, value in sorted(dict(tree_flatten(expert.parameters())).items()):
        found.update(f"{name} {value.shape}".encode())
        found.update(np.array(value).tobytes())
    return found.hexdigest()
