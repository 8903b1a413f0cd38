"""What a run prints: decisions, the loss matrix, test losses."""

from __future__ import annotations

from rich.table import Table

from dylora_mlx.growth.decide.policy import Decision
from dylora_mlx.reporting.continual import Continual
from dylora_mlx.system.console import say, show


def decision(found: Decision, number: int, count: int) -> None:
    say(f"\n[{number}/{count}] {found.skill}: {found.action} -> expert {found.expert}", style="bold")
    say(f"  {found.reason}")
    if found.similarities:
        pairs = ", ".join(f"{name} {value:.3f}" for name, value in found.similarities.items())
        low, high = found.interval or (0.0, 0.0)
        say(f"  similarity: {pairs}; interval {low:.3f} to {high:.3f}; threshold {found.threshold:.3f}")


def matrix(rows: list[dict[str, float]], skills: list[str], domains: list[str]) -> None:
    """The loss of every domain after every skill, each skill's own loss marked by an asterisk."""
    table = Table(title="validation loss (nats per token): domain by skill learned", title_justify="left")
    table.add_column("after")
    for name in domains:
        table.add_column(name, justify="right", overflow="fold")
    for label, row in zip(["base", *skills], rows, strict=False):
        table.add_row(label, *(f"{row[d]:.3f}{'*' if d == label else ' '}" if d in row else "" for d in domains))
    if len(rows) > 1:
        change = (f"{rows[-1][d] - rows[0][d]:+.3f} " for d in domains)
        table.add_row("change", *change, style="bold")
    show(table)


def continual(found: Continual) -> None:
    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:+.4f}"

    say(
        f"mean of skills {found.final_mean:.4f}, backward transfer {shown(found.bwt)}, forgetting "
        f"{shown(found.forgetting)}, forward transfer {shown(found.fwt)} (loss: lower is better)"
    )


def tests(base: dict[str, float], mixture: dict[str, float], own: dict[str, float], experts_of: dict[str, int]) -> None:
    """Held-out test losses: the base, the routed mixture, and the skill's own expert alone (an oracle's routing)."""
    table = Table(title="test loss (nats per token)", title_justify="left")
    for name in ("domain", "expert", "base", "mixture", "own expert", "router regret"):
        table.add_column(name, justify="left" if name == "domain" else "right")
    for name in base:
        cells = (base[name], mixture[name], own[name])
        regret = f"{mixture[name] - own[name]:+.3f}"
        table.add_row(name, str(experts_of.get(name, "-")), *(f"{value:.3f}" for value in cells), regret)
    show(table)
