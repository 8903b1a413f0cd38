"""Domains: the held-out documents that are evaluated, packed into batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx.config import Config
from dylora_mlx.data import stream
from dylora_mlx.data.packing import Batch
from dylora_mlx.data.skills import SPLITS
from dylora_mlx.data.stream import Skill, Split
from dylora_mlx.distributed.group import world
from dylora_mlx.errors import UserError
from dylora_mlx.system.seeds import SeedStream, generator


class Coverage(NamedTuple):
    """How much of a domain's text is evaluated."""

    documents: int
    of_documents: int
    """Documents of the whole set."""
    tokens: int
    """Input positions."""
    of_tokens: int
    """Input positions of the whole set."""


@dataclass
class Domain:
    """A named set of packed evaluation batches."""

    name: str
    batches: list[Batch]
    """All batches, the same on every rank."""
    max_targets: int | None = None
    """Number of targets that each batch is padded to; None if shapes are not fixed."""
    features: list[mx.array] = field(default_factory=list)
    """Router features of this rank's batches, cached at the first evaluation; only if `router_layer` is "final".

    float16, or the model's dtype if a value does not fit float16.
    """
    first_rank: int = 0
    """Rank that evaluates the first batch; the following batches go to the following ranks in turn."""
    documents: list[int] | None = None
    """Document of each segment, by the segment indices of `Batch.rows`. None: each segment is one."""
    coverage: Coverage | None = None
    """How much of the whole set the batches hold; None if it is not known."""

    @property
    def is_complete(self) -> bool:
        """Whether the batches are known to hold every document of the set."""
        return self.coverage is not None and self.coverage.documents == self.coverage.of_documents

    @property
    def positions(self) -> int:
        """Input positions of all batches, padding included: what an evaluation costs."""
        return sum(batch.inputs.size for batch in self.batches)

    @property
    def local_batches(self) -> list[Batch]:
        """The batches that this rank evaluates."""
        return world().shard(self.batches, self.first_rank)


def free_features(domains: Mapping[str, Domain]) -> None:
    """Drop the cached features of domains. The next evaluation computes them again."""
    for domain in domains.values():
        domain.features = []


@contextmanager
def holding_features(domains: Mapping[str, Domain]) -> Iterator[None]:
    """Within the block, keep the features that evaluations cache; after it, drop those of domains that had none before."""
    without = {name: domain for name, domain in domains.items() if not domain.features}
    try:
        yield
    finally:
        free_features(without)


def make_domains(
    splits: dict[str, Split], max_seq_length: int, batch_size: int, fixed: bool = False
) -> dict[str, Domain]:
    """Make an evaluation domain from each split, by name.

    Args:
        splits: Splits by domain name.
        max_seq_length: Positions per row.
        batch_size: Rows per batch.
        fixed: Give all batches of all domains the same shapes, for a compiled function.
    """
    domains: dict[str, Domain] = {}
    num_batches = 0
    for name, split in splits.items():
        batches = stream.evaluation_batches(split.segments, max_seq_length, batch_size, fixed)
        # Each domain starts at the rank after the last batch of the one before, so small domains spread over all ranks.
        first_rank, documents = num_batches % world().world_size, [segment.document for segment in split.segments]
        domains[name] = Domain(name, batches, first_rank=first_rank, documents=documents)
        num_batches += len(batches)
    if fixed:
        largest = max(int(batch.loss_mask.sum()) for domain in domains.values() for batch in domain.batches)
        domains = {name: replace(domain, max_targets=largest) for name, domain in domains.items()}
    return domains


class HeldOut(NamedTuple):
    """The domains of a run."""

    validation: dict[str, Domain]
    """What is evaluated during the run, by name."""
    final: dict[str, Domain]
    """Validation documents that are evaluated at the end: all with `eval.full`, else the same as `validation`."""
    test: dict[str, Domain]


def make_held_out(skills: Sequence[Skill], config: Config, compiled: bool) -> HeldOut:
    """Make the domains of skills. `compiled`: for a compiled function, which needs fixed shapes."""
    validation = _make_domains(skills, "validation", config, compiled)
    # A set that is complete already is not evaluated twice: it stays the same domain.
    partial = [skill for skill in skills if not validation[skill.name].is_complete] if config.eval.full else []
    final = validation | (_make_domains(partial, "validation", config, compiled, full=True) if partial else {})
    return HeldOut(validation, final, _make_domains(skills, "test", config, compiled, config.eval.full))


def _make_domains(
    skills: Sequence[Skill], split: Literal["validation", "test"], config: Config, compiled: bool, full: bool = False
) -> dict[str, Domain]:
    """Make an evaluation domain of each skill's validation or test documents, by name.

    Args:
        skills: Skills and domains.
        split: Which documents.
        config: The run's options. At most `eval.tokens` positions are drawn, by the seed, the skill's name and the split.
        compiled: Whether the batches are for a compiled function, which needs fixed shapes.
        full: Take all documents, whatever `eval.tokens` says.
    """
    whole: dict[str, Split] = {skill.name: getattr(skill, split) for skill in skills}
    budget = None if full else config.eval.tokens
    drawn = {name: each.sample(budget, _document_draw(config.seed, name, split)) for name, each in whole.items()}
    domains = make_domains(drawn, config.data.max_seq_length, config.training.batch_size, compiled)
    for name, domain in domains.items():
        domain.coverage = Coverage(
            drawn[name].num_documents, whole[name].num_documents, drawn[name].num_tokens, whole[name].num_tokens
        )
    return domains


def _document_draw(seed: int, name: str, split: str) -> np.random.Generator:
    """Return the generator that draws a domain's documents. It does not depend on the domain's place in the stream."""
    number = int.from_bytes(hashlib.sha256(f"{split} {name}".encode()).digest()[:7], "big")
    return generator(seed, SeedStream.EVALUATION, number)


def check_eval_budget(skills: Sequence[Skill], config: Config) -> None:
    """Raise UserError if no validation or no test document of a skill or domain fits `eval.tokens`."""
    budget = config.eval.tokens
    for skill in skills:
        for split in SPLITS[1:]:
            shortest = int(getattr(skill, split).document_sizes().min())
            if budget is not None and shortest > budget:
                raise UserError(
                    f"eval.tokens: {budget} is less than the shortest {split} document of '{skill.name}' "
                    f"({skill.source.source}), which has {shortest} tokens; raise it, or give null for all documents"
                )
