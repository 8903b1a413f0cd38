"""A run and its folder: begun, saved, resumed, extended, or opened for reading."""

from __future__ import annotations

import json
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import mlx.core as mx

from dylora_mlx import __version__, assembly, blas, cli, commands, console
from dylora_mlx.config import Config, Source
from dylora_mlx.cost import estimate
from dylora_mlx.errors import UserError
from dylora_mlx.files import read_json, unwritten
from dylora_mlx.growth import embedding, ledger
from dylora_mlx.growth.ledger import Ledger
from dylora_mlx.growth.library import Library
from dylora_mlx.growth.pool import Pool
from dylora_mlx.locks import Lock
from dylora_mlx.model import base as bases
from dylora_mlx.model.base import Base
from dylora_mlx.model.routed import RoutedDecoder
from dylora_mlx.reporting import page
from dylora_mlx.training import checkpoint, clock, faults, metrics, report
from dylora_mlx.training import state as states
from dylora_mlx.training.clock import Clock
from dylora_mlx.training.metrics import Recorder
from dylora_mlx.training.run import Run
from dylora_mlx.training.tracking import Tracker

REFERENCE = "reference.safetensors"
"""In a run folder: the statistics that its skills were compared with."""
FINAL = "final"
"""The checkpoint of a run that has learned all its skills."""


def begin(options: cli.Options) -> Run:
    """A fresh run: nothing is written until the base and all data are found good."""
    assert options.config is not None
    if options.folder.exists():
        raise UserError(
            f"{options.folder}: exists already; choose another --name, or go on with --resume {options.folder}"
        )
    commands.check_place(options.folder)
    run = assembly.assemble(options.config, options.folder, None)
    beside = run.folder.with_name(f".{run.folder.name}.partial")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        (beside / "config.yaml").write_text(options.yaml, encoding="utf-8")
        embedding.save_reference(run.reference, beside / REFERENCE)
        beside.rename(run.folder)  # with a config or not there: whatever stops this process, it can be resumed
    except (OSError, RuntimeError) as error:  # MLX raises the second kind
        shutil.rmtree(beside, ignore_errors=True)
        raise unwritten(run.folder, error, "choose another folder with --runs") from error
    with _held(run.folder) as lock:
        return _opened(run, lock)


def _opened(run: Run, lock: Lock) -> Run:
    """Ready to record."""
    run.lock = lock
    try:
        describe(run, "running")
    except OSError as error:
        raise UserError(f"{run.folder / 'run.json'}: cannot be written ({error.strerror}); make room for it") from error
    tracker = Tracker(run.config.log, run.folder, asdict(run.config), run_id(run.folder), console.warn)
    run.recorder, run.decisions = Recorder(run.folder, tracker), Ledger(run.folder)
    return run


def locked(folder: Path) -> Lock:
    """A run folder's lock, for whatever changes it. Raises UserError when there is no run, or another process works on it."""
    _check_there(folder)
    return Lock(folder)


def _check_there(folder: Path) -> None:
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: no run here (no config.yaml)")


@contextmanager
def _held(folder: Path) -> Iterator[Lock]:
    """The folder's lock, to be kept; let go if something goes wrong meanwhile. Raises Failure for what cannot be written."""
    lock = locked(folder)
    try:
        yield lock
    except OSError as error:
        lock.release()
        raise faults.unwritten(folder, error) from error
    except BaseException:
        lock.release()
        raise


def resume(folder: Path) -> Run:
    """A run as its newest intact checkpoint left it, or from its beginning if it has none yet; later records are taken back.

    Raises UserError when there is no run, it is finished, another process works on it, or no checkpoint is intact.
    """
    with _held(folder) as lock:
        config, final = cli.load_config(folder / "config.yaml"), folder / "checkpoints" / FINAL
        if final.is_dir() and not _unlearned(config, final):
            _mark_finished(folder)
            raise UserError(
                f"{folder}: this run is finished, there is nothing to resume; dylora add {folder} teaches it more"
            )
        if final.is_dir():
            _lay_aside(final, config.skills[-1].name)
        checkpoint.recover(folder)
        found = checkpoint.newest(folder) if checkpoint.any_step(folder) else None
        run = assembly.assemble(config, folder, found)
        metrics.truncate(folder / "metrics.jsonl", run.state.records)
        metrics.truncate(folder / ledger.NAME, run.state.ledger)
        before = described(folder)
        run.clock, run.estimate = Clock(clock.intact(before.get("taken"))), estimate.intact(before.get("estimate"))
        where = f"from {found[0]}" if found else "from the beginning, there was no checkpoint yet"
        console.say(f"resumed {where}: step {run.state.step}, skill {run.state.skill + 1} of {len(run.skills)}")
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
            _lay_aside(final, source.name)
        except (OSError, RuntimeError) as error:  # MLX raises the second kind
            raise unwritten(folder, error, "give back the permission to write there") from error
        return _opened(run, lock)


