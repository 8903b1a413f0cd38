"""Remove experts that a finished run can do without: those whose skills lose nothing when another expert serves them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from dylora_mlx.errors import UserError
from dylora_mlx.growth.decide.decision_log import DecisionLog
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.run import run_folder
from dylora_mlx.system import console
from dylora_mlx.system.files import write_error
from dylora_mlx.system.seeds import SeedStream, derived_seed
from dylora_mlx.training.budget import parameters
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.checkpoint.links import copy_folder
from dylora_mlx.training.checkpoint.state import checkpoint_content
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.skill.create import loss_change

RIVALS = 4
"""Experts with the next largest gates that are measured for the skills of an expert, beside the base."""


class Redundancy(NamedTuple):
    """What it would cost if another expert served all skills of an expert."""

    expert: Expert
    """The expert; its id changes when others are removed."""
    record: str
    """Name of the skill that the expert was created for."""
    skills: list[str]
    """The skills that it serves."""
    heir: Expert | None
    """The expert that would serve them; None for the base."""
    heir_name: str
    cost: float
    """Mean rise of the skills' validation losses, every token forced to one expert, in nats a token."""
    interval: tuple[float, float]
    """Smallest lower and largest upper end of the skills' bootstrap intervals of that rise."""


class Attempt(NamedTuple):
    """An expert that was tried without."""

    redundancy: Redundancy
    removal: parameters.Removal | None
    """What the removal did to the mixture's losses; None if it was not tried."""


