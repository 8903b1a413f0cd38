"""The pool of LoRA experts: adds, grows, freezes and offloads experts together with their gate rows and records."""

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
from dylora_mlx.growth import merge
from dylora_mlx.growth.phases import ExpertPhase
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.experts import offload
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.model.experts.offload import ExpertCache, FactorNames, OffloadedExpert
from dylora_mlx.model.routing.router import GateRow
from dylora_mlx.system.files import is_number


@dataclass
class ExpertRecord:
    """Metadata of one expert, as stored in a checkpoint's pool.json."""

    skill: str
    rank: int
    """LoRA rank."""
    alpha: float
    """LoRA alpha; the update is scaled by alpha / rank."""
    created_at: int
    """Training step at which the expert was created."""
    steps: int = 0
    """Training steps so far."""
    phase: ExpertPhase = "dense"
    frozen: bool = False
    frozen_projections: list[str] = field(default_factory=list)
    """Projections that were frozen before the rest of the expert."""

    @classmethod
    def from_json(cls, value: Any) -> ExpertRecord:
        """Read a record from a checkpoint. Raises UserError if it is not a valid record."""
        try:
            record = cls(**value)
            counts, projections = (record.rank, record.created_at, record.steps), record.frozen_projections
            fits = all(type(count) is int and 0 <= count < 2**31 for count in counts) and record.rank >= 1
            fits = fits and isinstance(record.skill, str) and is_number(record.alpha) and record.alpha > 0
            fits = fits and record.phase in get_args(ExpertPhase) and type(record.frozen) is bool
            if not fits or not isinstance(projections, list) or not all(isinstance(name, str) for name in projections):
                raise ValueError("a field has a wrong type or value")
        except (TypeError, ValueError) as error:
            raise UserError(f"the record of an expert is damaged ({error!r:.100})") from error
        return record


