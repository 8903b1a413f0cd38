"""The run folder's lifecycle: start, resume and extend a run, save checkpoints, and open a run for reading."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

from dylora_mlx.config import Config, LogConfig, Source
from dylora_mlx.config.load import load_config, to_yaml
from dylora_mlx.config.paths import resolve_config, resolve_source
from dylora_mlx.data import kept, stream
from dylora_mlx.data.chat_template import resolve_template, stored_template
from dylora_mlx.data.kept import RunSources
from dylora_mlx.data.stream import Skill
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
from dylora_mlx.run.build import build_run, make_decoder, make_expert_cache, own_sources
from dylora_mlx.run.cost.estimate import valid_estimate
from dylora_mlx.run.resume import FINAL, find_resume_point, set_aside
from dylora_mlx.system import console
from dylora_mlx.system.files import FolderLock, atomic_folder, check_run_parent, write_error, write_text
from dylora_mlx.system.run_format import check_run_folder
from dylora_mlx.training import failures, summary
from dylora_mlx.training.budget import residency
from dylora_mlx.training.checkpoint import checkpoint, retention
from dylora_mlx.training.checkpoint.checkpoint import CheckpointContent
from dylora_mlx.training.checkpoint.state import (
    checkpoint_content,
    imported_trainer,
    restore_pool,
    step_folder_name,
    stored_digests,
)
from dylora_mlx.training.metrics.recorder import MetricsRecorder, truncate_lines
from dylora_mlx.training.metrics.timers import Timers, valid_totals
from dylora_mlx.training.metrics.trackers.trackers import Trackers, check_installed
from dylora_mlx.training.run import TrainingRun

REFERENCE_FILE = "reference.safetensors"
"""File in a run folder with the reference statistics, which embeddings are centred on."""


def start_run(config: Config, folder: Path) -> TrainingRun:
    """Start a fresh run. Nothing is written until the base and all data have been checked.

    The run folder gets everything that it needs but the base: absolute paths, the text of a chat template, and the tokenized
    documents.

    Raises UserError when the folder exists or cannot be created, or the base or the data is invalid.
    """
    group = world()
    with group.raise_on_all_ranks():
        if group.is_main_process:
            _check_free(folder)
            check_installed(config.log)
        config = resolve_config(config)
        config = replace(config, data=replace(config.data, chat_template=stored_template(config.data.chat_template)))
    run = build_run(config, folder, None)
    with group.raise_on_all_ranks():
        if group.is_main_process:
            _create_folder(run.config, run.folder, run.reference, run.sources)
    with _holding_lock(run.folder) as lock:
        return _start_recording(run, lock)


def _check_free(folder: Path) -> None:
    """Raise UserError if the run folder exists already or cannot be created."""
    if folder.exists():
        raise UserError(f"{folder}: exists already; choose another --name, or go on with --resume {folder}")
    check_run_parent(folder)


def _create_folder(config: Config, folder: Path, reference: Reference, sources: RunSources) -> None:
    """Create the run folder atomically: if it exists it has a config, so that the run can be resumed at any time."""
    try:
        with atomic_folder(folder) as temporary:
            (temporary / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
            embedding.save_reference(reference, temporary / REFERENCE_FILE)
            sources.write_new(temporary)
    except (OSError, RuntimeError) as error:  # MLX raises RuntimeError for a failed write
        raise write_error(folder, error, "choose another folder with --runs") from error


def _start_recording(run: TrainingRun, lock: FolderLock | None) -> TrainingRun:
    """Write run.json, offload frozen experts, and open the metrics, the decision log and the trackers. Returns the run.

    Ranks other than 0 log nothing to trackers, and keep features and offloaded experts in a temporary folder.
    """
    run.lock, group = lock, world()
    with group.raise_on_all_ranks():
        try:
            metadata.write_metadata(run, "running")
        except OSError as error:
            raise UserError(
                f"{run.folder / 'run.json'}: cannot be written ({error.strerror}); make room for it"
            ) from error
    log = run.config.log if group.is_main_process else LogConfig()
    run.scratch = None if group.is_main_process else run.scratch or TemporaryDirectory()
    with group.raise_on_all_ranks():
        try:
            residency.offload_frozen(run)
        except OSError as error:
            raise UserError(f"{run.experts_folder}: cannot be written ({error.strerror}); make room for it") from error
    trackers = Trackers(log, run.folder, asdict(run.config), metadata.run_id(run.folder), console.warn)
    run.recorder, run.decision_log = MetricsRecorder(run.folder, trackers), DecisionLog(run.folder)
    return run


def lock_run(folder: Path) -> FolderLock:
    """Lock a run folder before changing it, and repair what processes left that were killed while they wrote.

    Raises UserError when there is no run of a known format, or another process works on it.
    """
    check_run_folder(folder)
    lock = FolderLock(folder)
    for place in (folder, folder / kept.FOLDER):
        for leftover in place.glob(".*.partial*"):  # left by a process that was killed while writing (see atomic_write)
            if leftover.is_file():
                leftover.unlink(missing_ok=True)
    checkpoint.recover(folder)
    return lock


@contextmanager
def _holding_lock(folder: Path) -> Iterator[FolderLock | None]:
    """Yield the folder's lock, which rank 0 holds for all ranks; None on the others.

    The lock outlives the block, unless the block raises. An OSError in the block is raised as a Failure.
    """
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
    """Resume a run from its newest intact checkpoint, or from its beginning if it has none yet.

    Metrics and decisions that were recorded after the checkpoint are removed: the resumed run records them again.

    Raises UserError when there is no run, it is finished, another process works on it, or no checkpoint is intact.
    """
    with _holding_lock(folder) as lock:
        config, newest = find_resume_point(folder)
        _check_trackers(config)
        sources = _shared_sources(config, folder, newest.files if newest else {})
        run = build_run(config, folder, newest and newest[:2], sources)
        run.scratch = newest.scratch if newest else None
        if is_main_process():
            run.sources.write_new(folder)
            truncate_lines(folder / "metrics.jsonl", run.state.metric_lines)
            truncate_lines(folder / decision_log.FILE_NAME, run.state.decision_lines)
        info = metadata.read_metadata(folder)
        run.timers, run.estimate = (
            Timers(valid_totals(info.get("resources"))),
            valid_estimate(info.get("estimate")),
        )
        origin = f"from {newest.folder}" if newest else "from the beginning, there was no checkpoint yet"
        console.info(f"resumed {origin}: step {run.state.step}, skill {run.state.skill_index + 1} of {len(run.skills)}")
        return _start_recording(run, lock)


def _check_trackers(config: Config) -> None:
    """Raise UserError on all ranks if rank 0, which logs, lacks the package of a tracker."""
    with world().raise_on_all_ranks():
        if is_main_process():
            check_installed(config.log)


def _shared_sources(config: Config, folder: Path, files: CheckpointContent) -> RunSources:
    """Return the stored sources of a run that is resumed. Rank 0 sends it to the others, which may not share a disk."""
    digests, group = stored_digests(files), world()
    if group.world_size == 1:
        return RunSources(folder, digests, resuming=True)
    contents = {}
    for source in own_sources(config):
        path = kept.path_of(folder, source.name)
        try:
            content = path.read_bytes() if group.is_main_process else b""
        except OSError:
            content = b""
        contents[source.name] = group.broadcast_bytes(content)
    return RunSources(folder, digests, resuming=True, received=None if group.is_main_process else contents)


def extend_run(folder: Path, source: Source) -> TrainingRun:
    """Reopen a finished run with one more skill to learn. Its final checkpoint is kept as checkpoints/before-NAME.

    Nothing is written until the base and the new data have been checked. Raises UserError if the run has not finished or
    already has a skill or domain of that name.
    """
    final = folder / "checkpoints" / FINAL
    with _holding_lock(folder) as lock:
        if not final.is_dir():
            raise UserError(f"{folder}: this run has not finished; go on with --resume {folder} first")
        config, files = load_config(folder / "config.yaml"), checkpoint.read(final)
        _check_trackers(config)
        try:
            config = replace(config, skills=[*config.skills, resolve_source(source)])
        except ValueError as error:
            raise UserError(
                f"--name {source.name}: this run has a skill or domain of that name; choose another"
            ) from error
        if "trainer.json" not in files:  # an imported run was not trained here
            files |= imported_trainer(len(config.skills) - 1)
        run = build_run(config, folder, (final, files), RunSources(folder, stored_digests(files)))
        # The order matters if this process is stopped: once config.yaml lists the new skill, the step checkpoint exists, and
        # `find_resume_point` finishes by renaming the final checkpoint.
        try:
            with run.sources.written(folder):
                # All lines: those of imports and restored experts came after the final checkpoint was written.
                run.state.decision_lines = DecisionLog(folder).lines
                restored = checkpoint_content(run.state, run.base, run.pool, run.library, run.optimizers)
                checkpoint.write(folder / "checkpoints" / step_folder_name(run.state.step), restored, run.stored)
                write_text(folder / "config.yaml", to_yaml(config))
            residency.offload_frozen(run)  # before the rename: restored experts still refer to files below `final`
            set_aside(final, source.name)
        except (OSError, RuntimeError) as error:  # MLX raises RuntimeError for a failed write
            raise write_error(folder, error, "give back the permission to write there") from error
        return _start_recording(run, lock)


def reopen_finished(folder: Path) -> tuple[TrainingRun, dict[str, Any]]:
    """Build a finished run again, and return it with the resources that it used, from run.json.

    Raises UserError if the run has not finished or run.json does not have them.
    """
    check_run_folder(folder)
    final, resources = folder / "checkpoints" / FINAL, valid_totals(metadata.read_metadata(folder).get("resources"))
    if not final.is_dir():
        raise UserError(f"{folder}: this run has not finished; go on with --resume {folder} first")
    if resources is None:
        raise UserError(f"{folder / 'run.json'}: does not say what the run took; give its config instead")
    config = load_config(folder / "config.yaml")
    # With all experts in memory, nothing is offloaded to files: the run folder stays as it is.
    in_memory_config = replace(config, model=replace(config.model, expert_memory_mb=None))
    files = checkpoint.read(final)
    run = build_run(in_memory_config, folder, (final, files), RunSources(folder, stored_digests(files)))
    run.config = config
    return run, resources


def save_checkpoint(run: TrainingRun, name: str | None = None) -> None:
    """Write a checkpoint, prune old ones, and write the report and run.json if they are due. Rank 0 writes, the other ranks
    wait.

    `name` defaults to the name for the current step.
    """
    # The checkpoint holds the number of lines, so that a resumed run can remove later ones.
    run.state.metric_lines, run.state.decision_lines = run.metrics.lines, run.log.lines
    if is_main_process():
        files = checkpoint_content(run.state, run.base, run.pool, run.library, run.optimizers)
        folder = run.folder / "checkpoints" / (name or step_folder_name(run.state.step))
        with run.timers.time("checkpoints"):
            checkpoint.write(folder, files, run.stored)
            run.stored.replace(run.library.map_memories(folder))
            limits = run.config.training
            retention.prune_steps(run.folder, limits.keep_checkpoints, limits.checkpoints_mb)
        if summary.report_is_due(run):
            with run.timers.time("report"):
                summary.write_report(run)
                metadata.write_metadata(run, "running")
    world().barrier()  # no rank continues, or exits, before the checkpoint is complete


class OpenedRun(NamedTuple):
    """The parts of a run, restored from its final checkpoint or else from its newest intact step checkpoint."""

    config: Config
    base: Base
    model: RoutedDecoder
    pool: Pool
    library: Library
    checkpoint: Path
    """Folder of the checkpoint."""
    sources: RunSources | None = None
    """The documents that the run stored of its sources; None for a run that has no folder yet."""

    def read_sources(self, sources: Sequence[Source]) -> list[Skill]:
        """Read sources: the run's own ones as it learned them, others as they are.

        Raises UserError for a bad source, and for one of the run's whose records are others now.
        """
        config, tokenizer, kept_sources = self.config, self.base.tokenizer, self.sources or RunSources()
        # A source under the name of one of the run's is another one, unless it is the same in every option.
        known_sources = [source for source in sources if source in own_sources(config)]
        kept_sources.check_available(known_sources)
        RunSources().check_available([source for source in sources if source not in known_sources])
        skills = {s.name: s for s in kept_sources.read_all(known_sources, config, tokenizer, self.base.args.vocab_size)}
        kept_sources.new.clear()  # a run that is only read is not written to
        return [
            skills[source.name]
            if source in known_sources
            else stream.prepare_skill(source, config.data, tokenizer, config.seed)
            for source in sources
        ]


def open_run(
    folder: Path, dtype: Literal["auto", "float32", "bfloat16"] = "auto", load_experts: bool = True
) -> OpenedRun:
    """Open a run for reading.

    Args:
        folder: the run folder.
        dtype: dtype of the base. "auto" selects float32 on a CPU and bfloat16 on a GPU.
        load_experts: load all experts into memory. If False, and model.expert_memory_mb is set, frozen experts stay
            offloaded in the checkpoint's files.

    Raises:
        UserError: there is no run, no checkpoint is intact, or the base is not available.
    """
    check_run_folder(folder)
    config = load_config(folder / "config.yaml")
    final = folder / "checkpoints" / FINAL
    source, files = checkpoint.final_or_newest(folder, final)
    base = load_base(config.model.base, dtype, resolve_template(config.data.chat_template))
    model = make_decoder(config, base)
    pool = Pool(model, None if load_experts else make_expert_cache(config))
    library = restore_pool(files, base, pool, source)
    return OpenedRun(config, base, model, pool, library, source, RunSources(folder, stored_digests(files)))
