"""An adapter that was trained elsewhere, into a run that has finished: a frozen expert, and a gate row fitted to sample text."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx.config import Source
from dylora_mlx.config.load import to_yaml
from dylora_mlx.data import stream
from dylora_mlx.data.stream import Skill
from dylora_mlx.errors import UserError
from dylora_mlx.exporting import formats
from dylora_mlx.exporting.write import open_for_export
from dylora_mlx.growth.library import Library, LibraryEntry
from dylora_mlx.growth.pool import initial_gate_row
from dylora_mlx.importing import adapters
from dylora_mlx.importing.common import add_frozen_expert, check_base, log_import
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.routing.router import Routing
from dylora_mlx.run.run_folder import OpenedRun, lock_run
from dylora_mlx.system.files import atomic_write, write_error
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.checkpoint.state import add_imported_skill, pool_files
from dylora_mlx.training.skill import fit_router, split_skill
from dylora_mlx.training.skill.base_pass import run_base_pass
from dylora_mlx.training.step.evaluate import evaluate, make_domains


class ImportedExpert(NamedTuple):
    """Losses on the new skill's held-out text in nats a token: the base's, the mixture's, the new expert's; and the share
    of remembered tokens of the other skills that the new row takes."""

    expert_id: int
    base: float
    mixture: float
    own: float
    taken: float


def import_adapter(run_folder: Path, adapter: Path, text: Source, same_base: bool = False) -> ImportedExpert:
    """Add an adapter to a finished run as a frozen expert, and fit its gate row, no other, to sample text.

    The checkpoint as it was is kept beside the new one. same_base: the adapter's base is the run's, whatever it is called.
    Raises UserError for an adapter that does not fit, and for a run that has not finished, remembers no text, or is at
    work in another process.
    """
    with lock_run(run_folder):
        return _import_adapter(run_folder, adapter, text, same_base)


def _import_adapter(run_folder: Path, adapter: Path, text: Source, same_base: bool) -> ImportedExpert:
    run = open_for_export(run_folder, "auto")
    _check_name(run, text.name)
    if not run.library.entries:
        raise UserError(
            f"{run_folder}: this run remembers no text of its skills, so no gate row can be fitted beside theirs"
        )
    found = adapters.read_adapter(adapter)
    check_base(found.base, run.base, adapter, same_base)
    made = adapters.to_expert(found, run.model.shapes, adapter)
    skill = stream.prepare_skill(text, run.config.data, run.base.tokenizer, run.config.seed)
    studied = run_base_pass(run.model, skill, run.config)
    before = _owners(run.model, run.library)
    expert_id = add_frozen_expert(run.pool, made, text.name)
    run.model.router.rows[expert_id] = initial_gate_row(run.base.args.hidden_size, studied.statistics, run.library)
    training = run.config.training
    memories = [*fit_router.remembered_features(run.library), (studied.memory, expert_id)]
    fitted = max(training.router_fit_steps, 100)
    fit_router.fit(run.model.router, memories, fitted, training.memory_tokens, only=expert_id)
    taken = float(np.mean((_owners(run.model, run.library) == expert_id) & (before != expert_id)))
    kept = split_skill.skill_exemplars(run.config, skill)
    run.library.add(
        LibraryEntry(text.name, expert_id, studied.means, studied.statistics, studied.memory, exemplars=kept)
    )
    losses = _losses(run, skill, expert_id)
    _save(run_folder, run, skill, adapter, losses)
    return ImportedExpert(expert_id, *losses, taken)


def _check_name(run: OpenedRun, name: str) -> None:
    config = run.config
    known = [config.growth.base_skill] if config.growth.base_skill else []
    taken = {source.name for source in (*known, *config.skills, *config.domains)}
    if name in {*taken, *run.library.experts_of, *formats.expert_names(run.pool)}:
        raise UserError(f"--name {name}: this run has a skill of that name; choose another")


def _owners(model: RoutedDecoder, library: Library) -> np.ndarray:
    """The column of the largest gate, of every remembered feature."""
    features = mx.array(np.concatenate([entry.memory for entry in library.entries]))
    return np.array(model.router(features).argmax(-1))


def _losses(run: OpenedRun, skill: Skill, expert_id: int) -> tuple[float, float, float]:
    how = formats.mixture_routing(run)
    domain = make_domains({skill.name: skill.validation}, run.config.data.max_seq_length, 1, False)[skill.name]
    routed, alone = Routing(how.top_k, mx.array(how.temperature)), Routing(None, mx.array(1.0))
    return (
        evaluate(run.model, domain, alone, 0).loss,
        evaluate(run.model, domain, routed).loss,
        evaluate(run.model, domain, alone, expert_id).loss,
    )


def _save(run_folder: Path, run: OpenedRun, skill: Skill, adapter: Path, losses: tuple[float, float, float]) -> None:
    """The new checkpoint in the place of the old one, which stays beside it; the skill in the config and the ledger."""
    files = checkpoint.read(run.checkpoint) | pool_files(run.base, run.pool, run.library)
    if "trainer.json" in files:
        add_imported_skill(files["trainer.json"], skill, *losses[:2])
    config = replace(run.config, skills=[*run.config.skills, skill.source])
    before = run.checkpoint.with_name(f"before-{skill.name}")
    shutil.rmtree(before, ignore_errors=True)
    try:
        # The config takes its new place last: until then the run is as it was.
        with atomic_write(run_folder / "config.yaml") as temporary:
            temporary.write_text(to_yaml(config), encoding="utf-8")
            shutil.copytree(run.checkpoint, before)
            checkpoint.write(run.checkpoint, files)
    except (OSError, RuntimeError) as error:  # MLX raises the second kind
        shutil.rmtree(before, ignore_errors=True)
        raise write_error(run_folder, error, "the run is as it was") from error
    log_import(run_folder, skill.name, len(run.pool), adapter)