class Pool:
    """The experts of a model and their records.

    An expert_id counts from 1, because 0 is the null expert: expert_id e is `model.experts[e - 1]`, `records[e - 1]`
    and gate row e. `cache` holds the weights of offloaded frozen experts; None keeps all experts in memory.
    """

    def __init__(self, model: RoutedDecoder, cache: ExpertCache | None = None):
        self.model, self.cache = model, cache
        self.records: list[ExpertRecord] = []

    def __len__(self) -> int:
        return len(self.records)

    def add(
        self,
        record: ExpertRecord,
        key: mx.array,
        nearest_experts: Sequence[int] = (),
    ) -> int:
        """Append a new expert and its gate row, which is zero until the router is fitted; return its expert_id.

        Args:
            record: Metadata of the expert, with its LoRA rank and alpha.
            key: Random key of the initial weights.
            nearest_experts: expert_ids whose mean update initialises the expert. If empty, B = 0 and the expert changes
                no output, whatever its gate.
        """
        shape = (record.rank, record.alpha)
        if nearest_experts:
            expert = merge.mean_expert(
                [self.model.experts[expert_id - 1] for expert_id in nearest_experts], *shape, self.model.shapes, key
            )
        else:
            expert = Expert(self.model.shapes, *shape, key)
        mx.eval(expert.parameters())
        return self.append(expert, record, GateRow(self.model.base.args.hidden_size))

    def freeze(self, expert_id: int) -> None:
        """Freeze an expert and list it in `frozen_hashes`, which the run compares after every skill."""
        self.records[expert_id - 1].frozen, self.records[expert_id - 1].phase = True, "frozen"
        self.model.experts[expert_id - 1].freeze()

    def unfreeze(self, expert_id: int) -> None:
        """Make a frozen expert trainable again in all projections, to refine it or to train a merged one.

        An offloaded expert is loaded into memory.
        """
        record = self.records[expert_id - 1]
        record.frozen, record.phase, record.frozen_projections = False, "mature", []
        expert = self.model.experts[expert_id - 1]
        if isinstance(expert, OffloadedExpert):
            self.model.experts[expert_id - 1] = offload.load_expert(expert, self.model.shapes)
        self.model.experts[expert_id - 1].unfreeze()

    def offload(self, expert_id: int, path: Path, names: FactorNames) -> None:
        """Offload a frozen expert: drop its weights from memory and read them from a file on demand.

        The outputs do not change. The file must hold this expert's weights, under `names`, and must not be modified.
        """
        assert self.cache is not None, "this pool has no expert cache, so no expert can be offloaded"
        record = self.records[expert_id - 1]
        assert record.frozen, "only a frozen expert can be offloaded"
        # Weights are float32: 4 bytes per parameter.
        size = 4 * self.expert_parameters(record.rank)
        self.model.experts[expert_id - 1] = OffloadedExpert(path, names, record.rank, record.alpha, size, self.cache)

    def freeze_projections(self, expert_id: int, names: Sequence[str]) -> None:
        """Freeze some projections of an expert in all layers. `frozen_projections_hash` detects later changes."""
        self.records[expert_id - 1].frozen_projections = list(names)
        for projections in self.model.experts[expert_id - 1].layers:
            for name in names:
                if name in projections:
                    projections[name].freeze()

    def frozen_projections_hash(self, expert_id: int) -> str:
        """Return the sha256 of an expert's projections that were frozen before the rest."""
        return expert_hash(self.model.experts[expert_id - 1], self.records[expert_id - 1].frozen_projections)

    def grow_rank(self, expert_id: int, rank: int, key: mx.array) -> None:
        """Raise an expert's LoRA rank without changing its output.

        The new columns of A are random, as in a new expert. The new rows of B are zero. alpha / r stays the same.
        """
        expert, record = self.model.experts[expert_id - 1], self.records[expert_id - 1]
        wider = Expert(self.model.shapes, rank, expert.scale * rank, key)
        for old_layer, new_layer in zip(expert.layers, wider.layers, strict=True):
            for name, old in old_layer.items():
                new_layer[name].lora_a = mx.concatenate([old.lora_a, new_layer[name].lora_a[:, expert.rank :]], axis=1)
                new_layer[name].lora_b = mx.concatenate([old.lora_b, new_layer[name].lora_b[expert.rank :]])
        self.model.experts[expert_id - 1] = wider
        record.rank, record.alpha = rank, wider.alpha
        # MLX is lazy: evaluate now, so that the graph does not keep the old factors in memory.
        mx.eval(wider.parameters())

    def remove(self, expert_ids: Collection[int]) -> dict[int, int]:
        """Remove experts with their gate rows and records.

        Returns {old expert_id: new expert_id} of the remaining experts, including 0 for the null expert.
        """
        remaining = [expert_id for expert_id in range(len(self) + 1) if expert_id not in expert_ids]
        self.model.experts = [self.model.experts[expert_id - 1] for expert_id in remaining[1:]]
        self.records = [self.records[expert_id - 1] for expert_id in remaining[1:]]
        self.model.router.rows = [self.model.router.rows[expert_id] for expert_id in remaining]
        return {old: new for new, old in enumerate(remaining)}

    def append(self, expert: Expert, record: ExpertRecord, row: GateRow) -> int:
        """Append an existing expert with its record and gate row, and return its expert_id."""
        self.model.experts.append(expert)
        self.model.router.rows.append(row)
        self.records.append(record)
        return len(self.records)

    def frozen_hashes(self) -> dict[int, str]:
        """Return the sha256 of each frozen expert's weights, by expert_id."""
        return {expert_id: expert_hash(self.model.experts[expert_id - 1]) for expert_id in self.frozen}

    @property
    def frozen(self) -> list[int]:
        """The expert_ids of the frozen experts."""
        return [e + 1 for e, record in enumerate(self.records) if record.frozen]

    @property
    def trainable(self) -> list[int]:
        """The expert_ids of the experts that are not frozen."""
        return [e + 1 for e, record in enumerate(self.records) if not record.frozen]

    def num_parameters(self) -> int:
        """Return the number of adapter parameters of all experts together."""
        return sum(self.expert_parameters(record.rank) for record in self.records)

    def expert_parameters(self, rank: int) -> int:
        """Return the number of parameters of one expert of this LoRA rank."""
        return rank * sum(sum(shape) for named in self.model.shapes.values() for shape in named.values())

    def describe(self) -> list[dict]:
        """Return the records as JSON values, in the order of the experts."""
        return [asdict(record) for record in self.records]


def expert_hash(expert: Expert, projections: Sequence[str] | None = None) -> str:
    """Return the sha256 over the names, shapes and values of an expert's parameters.

    `projections` restricts it to the parameters of some projections.
    """
    digest = hashlib.sha256()
    for name, value in sorted(dict(tree_flatten(expert.parameters())).items()):
        if projections is not None and not any(f".{projection}." in name for projection in projections):
            continue
        digest.update(f"{name} {value.shape}".encode())
        digest.update(np.array(value).tobytes())
    return digest.hexdigest()
