"""An adapter that was trained elsewhere, into a run that has finished: a frozen expert, and a gate row fitted to sample text."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx.cli import options as cli
from dylora_mlx.config import Source
from dylora_mlx.data import stream
from dylora_mlx.data.stream import Skill
from dylora_mlx.errors import UserError
from dylora_mlx.exporting import formats
from dylora_mlx.exporting import write as exporting
from dylora_mlx.growth.library import Entry
from dylora_mlx.growth.pool import started
from dylora_mlx.importing import adapters
from dylora_mlx.importing import common as adoption
from dylora_mlx.model.routing.router import Routing
from dylora_mlx.run import folder as runs
from dylora_mlx.run.folder import Opened
from dylora_mlx.system.files import unwritten
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.checkpoint import state as states
from dylora_mlx.training.skill import base_pass as study
from dylora_mlx.training.skill import fit_router as consolidate
from dylora_mlx.training.skill import split_skill as arrival
from dylora_mlx.training.step import evaluate


class Adopted(NamedTuple):
    """Losses on the new skill's held-out text in nats a token: the base's, the mixture's, the new expert's; and the share
    of remembered tokens of the other skills that the new row takes."""

    column: int
    base: float
    mixture: float
    own: float
    taken: float


def adopt(run_folder: Path, adapter: Path, text: Source, same_base: bool = False) -> Adopted:
    """Add an adapter to a finished run as a frozen expert, and fit its gate row, no other, to sample text.

    The checkpoint as it was is kept beside the new one. same_base: the adapter's base is the run's, whatever it is called.
    Raises UserError for an adapter that does not fit, and for a run that has not finished, remembers no text, or is at
    work in another process.
    """
    with runs.locked(run_folder):
        return _adopt(run_folder, adapter, text, same_base)


def _adopt(run_folder: Path, adapter: Path, text: Source, same_base: bool) -> Adopted:
    run = exporting.opened(run_folder, "auto")
    _check_name(run, text.name)
    if not run.library.entries:
        raise UserError(
            f"{run_folder}: this run remembers no text of its skills, so no gate row can be fitted beside theirs"
        )
    found = adapters.read(adapter)
    adoption.check_base(found.base, run.base, adapter, same_base)
    made = adapters.expert(found, run.model.shapes, adapter)
    skill = stream.prepare(text, run.config.data, run.base.tokenizer, run.config.seed)
    studied = study.examine(run.model, skill, run.config)
    before = _owners(run)
    column = adoption.join(run.pool, made, text.name)
    run.model.router.rows[column] = started(run.base.args.hidden_size, studied.statistics, run.library)
    training = run.config.training
    memories = [*consolidate.remembered(run.library), (studied.memory, column)]
    fitted = max(training.router_fit_steps, 100)
    consolidate.fit(run.model.router, memories, fitted, training.memory_tokens, only=column)
    taken = float(np.mean((_owners(run) == column) & (before != column)))
    kept = arrival.exemplars_of(run.config, skill)
    run.library.add(Entry(text.name, column, studied.means, studied.statistics, studied.memory, exemplars=kept))
    losses = _losses(run, skill, column)
    _save(run_folder, run, skill, adapter, losses)
    return Adopted(column, *losses, taken)


def _check_name(run: Opened, name: str) -> None:
    config = run.config
    known = [config.growth.base_skill] if config.growth.base_skill else []
    taken = {source.name for source in (*known, *config.skills, *config.domains)}
    if name in {*taken, *run.library.experts_of, *formats.named(run)}:
        raise UserError(f"--name {name}: this run has a skill of that name; choose another")


def _owners(run: Opened) -> np.ndarray:
    """The column of the largest gate, of every remembered feature."""
    features = mx.array(np.concatenate([entry.memory for entry in run.library.entries]))
    return np.array(run.model.router(features).argmax(-1))


def _losses(run: Opened, skill: Skill, column: int) -> tuple[float, float, float]:
    how = formats.mixing(run)
    domain = evaluate.domains({skill.name: skill.validation}, run.config.data.row_length, 1, False)[skill.name]
    routed, alone = Routing(how.top_k, mx.array(how.temperature)), Routing(None, mx.array(1.0))
    return (
        evaluate.evaluate(run.model, domain, alone, 0).loss,
        evaluate.evaluate(run.model, domain, routed).loss,
        evaluate.evaluate(run.model, domain, alone, column).loss,
    )


def _save(run_folder: Path, run: Opened, skill: Skill, adapter: Path, losses: tuple[float, float, float]) -> None:
    """The new checkpoint in the place of the old one, which stays beside it; the skill in the config and the ledger."""
    files = checkpoint.read(run.checkpoint) | states.pool_files(run.base, run.pool, run.library)
    if "trainer.json" in files:
        states.count_imported(files["trainer.json"], skill, *losses[:2])
    config = replace(run.config, skills=[*run.config.skills, skill.source])
    before, beside = run.checkpoint.with_name(f"before-{skill.name}"), run_folder / "config.yaml.partial"
    shutil.rmtree(before, ignore_errors=True)
    try:
        beside.write_text(cli.as_yaml(config), encoding="utf-8")
        shutil.copytree(run.checkpoint, before)
        checkpoint.write(run.checkpoint, files)
    except (OSError, RuntimeError) as error:  # MLX raises the second kind
        beside.unlink(missing_ok=True)
        shutil.rmtree(before, ignore_errors=True)
        raise unwritten(run_folder, error, "the run is as it was") from error
    beside.replace(run_folder / "config.yaml")
    adoption.note(run_folder, skill.name, len(run.pool), adapter)