def reopened(folder: Path) -> tuple[Run, dict[str, Any]]:
    """A finished run put together again, and what it took. Raises UserError for one that has not finished, or did not say."""
    _check_there(folder)
    final, found = folder / "checkpoints" / FINAL, clock.intact(described(folder).get("taken"))
    if not final.is_dir():
        raise UserError(f"{folder}: this run has not finished; go on with --resume {folder} first")
    if found is None:
        raise UserError(f"{folder / 'run.json'}: does not say what the run took; give its config instead")
    config = cli.load_config(folder / "config.yaml")
    config = replace(config, model=replace(config.model, expert_memory_mb=None))  # nothing is put into files
    return assembly.assemble(config, folder, (final, checkpoint.read(final))), found


def _unlearned(config: Config, final: Path) -> bool:
    """Whether a skill was added after a final checkpoint, by a process that was then stopped."""
    if not (final / "trainer.json").is_file():
        return False
    trainer = read_json(final / "trainer.json")
    parts = sum(len(set(of["train"])) - 1 for of in trainer["parts"].values())
    return trainer["skill"] - parts < len(config.skills)


def _mark_finished(folder: Path) -> None:
    """Say in run.json that a run has finished, if the process that finished it was stopped before it did."""
    path = folder / "run.json"
    found = read_json(path) if path.is_file() else {}
    if found.get("status") != "running":
        return
    for passing in ("features", "experts"):
        shutil.rmtree(folder / passing, ignore_errors=True)
    try:
        write_json(path, {**found, "status": "finished"})
        page.write(folder)
    except OSError as error:
        raise UserError(f"{folder}: this run is finished, but that cannot be noted ({error.strerror})") from error


def _lay_aside(final: Path, name: str) -> None:
    aside = final.with_name(f"before-{name}")
    shutil.rmtree(aside, ignore_errors=True)
    final.rename(aside)


def save(run: Run, name: str | None = None) -> None:
    """Write a checkpoint, named by the step unless told otherwise, prune old ones, and draw the report."""
    run.state.records, run.state.ledger = run.record.records, run.ledger.lines
    files = states.content(run.state, run.base, run.pool, run.library, run.optimizers)
    with run.clock.on("checkpoints"):
        checkpoint.write(run.folder / "checkpoints" / (name or states.step_folder(run.state.step)), files)
        checkpoint.prune(run.folder, run.config.training.keep_checkpoints)
    with run.clock.on("report"):
        report.write(run)
    describe(run, "running")


def described(folder: Path) -> dict[str, Any]:
    """run.json; empty if it is missing or damaged, for a run goes on without it."""
    try:
        found = read_json(folder / "run.json")
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}


def run_id(folder: Path) -> str:
    """What a run is known by elsewhere (in W&B), whatever its folder is called: made once, kept in run.json."""
    found = described(folder).get("id")
    return found if isinstance(found, str) and re.fullmatch(r"[a-z0-9]{4,64}", found) else uuid.uuid4().hex[:12]


def describe(run: Run, status: str) -> dict[str, Any]:
    """run.json: id, status, versions, device and base; what the run has taken so far, and what it was expected to take.

    Returns what it has taken: seconds by name, MLX's peak memory and the folder's size in bytes, and steps.
    """
    taken = {**run.clock.taken(), "disk": size(run.folder), "steps": run.state.step}
    info = {
        "id": run_id(run.folder), "status": status, "dylora_mlx": __version__, "mlx": version("mlx"), "python": sys.version.split()[0],
        "device": str(mx.default_device()), "blas": blas.describe(), "base": run.base.name,
        "fingerprint": run.base.fingerprint, "dtype": str(run.base.dtype).removeprefix("mlx.core."), "format": checkpoint.FORMAT,
        "taken": taken,
    }  # fmt: skip
    write_json(run.folder / "run.json", info | ({} if run.estimate is None else {"estimate": run.estimate}))
    return taken


def size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write_json(path: Path, value: dict) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Written beside, then renamed."""
    beside = path.with_name(f"{path.name}.partial")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


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
