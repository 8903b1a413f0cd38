"""Losses of a run's domains: the base, the mixture, and every expert by itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from rich.table import Table

from dylora_mlx.config import Config, Source
from dylora_mlx.data import skills, stream
from dylora_mlx.errors import UserError
from dylora_mlx.exporting import formats
from dylora_mlx.model.routing.router import forced_routing
from dylora_mlx.run.run_folder import OpenedRun
from dylora_mlx.system import console
from dylora_mlx.training.step.evaluate import Evaluator, evaluate, make_domains


class DomainLosses(NamedTuple):
    """nats a learned token: the base's, the mixture's, each expert's by name; and the learned tokens."""

    base: float
    mixture: float
    experts: dict[str, float]
    tokens: int

    @property
    def best(self) -> str:
        """The expert with the lowest loss."""
        return min(self.experts, key=lambda name: self.experts[name])


def domain_losses(run: OpenedRun, sources: list[Source], split: str) -> Iterator[tuple[str, DomainLosses]]:
    """Losses of some domains, one after another. Raises UserError for a source that cannot be read."""
    routing, names = formats.mixture_routing(run).routing, formats.expert_names(run.pool)
    alone = forced_routing()
    for source in sources:  # a source that is not there is told before any other is read
        skills.locate_source(source)
    prepared = [
        stream.prepare_skill(source, run.config.data, run.base.tokenizer, run.config.seed) for source in sources
    ]
    measure, adapters = Evaluator(run.model, compiled=False), run.model.adapters(routing.top_k)
    for source, skill in zip(sources, prepared, strict=True):
        rows = (run.config.data.max_seq_length, run.config.training.batch_size)
        domain = make_domains({source.name: getattr(skill, split)}, *rows)[source.name]
        routed = evaluate(run.model, domain, routing, None, adapters, measure)
        single = [
            evaluate(run.model, domain, alone, expert_id, adapters, measure).loss for expert_id in range(len(names))
        ]
        yield source.name, DomainLosses(single[0], routed.loss, dict(zip(names, single, strict=True)), routed.tokens)


def evaluation_domains(config: Config, data: list[str]) -> list[Source]:
    """The run's own, and what --data names."""
    known = [config.growth.base_skill] if config.growth.base_skill else []
    found = {source.name: source for source in (*known, *config.skills, *config.domains)}
    for value in data:
        name, _, source = value.partition("=")
        try:
            found[name] = Source(name=name, source=source)
        except ValueError as error:
            raise UserError(f"--data {value}: should be NAME=SOURCE such as sql=sql.jsonl ({error})") from error
    return list(found.values())


def print_losses(found: dict[str, DomainLosses]) -> None:
    table = Table(title="loss in nats a token (perplexity)", title_justify="left")
    for name in ("text", "base", "mixture", "best expert", "which"):
        table.add_column(name, justify="left" if name in ("text", "which") else "right")
    for name, loss in found.items():
        values = (loss.base, loss.mixture, loss.experts[loss.best])
        table.add_row(name, *(f"{value:.3f} ({math.exp(value):.1f})" for value in values), loss.best)
    console.render(table)
