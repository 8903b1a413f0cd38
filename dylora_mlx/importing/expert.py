"""Import an adapter into a finished run as a frozen expert, with a gate row fitted to sample text."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx.config import Source
from dylora_mlx.config.load import to_yaml
from dylora_mlx.config.paths import resolve_source
from dylora_mlx.data.kept import RunSources
from dylora_mlx.data.stream import Skill
from dylora_mlx.errors import UserError
from dylora_mlx.exporting import formats
from dylora_mlx.exporting.write import open_for_export
from dylora_mlx.growth.library import Library, LibraryEntry
from dylora_mlx.importing import adapters
from dylora_mlx.importing.common import add_frozen_expert, check_base, log_import
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.routing.router import Routing
from dylora_mlx.run.run_folder import OpenedRun, lock_run
from dylora_mlx.system.files import atomic_write, write_error
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.checkpoint.checkpoint import CheckpointContent
from dylora_mlx.training.checkpoint.links import StoredFiles, copy_folder
from dylora_mlx.training.checkpoint.state import add_imported_skill, pool_files
from dylora_mlx.training.skill import fit_router, split_skill
from dylora_mlx.training.skill.base_pass import run_base_pass
from dylora_mlx.training.skill.router_tokens import SkillFeatures
from dylora_mlx.training.step.domains import make_held_out
from dylora_mlx.training.step.evaluate import evaluate


class ImportedExpert(NamedTuple):
    """Result of an import. Losses are on the new skill's validation text, in nats per token."""

    expert_id: int
    """Gate column of the new expert."""
    base_loss: float
    """Loss of the base alone."""
    mixture_loss: float
    """Loss of the routed mixture."""
    expert_loss: float
    """Loss with every token on the new expert."""
    taken_share: float
    """Share of the other skills' remembered tokens whose top-1 expert is now the new one, 0 to 1."""


def import_adapter(run_folder: Path, adapter: Path, text: Source, same_base: bool = False) -> ImportedExpert:
    """Add an adapter to a finished run as a frozen expert, and fit its gate row to sample text.

    No other gate row changes. The checkpoint before the import is kept as before-NAME in the checkpoints folder.

    Args:
        run_folder: a finished run.
        adapter: folder of a PEFT or mlx-lm LoRA adapter.
        text: sample text of the new skill.
        same_base: accept the adapter's base whatever its name.

    Raises UserError for an adapter that does not fit, and for a run that has not finished, remembers no text, or is in
    use by another process.
    """
    with lock_run(run_folder):
        return _import_adapter(run_folder, adapter, resolve_source(text), same_base)


def _import_adapter(run_folder: Path, adapter: Path, text: Source, same_base: bool) -> ImportedExpert:
    run = open_for_export(run_folder, "auto")
    _check_name(run, text.name)
    if not run.library.entries:
        raise UserError(
            f"{run_folder}: this run remembers no text of its skills, so no gate row can be fitted beside theirs"
        )
    old_files = checkpoint.read(run.checkpoint)
    stored = checkpoint.stored_files(run.checkpoint, old_files, pool_files(run.base, run.pool, run.library))
    foreign_adapter = adapters.read_adapter(adapter, run.base)
    check_base(foreign_adapter.base, run.base, adapter, same_base)
    expert = adapters.to_expert(foreign_adapter, run.model.shapes, adapter)
    sources = RunSources()
    (skill,) = sources.read_all([text], run.config, run.base.tokenizer, run.base.args.vocab_size)
    base_pass = run_base_pass(run.model, skill, run.config)
    top_experts_before = _top_experts(run.model, run.library)
    expert_id = add_frozen_expert(run.pool, expert, text.name)
    skill_exemplars = split_skill.skill_exemplars(run.config, skill)
    newcomer = SkillFeatures(base_pass.statistics, base_pass.memory, expert_id), skill_exemplars
    fit_steps = max(run.config.training.router_fit_steps, 100)
    fit_router.fit_to_library(run.model, run.library, run.config, newcomer, fit_steps, [expert_id])
    taken_share = float(
        np.mean((_top_experts(run.model, run.library) == expert_id) & (top_experts_before != expert_id))
    )
    run.library.add(
        LibraryEntry(
            text.name,
            expert_id,
            base_pass.means,
            base_pass.statistics,
            base_pass.memory,
            exemplars=skill_exemplars,
            format=str(skill.format),
        )
    )
    losses = _losses(run, skill, expert_id)
    files = old_files | pool_files(run.base, run.pool, run.library)
    if "trainer.json" in files:
        add_imported_skill(files, skill, *losses[:2])
    _save(run_folder, run, skill, sources, files, stored)
    log_import(run_folder, skill.name, len(run.pool), adapter)
    return ImportedExpert(expert_id, *losses, taken_share)


def _check_name(run: OpenedRun, name: str) -> None:
    config = run.config
    base_skill = [config.growth.base_skill] if config.growth.base_skill else []
    taken_names = {source.name for source in (*base_skill, *config.skills, *config.domains)}
    if name in {*taken_names, *run.library.experts_of, *formats.expert_names(run.pool)}:
        raise UserError(f"--name {name}: this run has a skill of that name; choose another")


def _top_experts(model: RoutedDecoder, library: Library) -> np.ndarray:
    """Return the top-1 expert's gate column for every remembered feature."""
    features = mx.array(np.concatenate([entry.memory.astype(np.float32) for entry in library.entries]))
    return np.array(model.router(features).argmax(-1))


def _losses(run: OpenedRun, skill: Skill, expert_id: int) -> tuple[float, float, float]:
    """Return validation losses in nats per token: base, mixture, and every token on one expert."""
    mixture = formats.mixture_routing(run)
    domain = make_held_out([skill], run.config, compiled=False).validation[skill.name]
    routing, single_expert = Routing(mixture.top_k, mx.array(mixture.temperature)), Routing(None, mx.array(1.0))
    return (
        evaluate(run.model, domain, single_expert, 0).loss,
        evaluate(run.model, domain, routing).loss,
        evaluate(run.model, domain, single_expert, expert_id).loss,
    )


def _save(
    run_folder: Path,
    run: OpenedRun,
    skill: Skill,
    sources: RunSources,
    files: CheckpointContent,
    stored: StoredFiles,
) -> None:
    """Replace the run's checkpoint by one of `files`, keep the old one as a backup, and add the skill to the config."""
    config = replace(run.config, skills=[*run.config.skills, skill.source])
    backup = run.checkpoint.with_name(f"before-{skill.name}")
    shutil.rmtree(backup, ignore_errors=True)
    try:
        # atomic_write renames the new config into place last. Until then a failure leaves the run as it was.
        with sources.written(run_folder), atomic_write(run_folder / "config.yaml") as temporary:
            temporary.write_text(to_yaml(config), encoding="utf-8")
            copy_folder(run.checkpoint, backup)
            checkpoint.write(run.checkpoint, files, stored)
    except (OSError, RuntimeError) as error:  # MLX raises RuntimeError when a write fails
        shutil.rmtree(backup, ignore_errors=True)
        raise write_error(run_folder, error, "the run is as it was") from error
