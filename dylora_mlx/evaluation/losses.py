"""Losses of a run's domains: the base, the mixture, and every expert alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from rich.table import Table

from dylora_mlx.config import Config, Source
from dylora_mlx.errors import UserError
from dylora_mlx.exporting import formats
from dylora_mlx.model.routing.router import forced_routing
from dylora_mlx.run.run_folder import OpenedRun
from dylora_mlx.system import console
from dylora_mlx.training.step.domains import make_domains
from dylora_mlx.training.step.evaluate import Evaluator, evaluate


class DomainLosses(NamedTuple):
    """Losses of one domain, in nats per learned token."""

    base: float
    mixture: float
    experts: dict[str, float]
    """Loss of each expert serving every token, by name; the base is among them."""
    tokens: int
    """Learned tokens that the losses are averaged over."""

    @property
    def best(self) -> str:
        """Name of the expert with the lowest loss."""
        return min(self.experts, key=lambda name: self.experts[name])


def domain_losses(run: OpenedRun, sources: list[Source], split: str) -> Iterator[tuple[str, DomainLosses]]:
    """Yield the name and the losses of each source, one after another.

    Args:
        run: the run to evaluate, under its final routing.
        sources: the domains.
        split: validation or test.

    Raises UserError for a source that cannot be read, and for one of the run's that holds other records now.
    """
    routing, names = formats.mixture_routing(run).routing, formats.expert_names(run.pool)
    single_expert_routing = forced_routing()
    prepared = run.read_sources(sources)
    evaluator, adapters = Evaluator(run.model, compiled=False), run.model.adapters(routing.top_k)
    for source, skill in zip(sources, prepared, strict=True):
        rows = (run.config.data.max_seq_length, run.config.training.batch_size)
        domain = make_domains({source.name: getattr(skill, split)}, *rows)[source.name]
        routed = evaluate(run.model, domain, routing, None, adapters, evaluator)
        expert_losses = [
            evaluate(run.model, domain, single_expert_routing, expert_id, adapters, evaluator).loss
            for expert_id in range(len(names))
        ]
        yield (
            source.name,
            DomainLosses(expert_losses[0], routed.loss, dict(zip(names, expert_losses, strict=True)), routed.tokens),
        )


def evaluation_domains(config: Config, data: list[str]) -> list[Source]:
    """Return the run's own domains and those of --data, each given as NAME=SOURCE.

    A name given in --data replaces the run's domain of that name. Raises UserError for a value without NAME or SOURCE.
    """
    known = [config.growth.base_skill] if config.growth.base_skill else []
    sources = {source.name: source for source in (*known, *config.skills, *config.domains)}
    for value in data:
        name, _, source = value.partition("=")
        try:
            sources[name] = Source(name=name, source=source)
        except ValueError as error:
            raise UserError(f"--data {value}: should be NAME=SOURCE such as sql=sql.jsonl ({error})") from error
    return list(sources.values())


def print_losses(losses: dict[str, DomainLosses]) -> None:
    """Print the losses and perplexities of the base, the mixture and the best expert as a table."""
    table = Table(title="loss in nats a token (perplexity)", title_justify="left")
    for name in ("text", "base", "mixture", "best expert", "which"):
        table.add_column(name, justify="left" if name in ("text", "which") else "right")
    for name, loss in losses.items():
        values = (loss.base, loss.mixture, loss.experts[loss.best])
        table.add_row(name, *(f"{value:.3f} ({math.exp(value):.1f})" for value in values), loss.best)
    console.render(table)
