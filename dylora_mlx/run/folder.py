"""A run and its folder: begun, saved, resumed, extended, or opened for reading."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

from dylora_mlx.cli import options as cli
from dylora_mlx.cli import parser as commands
from dylora_mlx.config import Config, Source
from dylora_mlx.distributed import group as ranks
from dylora_mlx.errors import UserError
from dylora_mlx.growth.decide import decision_log as ledger
from dylora_mlx.growth.decide.decision_log import Ledger
from dylora_mlx.growth.library import Library
from dylora_mlx.growth.novelty import embedding
from dylora_mlx.growth.pool import Pool
from dylora_mlx.model.base import load as bases
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.run import build as assembly
from dylora_mlx.run import metadata as identity
from dylora_mlx.run import resume as resuming
from dylora_mlx.run.cost import estimate
from dylora_mlx.run.resume import FINAL
from dylora_mlx.system import console
from dylora_mlx.system.files import FolderLock, unwritten, write_text
from dylora_mlx.training import failures as faults
from dylora_mlx.training import summary as report
from dylora_mlx.training.budget import residency
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.checkpoint import state as states
from dylora_mlx.training.metrics import recorder as metrics
from dylora_mlx.training.metrics import timers as clock
from dylora_mlx.training.metrics.recorder import Recorder
from dylora_mlx.training.metrics.timers import Clock
from dylora_mlx.training.metrics.wandb_log import Tracker
from dylora_mlx.training.run import Run

REFERENCE = "reference.safetensors"
"""In a run folder: the statistics that its skills were compared with."""


def begin(options: cli.Options) -> Run:
    """A fresh run: nothing is written until the base and all data are found good."""
    assert options.config is not None
    group = ranks.group()
    with group.agreed():
        if group.leads:
            _check_free(options.folder)
    run = assembly.assemble(options.config, options.folder, None)
    with group.agreed():
        if group.leads:
            _make(run, options.yaml)
    with _held(run.folder) as lock:
        return _opened(run, lock)


def _check_free(folder: Path) -> None:
    if folder.exists():
        raise UserError(f"{folder}: exists already; choose another --name, or go on with --resume {folder}")
    commands.check_place(folder)


def _make(run: Run, yaml: str) -> None:
    """The run folder: with a config or none, so that it can be resumed whatever stops this process."""
    beside = run.folder.with_name(f".{run.folder.name}.partial")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        (beside / "config.yaml").write_text(yaml, encoding="utf-8")
        embedding.save_reference(run.reference, beside / REFERENCE)
        beside.rename(run.folder)
    except (OSError, RuntimeError) as error:  # MLX raises the second kind
        shutil.rmtree(beside, ignore_errors=True)
        raise unwritten(run.folder, error, "choose another folder with --runs") from error


def _opened(run: Run, lock: FolderLock | None) -> Run:
    """Ready to record, if this is the rank that does."""
    run.lock, group = lock, ranks.group()
    with group.agreed():
        try:
            identity.describe(run, "running")
        except OSError as error:
            raise UserError(
                f"{run.folder / 'run.json'}: cannot be written ({error.strerror}); make room for it"
            ) from error
    log = run.config.log if group.leads else replace(run.config.log, wandb="disabled")
    run.aside = None if group.leads else run.aside or TemporaryDirectory()
    with group.agreed():
        try:
            residency.put_down(run)
        except OSError as error:
            raise UserError(f"{run.experts}: cannot be written ({error.strerror}); make room for it") from error
    tracker = Tracker(log, run.folder, asdict(run.config), identity.run_id(run.folder), console.warn)
    run.recorder, run.decisions = Recorder(run.folder, tracker), Ledger(run.folder)
    return run


def locked(folder: Path) -> FolderLock:
    """A run folder's lock, for whatever changes it. Raises UserError when there is no run, or another process works on it."""
    _check_there(folder)
    return FolderLock(folder)


def _check_there(folder: Path) -> None:
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: no run here (no config.yaml)")


@contextmanager
def _held(folder: Path) -> Iterator[FolderLock | None]:
    """The folder's lock, to be kept, which rank 0 has for all; let go if something goes wrong meanwhile. Raises Failure for
    what cannot be written."""
    with ranks.group().agreed():
        lock = locked(folder) if ranks.leads() else None
    try:
        yield lock
    except BaseException as error:
        if lock is not None:
            lock.release()
        if isinstance(error, OSError):
            raise faults.unwritten(folder, error) from error
        raise