class _Buffer(DecisionLog):
    """Keeps lines of the decision log until the checkpoint that they belong to is written."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def append(self, record: dict[str, Any]) -> None:
        self.records.append(record)


def tidy(folder: Path, epsilon: float, dry_run: bool) -> None:
    """Remove the experts of a finished run whose removal costs no domain more than epsilon, and print what was tried.

    An expert is tried if its skills lose at most epsilon when every token is forced to another expert, the cheapest first.
    Each removal is measured on the mixture after the router was fitted again, and undone if a domain's loss rises by more.
    Removed experts are archived in removed/, and the checkpoint from before is kept. If it is interrupted, the run is as
    it was.

    Args:
        folder: the run folder.
        epsilon: largest rise of any domain's loss, in nats a token.
        dry_run: change nothing, only print what would be removed.

    Raises:
        UserError: the run has not finished, cannot be opened or written, or another process works on it.
    """
    with run_folder.lock_run(folder):
        run, _ = run_folder.reopen_finished(folder)
        log, stored = _Buffer(), run.stored
        with TemporaryDirectory() as scratch:
            # All that removals write goes to a place of its own first: an interruption leaves the run as it was.
            growth = replace(run.config.growth, epsilon=epsilon)
            work = replace(run, folder=Path(scratch), config=replace(run.config, growth=growth), decision_log=log)
            parameters_before, attempts = work.pool.num_parameters(), list(_attempts(work, epsilon))
            removed = [each for each in attempts if each.removal is not None and each.removal.kept]
            if removed and not dry_run:
                _save(folder, work, log, stored)
    _print(attempts, parameters_before, work.pool.num_parameters(), folder, dry_run)


def _attempts(run: TrainingRun, epsilon: float) -> Iterator[Attempt]:
    """Measure every expert, try to remove the redundant ones, and yield each with what came of it."""
    found = sorted(redundancies(run), key=lambda each: each.cost)
    for each in found:
        heirs_left = each.heir is None or any(expert is each.heir for expert in run.model.experts)
        if each.cost > epsilon or not heirs_left:
            yield Attempt(each, None)
            continue
        yield Attempt(each, parameters.try_hand_over(run, _id_of(run, each.expert), _id_of(run, each.heir)))


def _id_of(run: TrainingRun, expert: Expert | None) -> int:
    """Return the present id of an expert; 0 for None, the base."""
    return 0 if expert is None else next(i for i, other in enumerate(run.model.experts, 1) if other is expert)


def redundancies(run: TrainingRun) -> Iterator[Redundancy]:
    """Yield for each expert with skills which expert, or the base, would serve them best without it, and at what cost."""
    usage = {name: np.array(each.usage) for name, each in run.evaluate().items()}
    for expert_id, record in enumerate(run.pool.records, 1):
        skills = [n for n, owner in run.library.experts_of.items() if owner == expert_id and n in run.domains]
        if not skills:
            continue
        shares = np.mean([usage[name] for name in skills], axis=0)
        rivals = [e for e in np.argsort(-shares, kind="stable").tolist() if e not in (0, expert_id)][:RIVALS]
        own = {name: run.evaluate_expert(name, expert_id) for name in skills}
        costs = {}
        for rival in [0, *rivals]:
            seed = derived_seed(run.config.seed, SeedStream.ACCEPTANCE, expert_id)
            changes = [loss_change(own[n], run.evaluate_expert(n, rival), run.config.growth, seed) for n in skills]
            means, lows, highs = zip(*changes, strict=True)
            costs[rival] = (float(np.mean(means)), (min(lows), max(highs)))
        heir = min(costs, key=lambda rival: costs[rival][0])
        expert = run.model.experts[heir - 1] if heir else None
        name = run.pool.records[heir - 1].skill if heir else "base"
        yield Redundancy(run.model.experts[expert_id - 1], record.skill, skills, expert, name, *costs[heir])


def _save(folder: Path, work: TrainingRun, log: _Buffer, stored: Any) -> None:
    """Write the archives, the final checkpoint and the ledger of removals. The old checkpoint is kept beside the new one."""
    final, archives = folder / "checkpoints" / run_folder.FINAL, sorted((work.folder / "removed").iterdir())
    number = int(archives[-1].name.split("-")[0])
    backup, ledger = final.with_name(f"final.before-{number:03d}"), DecisionLog(folder)
    work.state.decision_lines = ledger.lines + len(log.records)
    files = checkpoint_content(work.state, work.base, work.pool, work.library, work.optimizers)
    try:
        (folder / "removed").mkdir(exist_ok=True)
        for archive in archives:
            shutil.copytree(archive, folder / "removed" / archive.name, dirs_exist_ok=True)
        shutil.rmtree(backup, ignore_errors=True)
        copy_folder(final, backup)
        checkpoint.write(final, files, stored)
        for record in log.records:
            ledger.append(record)
    except (OSError, RuntimeError) as error:  # MLX raises RuntimeError for a failed write
        for leftover in (backup, *(folder / "removed" / archive.name for archive in archives)):
            shutil.rmtree(leftover, ignore_errors=True)
        raise write_error(folder, error, "make room, or give back the permission to write there") from error


def _print(attempts: list[Attempt], before: int, after: int, folder: Path, dry_run: bool) -> None:
    """Print a table of all experts, and what was saved."""
    table = Table(title="what it costs to do without an expert (nats per token)", title_justify="left")
    for name in ("expert", "skills", "served instead by", "cost, forced", "95%", "mixture, worst domain", ""):
        table.add_column(name, justify="right" if name in ("cost, forced", "95%") else "left")
    for redundancy, removal in attempts:
        worst = "-" if removal is None else f"{removal.worst_domain} {removal.worst_rise:+.4f}"
        verdict = (
            "needed"
            if removal is None
            else ("would go" if dry_run else "removed")
            if removal.kept
            else "kept: does harm"
        )
        low, high = redundancy.interval
        cells = (
            ", ".join(redundancy.skills),
            redundancy.heir_name,
            f"{redundancy.cost:+.4f}",
            f"{low:+.4f} to {high:+.4f}",
        )
        table.add_row(redundancy.record, *cells, worst, verdict)
    console.render(table)
    gone = sum(removal is not None and removal.kept for _, removal in attempts)
    verb = "would be removed" if dry_run else "removed"
    console.info(f"{gone} of {len(attempts)} experts {verb}: {before - after} of {before} adapter parameters saved")
    if gone and not dry_run:
        console.info(f"put one back: dylora restore {folder}")


def check_epsilon(epsilon: float) -> None:
    """Raise UserError if a largest rise is not a finite number of at least 0."""
    if not 0 <= epsilon < float("inf"):
        raise UserError(f"--epsilon {epsilon}: not a number of nats from 0 on")
