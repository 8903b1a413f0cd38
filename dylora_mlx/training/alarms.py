"""What looks wrong in numbers that are finite: a loss that jumps, and routing that leaves an expert without tokens.

Each is said once for as long as it lasts, as a warning and in metrics.jsonl; the training goes on. What has been seen so far is
part of the run's state, so that a resumed run says the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dylora_mlx.data.stream import Skill
from dylora_mlx.system import console
from dylora_mlx.training.checkpoint.state import Seen
from dylora_mlx.training.run import Run
from dylora_mlx.training.step.evaluate import Evaluation
from dylora_mlx.training.step.step import StepMetrics

RECENT = 50
"""Losses that a new one is compared with, at most."""
FEWEST = 10
"""Losses that say what is usual, at least."""
DEVIATIONS = 6
"""Median absolute deviations above the median that a loss may lie."""
LEAST = 0.5
"""Nats above the median that are no spike yet, however still the losses are."""
TINY = 0.01
"""Share of its own domain's gates below which an expert gets nothing; of all but one column, if that gets everything."""
IN_A_ROW = 3
"""Evaluations after which routing is not like that by chance."""


class Spike(NamedTuple):
    """A loss, the median of those before it, and what it may be at most; nats a token."""

    loss: float
    usual: float
    most: float


class Unserved(NamedTuple):
    """A domain, the column of the expert that holds it, and that expert's mean gate there."""

    domain: str
    column: int
    share: float


def spike(recent: Sequence[float], loss: float) -> Spike | None:
    """Whether a loss lies far above the recent ones, by their median and their median absolute deviation."""
    if len(recent) < FEWEST:
        return None
    usual = float(np.median(recent))
    most = usual + max(LEAST, DEVIATIONS * float(np.median(np.abs(np.array(recent) - usual))))
    return Spike(loss, usual, most) if loss > most else None


def jumped(seen: Seen, loss: float) -> Spike | None:
    """Note a finite loss; a spike when one begins, not while it lasts."""
    found = spike(seen.losses, loss)
    begins, seen.spiking = found is not None and not seen.spiking, found is not None
    seen.losses = [*seen.losses, loss][-RECENT:]
    return found if begins else None


def unserved(usage: Mapping[str, Sequence[float]], owners: Mapping[str, int]) -> list[Unserved]:
    """Domains whose own experts get next to nothing of them. usage: mean gates [E] by domain; owners: columns of the
    experts that are not young, by domain."""
    own = [Unserved(name, column, usage[name][column]) for name, column in owners.items() if column and name in usage]
    return [found for found in own if found.share < TINY]


def collapsed(usage: Mapping[str, Sequence[float]], owners: Mapping[str, int]) -> int | None:
    """The column that gets everything of every domain, although they belong to several; else None."""
    if len({column for name, column in owners.items() if column and name in usage}) < 2:
        return None
    first = int(np.argmax(next(iter(usage.values()))))
    return first if all(gates[first] > 1 - TINY for gates in usage.values()) else None


def misrouted(
    seen: Seen, usage: Mapping[str, Sequence[float]], owners: Mapping[str, int]
) -> tuple[list[Unserved], int | None]:
    """Note an evaluation; what has now been so for IN_A_ROW of them, and not longer. While one column gets everything,
    that alone is counted."""
    column = collapsed(usage, owners)
    found = unserved(usage, owners) if column is None else []
    seen.collapsed = 0 if column is None else seen.collapsed + 1
    if column is None:
        seen.unserved = {each.domain: seen.unserved.get(each.domain, 0) + 1 for each in found}
    due = [each for each in found if seen.unserved[each.domain] == IN_A_ROW]
    return due, column if seen.collapsed == IN_A_ROW else None


def watch_step(run: Run, skill: Skill, outcome: StepMetrics) -> None:
    """Warn of a training loss that jumps."""
    loss = float(np.array(outcome.terms.lm_loss))
    found = jumped(run.state.seen, loss) if np.isfinite(loss) else None
    if found is None:
        return
    record = {"skill": skill.name, "loss_spike": found.loss, "usual_loss": found.usual, "spike_limit": found.most}
    run.record.log(run.state.step, record)
    console.warn(
        f"step {run.state.step}: the loss of {skill.name} jumps to {found.loss:.3f}, {found.usual:.3f} is usual; if it "
        "stays there or comes again, lower training.learning_rate or training.clip_norm in a new run"
    )


def watch_routing(run: Run, skill: Skill, column: int, evaluated: Mapping[str, Evaluation]) -> None:
    """Warn of experts that get no token of what they hold. skill, column: what is learned, and by which expert."""
    if len(run.pool) < 2:
        return
    usage = {name: found.usage for name, found in evaluated.items()}
    young = {c for c, record in enumerate(run.pool.records, 1) if record.phase == "young"}
    owners = {name: c for name, c in (run.library.experts_of | {skill.name: column}).items() if c not in young}
    found, everything = misrouted(run.state.seen, usage, owners)
    step, where = run.state.step, {"skill": skill.name}
    for each in found:
        record = {"unserved_domain": each.domain, "expert": each.column, "share": each.share}
        run.record.log(step, where | record)
        console.warn(
            f"step {step}: expert {each.column} holds {each.domain} and gets {each.share:.1%} of it, for {IN_A_ROW} "
            "evaluations now; raise training.rehearsal or training.router_fit_steps in a new run"
        )
    if everything is not None:
        run.record.log(step, where | {"collapsed_router": everything})
        console.warn(
            f"step {step}: {f'expert {everything}' if everything else 'the base'} gets every token of every domain, for "
            f"{IN_A_ROW} evaluations now; set training.balance: 0.01 or lower training.router_learning_rate in a new run"
        )
