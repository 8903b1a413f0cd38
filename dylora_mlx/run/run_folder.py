"""A run and its folder: begun, saved, resumed, extended, or opened for reading."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

from dylora_mlx.config import Config, Source
from dylora_mlx.config.load import load_config, to_yaml
from dylora_mlx.distributed.group import is_main_process, world
from dylora_mlx.errors import UserError
from dylora_mlx.growth.decide import decision_log
from dylora_mlx.growth.decide.decision_log import DecisionLog
from dylora_mlx.growth.library import Library
from dylora_mlx.growth.novelty import embedding
from dylora_mlx.growth.novelty.embedding import Reference
from dylora_mlx.growth.pool import Pool
from dylora_mlx.model.base.load import Base, load_base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.run import metadata
from dylora_mlx.run.build import build_run, make_decoder, make_expert_cache
from dylora_mlx.run.cost.estimate import valid_estimate
from dylora_mlx.run.resume import FINAL, find_resume_point, set_aside
from dylora_mlx.system import console
from dylora_mlx.system.files import FolderLock, atomic_folder, check_run_parent, write_error, write_text
from dylora_mlx.training import failures, summary
from dylora_mlx.training.budget import residency
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.checkpoint.state import checkpoint_content, imported_trainer, restore_pool, step_folder_name
from dylora_mlx.training.metrics.recorder import MetricsRecorder, truncate_lines
from dylora_mlx.training.metrics.timers import Timers, valid_totals
from dylora_mlx.training.metrics.wandb_log import WandbTracker
from dylora_mlx.training.run import TrainingRun

REFERENCE_FILE = "reference.safetensors"
"""In a run folder: the statistics that its skills were compared with."""


def start_run(config: Config, folder: Path) -> TrainingRun:
    """A fresh run: nothing is written until the base and all data are found good."""
    group = world()
    with group.raise_on_all_ranks():
        if group.is_main_process:
            _check_free(folder)
    run = build_run(config, folder, None)
    with group.raise_on_all_ranks():
        if group.is_main_process:
            _create_folder(run.config, run.folder, run.reference)
    with _holding_lock(run.folder) as lock:
        return _start_recording(run, lock)


def _check_free(folder: Path) -> None:
    if folder.exists():
        raise UserError(f"{folder}: exists already; choose another --name, or go on with --resume {folder}")
    check_run_parent(folder)


def _create_folder(config: Config, folder: Path, reference: Reference) -> None:
    """The run folder: with a config or none, so that it can be resumed whatever stops this process."""
    try:
        with atomic_folder(folder) as temporary:
            (temporary / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
            embedding.save_reference(reference, temporary / REFERENCE_FILE)
    except (OSError, RuntimeError) as error:  # MLX raises the second kind
        raise write_error(folder, error, "choose another folder with --runs") from error


def _start_recording(run: TrainingRun, lock: FolderLock | None) -> TrainingRun:
    """Ready to record, if this is the rank that does."""
    run.lock, group = lock, world()
    with group.raise_on_all_ranks():
        try:
            metadata.write_metadata(run, "running")
        except OSError as error:
            raise UserError(
                f"{run.folder / 'run.json'}: cannot be written ({error.strerror}); make room for it"
            ) from error
    log = run.config.log if group.is_main_process else replace(run.config.log, wandb="disabled")
    run.scratch = None if group.is_main_process else run.scratch or TemporaryDirectory()
    with group.raise_on_all_ranks():
        try:
            residency.offload_frozen(run)
        except OSError as error:
            raise UserError(f"{run.experts_folder}: cannot be written ({error.strerror}); make room for it") from error
    tracker = WandbTracker(log, run.folder, asdict(run.config), metadata.run_id(run.folder), console.warn)
    run.recorder, run.decision_log = MetricsRecorder(run.folder, tracker), DecisionLog(run.folder)
    return run


def lock_run(folder: Path) -> FolderLock:
    """Lock a run folder before changing it. Raises UserError when there is no run, or another process works on it."""
    _check_is_run(folder)
    lock = FolderLock(folder)
    for left in folder.glob(".*.partial*"):  # of a process that was killed while it wrote: see atomic_write
        if left.is_file():
            left.unlink(missing_ok=True)
    return lock


def _check_is_run(folder: Path) -> None:
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: no run here (no config.yaml)")


@contextmanager
def _holding_lock(folder: Path) -> Iterator[FolderLock | None]:
    """The folder's lock, to be kept, which rank 0 has for all; let go if something goes wrong meanwhile. Raises Failure for
    what cannot be written."""
    with world().raise_on_all_ranks():
        lock = lock_run(folder) if is_main_process() else None
    try:
        yield lock
    except BaseException as error:
        if lock is not None:
            lock.release()
        if isinstance(error, OSError):
            raise failures.write_failure(folder, error) from error
        raise


def resume_run(folder: Path) -> TrainingRun:
    """A run as its newest intact checkpoint left it, or from its beginning if it has none yet; later records are taken back.

    Raises UserError when there is no run, it is finished, another process works on it, or no checkpoint is intact.
    """
    with _holding_lock(folder) as lock:
        config, newest = find_resume_point(folder)
        run = build_run(config, folder, newest and newest[:2])
        run.scratch = newest.scratch if newest else None
        if is_main_process():
            truncate_lines(folder / "metrics.jsonl", run.state.metric_lines)
            truncate_lines(folder / decision_log.FILE_NAME, run.state.decision_lines)
        before = metadata.read_metadata(folder)
        run.timers, run.estimate = (
            Timers(valid_totals(before.get("resources"))),
            valid_estimate(before.get("estimate")),
        )
        origin = f"from {newest.folder}" if newest else "from the beginning, there was no checkpoint yet"
        console.info(f"resumed {origin}: step {run.state.step}, skill {run.state.skill_index + 1} of {len(run.skills)}")
        return _start_recording(run, lock)


def extend_run(folder: Path, source: Source) -> TrainingRun:
    """A finished run with one more skill to learn; the checkpoint as it was stays, as checkpoints/before-NAME.

    Nothing is written until the new data and the base are found good. Raises UserError for a run that has not finished,
    and a name that it has already.
    """
    final = folder / "checkpoints" / FINAL
    with _holding_lock(folder) as lock:
        if not final.is_dir():
            raise UserError(f"{folder}: this run has not finished; go on with --resume {folder} first")
        config, files = load_config(folder / "config.yaml"), checkpoint.read(final)
        try:
            config = replace(config, skills=[*config.skills, source])
        except ValueError as error:
            raise UserError(
                f"--name {source.name}: this run has a skill or domain of that name; choose another"
            ) from error
        if "trainer.json" not in files:  # a run that was imported has learned nothing by itself
            files["trainer.json"] = imported_trainer(len(config.skills) - 1)
        run = build_run(config, folder, (final, files))
        try:
            checkpoint.write(folder / "checkpoints" / step_folder_name(run.state.step), files)
            write_text(folder / "config.yaml", to_yaml(config))
            residency.offload_frozen(run)  # before the files that it came from are called otherwise
            set_aside(final, source.name)
        except (OSError, RuntimeError) as error:  # MLX raises the second kind
            raise write_error(folder, error, "give back the permission to write there") from error
        return _start_recording(run, lock)


def reopen_finished(folder: Path) -> tuple[TrainingRun, dict[str, Any]]:
    """A finished run put together again, and what it took. Raises UserError for one that has not finished, or did not say."""
    _check_is_run(folder)
    final, found = folder / "checkpoints" / FINAL, valid_totals(metadata.read_metadata(folder).get("resources"))
    if not final.is_dir():
        raise UserError(f"{folder}: this run has not finished; go on with --resume {folder} first")
    if found is None:
        raise UserError(f"{folder / 'run.json'}: does not say what the run took; give its config instead")
    config = load_config(folder / "config.yaml")
    whole = replace(config, model=replace(config.model, expert_memory_mb=None))  # nothing is put into files
    run = build_run(whole, folder, (final, checkpoint.read(final)))
    run.config = config
    return run, found


def save_checkpoint(run: TrainingRun, name: str | None = None) -> None:
    """Write a checkpoint, named by the step unless told otherwise, prune old ones, and draw the report. Other ranks wait."""
    run.state.metric_lines, run.state.decision_lines = run.metrics.lines, run.log.lines
    if is_main_process():
        files = checkpoint_content(run.state, run.base, run.pool, run.library, run.optimizers)
        with run.timers.time("checkpoints"):
            checkpoint.write(run.folder / "checkpoints" / (name or step_folder_name(run.state.step)), files)
            checkpoint.prune(run.folder, run.config.training.keep_checkpoints)
        with run.timers.time("report"):
            summary.write_report(run)
        metadata.write_metadata(run, "running")
    world().barrier()  # whoever leaves now, the checkpoint is there


class OpenedRun(NamedTuple):
    """A run's parts as its final checkpoint, or its newest intact one, holds them."""

    config: Config
    base: Base
    model: RoutedDecoder
    pool: Pool
    library: Library
    checkpoint: Path


def open_run(folder: Path, dtype: Literal["auto", "float32", "bfloat16"] = "auto", whole: bool = True) -> OpenedRun:
    """Load a run; not whole: experts stay in the checkpoint's files if the run kept them in files. Raises UserError when
    there is none, when its checkpoint is damaged, or its base is not at hand."""
    _check_is_run(folder)
    config = load_config(folder / "config.yaml")
    final = folder / "checkpoints" / FINAL
    found, files = checkpoint.final_or_newest(folder, final)
    base = load_base(config.model.base, dtype)
    model = make_decoder(config, base)
    pool = Pool(model, None if whole else make_expert_cache(config))
    library = restore_pool(files, base, pool, found)
    return OpenedRun(config, base, model, pool, library, found)
