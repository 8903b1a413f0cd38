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

from dylora_mlx.growth.decide.decision_log import DecisionLog
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.run import run_folder
from dylora_mlx.system import console
from dylora_mlx.system.files import atomic_folder, read_json, write_error
from dylora_mlx.system.seeds import SeedStream, derived_seed
from dylora_mlx.training.budget import parameters
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.checkpoint.links import copy_folder
from dylora_mlx.training.checkpoint.state import checkpoint_content
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.skill.create import loss_change
from dylora_mlx.training.step.domains import holding_features
from dylora_mlx.training.step.evaluate import Evaluation

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
    """Remove experts of a finished run so that no domain loses more than epsilon by all removals together, and print what was
    tried.

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
    """Measure every expert, try to remove the redundant ones, and yield each with what came of it.

    The losses after each removal are compared with those before the first: together they cost no domain more than epsilon.
    """
    before, changed = run.evaluate(), False
    for first in sorted(redundancies(run, before), key=lambda each: each.cost):
        each = first
        if changed and first.cost <= epsilon:  # it may serve more skills now, and its heir may be gone
            each = redundancy(run, _id_of(run, first.expert), run.evaluate())
        if each.cost > epsilon:
            yield Attempt(each, None)
            continue
        removal = parameters.try_hand_over(run, _id_of(run, each.expert), _id_of(run, each.heir), before)
        changed = changed or removal.kept
        yield Attempt(each, removal)


def _id_of(run: TrainingRun, expert: Expert | None) -> int:
    """Return the present id of an expert; 0 for None, the base."""
    return 0 if expert is None else next(i for i, other in enumerate(run.model.experts, 1) if other is expert)


def redundancies(run: TrainingRun, evaluated: dict[str, Evaluation]) -> list[Redundancy]:
    """Return the redundancy of every expert. `evaluated`: the mixture's evaluation of every domain."""
    return [redundancy(run, expert_id, evaluated) for expert_id in range(1, len(run.pool) + 1)]


def redundancy(run: TrainingRun, expert_id: int, evaluated: dict[str, Evaluation]) -> Redundancy:
    """Measure which expert, or the base, would serve the skills of an expert best without it, and at what cost.

    It costs nothing to do without an expert that serves no skill, as far as forced losses say.
    """
    expert, record = run.model.experts[expert_id - 1], run.pool.records[expert_id - 1].skill
    skills = [name for name, owner in run.library.experts_of.items() if owner == expert_id]
    if not skills:
        return Redundancy(expert, record, skills, None, "base", 0.0, (0.0, 0.0))
    shares = np.mean([evaluated[name].usage for name in skills], axis=0)
    rivals = [e for e in np.argsort(-shares, kind="stable").tolist() if e not in (0, expert_id)][:RIVALS]
    costs, seed = {}, derived_seed(run.config.seed, SeedStream.ACCEPTANCE, expert_id)
    with holding_features({name: run.domains[name] for name in skills}):
        own = {name: run.evaluate_expert(name, expert_id) for name in skills}
        for rival in [0, *rivals]:
            changes = [loss_change(own[n], run.evaluate_expert(n, rival), run.config.growth, seed) for n in skills]
            means, lows, highs = zip(*changes, strict=True)
            costs[rival] = (float(np.mean(means)), (min(lows), max(highs)))
    heir = min(costs, key=lambda rival: costs[rival][0])
    name = run.pool.records[heir - 1].skill if heir else "base"
    return Redundancy(expert, record, skills, run.model.experts[heir - 1] if heir else None, name, *costs[heir])


def _save(folder: Path, work: TrainingRun, log: _Buffer, stored: Any) -> None:
    """Write the archives, the final checkpoint and the lines of the decision log. The old checkpoint is kept beside the new one."""
    final, archives = folder / "checkpoints" / run_folder.FINAL, sorted((work.folder / "removed").iterdir())
    number = int(archives[-1].name.split("-")[0])
    # Not the name that `dylora restore` gives its own backup: both are kept.
    backup, decisions = final.with_name(f"before-tidy-{number:03d}"), DecisionLog(folder)
    work.state.decision_lines = decisions.lines + len(log.records)
    # The losses of the mixture as it is now: a skill that is added must not be blamed for what was removed here.
    work.state.matrix[-1] |= {name: evaluation.loss for name, evaluation in work.evaluate().items()}
    files = checkpoint_content(work.state, work.base, work.pool, work.library, work.optimizers)
    leftovers = [backup, *(folder / "removed" / archive.name for archive in archives)]
    try:
        for leftover in leftovers:
            shutil.rmtree(leftover, ignore_errors=True)  # of a process that was killed here
        (folder / "removed").mkdir(exist_ok=True)
        for archive in archives:
            with atomic_folder(folder / "removed" / archive.name) as temporary:
                shutil.copytree(archive, temporary, dirs_exist_ok=True)
        copy_folder(final, backup)
        # The new decision log is written before the checkpoint, so that nothing can fail after it, and renamed into place last.
        with decisions.appended(log.records):
            checkpoint.write(final, files, stored)
    except BaseException as error:
        if _removals(final) != work.state.removals:
            for leftover in leftovers:
                shutil.rmtree(leftover, ignore_errors=True)
        if isinstance(error, OSError | RuntimeError):  # MLX raises RuntimeError for a failed write
            raise write_error(folder, error, "make room, or give back the permission to write there") from error
        raise


def _removals(final: Path) -> int | None:
    """Return how many removals were tried until a final checkpoint; None if it is not there."""
    return read_json(final / "trainer.json")["removals"] if final.is_dir() else None


def _print(attempts: list[Attempt], before: int, after: int, folder: Path, dry_run: bool) -> None:
    """Print a table of all experts, and what was saved."""
    table = Table(title="what it costs to do without an expert (nats per token)", title_justify="left")
    for name in ("expert", "skills", "served instead by", "cost, forced", "95%", "mixture, worst domain", ""):
        table.add_column(name, justify="right" if name in ("cost, forced", "95%") else "left")
    for redundancy, removal in attempts:
        worst = "-" if removal is None else f"{removal.worst_domain} {removal.worst_rise:+.4f}"
        low, high = redundancy.interval
        cells = (
            ", ".join(redundancy.skills) or "none",
            redundancy.heir_name,
            f"{redundancy.cost:+.4f}",
            f"{low:+.4f} to {high:+.4f}",
        )
        table.add_row(redundancy.record, *cells, worst, _verdict(removal, dry_run))
    console.render(table)
    gone = sum(removal is not None and removal.kept for _, removal in attempts)
    verb = "would be removed" if dry_run else "removed"
    console.info(f"{gone} of {len(attempts)} experts {verb}: {before - after} of {before} adapter parameters saved")
    if gone and not dry_run:
        console.info(f"put one back: dylora restore {folder}")


def _verdict(removal: parameters.Removal | None, dry_run: bool) -> str:
    if removal is None:
        return "needed"
    if not removal.kept:
        return "kept: does harm"
    return "would go" if dry_run else "removed"
