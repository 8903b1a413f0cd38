"""Count what a skill's data hold: what is learned, cut, left out and copied. `data`, `plan`, `train` and the report show these."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dylora_mlx.config import DataConfig
from dylora_mlx.data.chat_template import KINDS, describe_format
from dylora_mlx.data.source_info import SourceInfo
from dylora_mlx.data.stream import Skill, Split
from dylora_mlx.data.tokenized import SPLITS


@dataclass(frozen=True)
class SplitCounts:
    """Counts of one split."""

    origin: str
    """Where its records come from, such as `train.jsonl` or `drawn from train`; empty if unknown."""
    records: int
    """Records that were read, those without a learned token included."""
    documents: int
    """Documents. A chat template that rewrites earlier turns makes one of each answer, other records are one each."""
    tokens: int
    """Tokens of all documents but the first of each, which nothing predicts; without those of dropped windows."""
    learned: int
    """How many of them are targets of the loss."""
    cut: int
    """Documents longer than a row, which are cut into windows."""
    windows: int
    """Windows that they are cut into, the dropped ones included."""
    dropped: int
    """Windows that are dropped because nothing in them is learned."""
    leaked: int
    """Records that are also in the training split; 0 for that split itself."""


@dataclass(frozen=True)
class DataCounts:
    """Counts of a skill's data."""

    name: str
    """Name of the skill."""
    form: str
    """How most of its records are read, in words."""
    other_forms: dict[str, int]
    """Training records that are read in another form, by form."""
    max_seq_length: int
    """Positions of a row: the longest document that is not cut has one token more."""
    splits: dict[str, SplitCounts]
    """Counts of train, validation and test."""
    unlearned: int
    """Records that were left out because nothing of them is learned."""
    info: SourceInfo
    """Facts from reading the source: files, origins of the splits, copies."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the remarks as JSON values."""
        return asdict(self) | {"remarks": remarks(self)}


def summarize(skill: Skill, data: DataConfig, tokenizer: Any) -> DataCounts:
    """Count the data of a skill. The tokenizer tells only which chat template was set; it is not loaded."""
    info = skill.info
    return DataCounts(
        skill.name, describe_format(skill.format, tokenizer.template_override), _other_forms(skill), data.max_seq_length,
        {name: _count_split(skill, name, info) for name in SPLITS},
        skill.unlearned, info,
    )  # fmt: skip


def _count_split(skill: Skill, name: str, info: SourceInfo) -> SplitCounts:
    split: Split = getattr(skill, name)
    windows = len(split.segments) + split.num_dropped - (split.num_documents - split.num_cut)
    learned = sum(int(segment.loss_mask.sum()) for segment in split.segments)
    return SplitCounts(
        info.split_origins.get(name, ""), info.records.get(name, split.num_documents), split.num_documents,
        split.num_tokens, learned, split.num_cut, windows, split.num_dropped, info.leaked.get(name, 0),
    )  # fmt: skip


def _other_forms(skill: Skill) -> dict[str, int]:
    return {KINDS[kind]: count for kind, count in skill.kinds.items() if kind != skill.format.kind}


def remarks(counts: DataCounts) -> list[str]:
    """Return a line on each thing that a person should know before training: records left out, cuts, copies, leakage."""
    lines, splits = [], counts.splits.values()
    if counts.unlearned:
        lines.append(
            f"{_number(counts.unlearned, 'record')} left out because nothing would be learned: an empty completion, or a "
            "chat without an answer"
        )
    chats = KINDS["chat"]
    if counts.other_forms and (chats in counts.other_forms or counts.form.startswith(chats)):  # others are asked alike
        lines.append(f"read as {counts.form}, but {in_other_forms(counts)}: generate asks in the form of most records")
    if cut := sum(split.cut for split in splits):
        of, dropped = (
            _number(sum(split.documents for split in splits), "document"),
            sum(split.dropped for split in splits),
        )
        lost = f", {dropped:,} of them dropped because nothing in them is learned" if dropped else ""
        lines.append(
            f"{cut:,} of {of} longer than {counts.max_seq_length} tokens (data.max_seq_length): cut into "
            f"{_number(sum(split.windows for split in splits), 'window')}{lost}"
        )
    if counts.info.duplicates:
        of = _number(sum(split.records for split in splits), "record")
        lines.append(f"{counts.info.duplicates:,} of {of} copies of an earlier one")
    for name, split in counts.splits.items():
        if split.leaked:
            of = _number(split.records, f"{name} record")
            lines.append(f"{split.leaked:,} of {of} also in train: the {name} loss does not measure what is new")
    return lines


def is_harmful(counts: DataCounts) -> bool:
    """Whether a remark tells of a fault of the data, rather than of long or repeated documents."""
    return bool(counts.unlearned or any(split.leaked for split in counts.splits.values()))


def in_other_forms(counts: DataCounts) -> str:
    """Return how many records are read in other forms than most, as text; empty if none is."""
    return ", ".join(f"{_number(count, 'record')} as {form}" for form, count in counts.other_forms.items())


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"