def resume(folder: Path) -> Run:
    """A run as its newest intact checkpoint left it, or from its beginning if it has none yet; later records are taken back.

    Raises UserError when there is no run, it is finished, another process works on it, or no checkpoint is intact.
    """
    with _held(folder) as lock:
        config, newest = resuming.found(folder)
        run = assembly.assemble(config, folder, newest and newest[:2])
        run.aside = newest.aside if newest else None
        if ranks.leads():
            metrics.truncate(folder / "metrics.jsonl", run.state.records)
            metrics.truncate(folder / ledger.NAME, run.state.ledger)
        before = identity.described(folder)
        run.clock, run.estimate = Clock(clock.intact(before.get("taken"))), estimate.intact(before.get("estimate"))
        origin = f"from {newest.folder}" if newest else "from the beginning, there was no checkpoint yet"
        console.say(f"resumed {origin}: step {run.state.step}, skill {run.state.skill + 1} of {len(run.skills)}")
        return _opened(run, lock)


def extend(folder: Path, source: Source) -> Run:
    """A finished run with one more skill to learn; the checkpoint as it was stays, as checkpoints/before-NAME.

    Nothing is written until the new data and the base are found good. Raises UserError for a run that has not finished,
    and a name that it has already.
    """
    final = folder / "checkpoints" / FINAL
    with _held(folder) as lock:
        if not final.is_dir():
            raise UserError(f"{folder}: this run has not finished; go on with --resume {folder} first")
        config, files = cli.load_config(folder / "config.yaml"), checkpoint.read(final)
        try:
            config = replace(config, skills=[*config.skills, source])
        except ValueError as error:
            raise UserError(
                f"--name {source.name}: this run has a skill or domain of that name; choose another"
            ) from error
        if "trainer.json" not in files:  # a run that was imported has learned nothing by itself
            files["trainer.json"] = states.imported(len(config.skills) - 1)
        run = assembly.assemble(config, folder, (final, files))
        try:
            checkpoint.write(folder / "checkpoints" / states.step_folder(run.state.step), files)
            write_text(folder / "config.yaml", cli.as_yaml(config))
            residency.put_down(run)  # before the files that it came from are called otherwise
            resuming.lay_aside(final, source.name)
        except (OSError, RuntimeError) as error:  # MLX raises the second kind
            raise unwritten(folder, error, "give back the permission to write there") from error
        return _opened(run, lock)


def reopened(folder: Path) -> tuple[Run, dict[str, Any]]:
    """A finished run put together again, and what it took. Raises UserError for one that has not finished, or did not say."""
    _check_there(folder)
    final, found = folder / "checkpoints" / FINAL, clock.intact(identity.described(folder).get("taken"))
    if not final.is_dir():
        raise UserError(f"{folder}: this run has not finished; go on with --resume {folder} first")
    if found is None:
        raise UserError(f"{folder / 'run.json'}: does not say what the run took; give its config instead")
    config = cli.load_config(folder / "config.yaml")
    whole = replace(config, model=replace(config.model, expert_memory_mb=None))  # nothing is put into files
    run = assembly.assemble(whole, folder, (final, checkpoint.read(final)))
    run.config = config
    return run, found


def save(run: Run, name: str | None = None) -> None:
    """Write a checkpoint, named by the step unless told otherwise, prune old ones, and draw the report. Other ranks wait."""
    run.state.records, run.state.ledger = run.record.records, run.ledger.lines
    if ranks.leads():
        files = states.content(run.state, run.base, run.pool, run.library, run.optimizers)
        with run.clock.on("checkpoints"):
            checkpoint.write(run.folder / "checkpoints" / (name or states.step_folder(run.state.step)), files)
            checkpoint.prune(run.folder, run.config.training.keep_checkpoints)
        with run.clock.on("report"):
            report.write_report(run)
        identity.describe(run, "running")
    ranks.group().wait()  # whoever leaves now, the checkpoint is there


class Opened(NamedTuple):
    """A run's parts as its final checkpoint, or its newest intact one, holds them."""

    config: Config
    base: Base
    model: RoutedDecoder
    pool: Pool
    library: Library
    checkpoint: Path


def open_run(folder: Path, dtype: Literal["auto", "float32", "bfloat16"] = "auto", whole: bool = True) -> Opened:
    """Load a run; not whole: experts stay in the checkpoint's files if the run kept them in files. Raises UserError when
    there is none, when its checkpoint is damaged, or its base is not at hand."""
    _check_there(folder)
    config = cli.load_config(folder / "config.yaml")
    final = folder / "checkpoints" / FINAL
    found, files = checkpoint.best_of(folder, final)
    base = bases.load(config.model.base, dtype)
    model = assembly.routed(config, base)
    pool = Pool(model, None if whole else assembly.shelf_of(config))
    library = states.restore_pool(files, base, pool, found)
    return Opened(config, base, model, pool, library, found)
