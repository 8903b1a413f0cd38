"""A run and its folder: assembled from a config, begun, saved, resumed, or opened for reading."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import mlx.core as mx

from dylora_mlx import __version__, blas, cli
from dylora_mlx.config import Config
from dylora_mlx.data import skills as sources
from dylora_mlx.data import stream
from dylora_mlx.data.stream import Skill
from dylora_mlx.errors import UserError
from dylora_mlx.growth import bandit, embedding, ledger, projection, rank_law
from dylora_mlx.growth.embedding import Space
from dylora_mlx.growth.ledger import Ledger
from dylora_mlx.growth.library import Entry, Library
from dylora_mlx.growth.pool import Pool
from dylora_mlx.growth.projection import ProjectionHead
from dylora_mlx.model import base as bases
from dylora_mlx.model import device, numerics
from dylora_mlx.model.base import Base
from dylora_mlx.model.gemma3 import RoutedGemma3
from dylora_mlx.training import arrival, budget, checkpoint, display, evaluate, metrics, report, study
from dylora_mlx.training import state as states
from dylora_mlx.training.evaluate import Measure
from dylora_mlx.training.metrics import Recorder
from dylora_mlx.training.run import Ranks, Run
from dylora_mlx.training.state import State
from dylora_mlx.training.step import make_optimizers

REFERENCE = "reference.safetensors"
"""In a run folder: the statistics that its skills were compared with."""


def assemble(config: Config, folder: Path, files: checkpoint.Content | None) -> Run:
    """Load the base, read and check all data, and build the run, restored from a checkpoint's files if given."""
    known = config.growth.base_skill
    for source in (*([known] if known else []), *config.skills, *config.domains):
        sources.locate(source)
    display.say(f"BLAS: {blas.describe()}; device: {mx.default_device().type.name}")
    device.prepare()
    base = bases.load(config.model.base, config.model.dtype)
    _check_layers(config, base)
    skills = [stream.prepare(source, config.data, base.tokenizer, config.seed) for source in config.skills]
    others = [
        stream.prepare(source, config.data, base.tokenizer, config.seed)
        for source in ([known] if known else []) + config.domains
    ]
    for skill in (*skills, *(others[:1] if known else [])):
        _check_enough(skill, config)
    model = routed(config, base)
    pool, optimizers = Pool(model), make_optimizers(config.training)
    compiled, everything = not numerics.on_cpu(), (*others, *skills)
    shape = (config.data.row_length, config.training.batch_rows, compiled)
    domains = evaluate.domains({skill.name: skill.validation for skill in everything}, *shape)
    tests = evaluate.domains({skill.name: skill.test for skill in everything}, *shape)
    state = State(digests={skill.name: skill.digest for skill in everything})
    ranks = _ranks(config)
    budget.check(config.growth, pool, config.skills, ranks.start)
    learned, head = (
        bandit.learn_from(config.growth.bandit, config.seed),
        head_of(config, base.fingerprint, base.args.hidden_size),
    )
    if config.growth.policy == "bandit":
        display.say(f"bandit: {learned[1]}")
    library = Library(base.fingerprint)
    if files is not None:
        library, state = states.restore_pool(files, base, pool), states.restore_training(files, optimizers)
        for skill in everything:
            if state.digests.get(skill.name) != skill.digest:
                raise UserError(
                    f"{skill.source.source}: the data of '{skill.name}' changed since the run began; put it back to resume"
                )
    optimizers.init(model)
    reference = study.reference(base, model, config)
    space = Space(reference, config.growth.whitening, head)
    run = Run(
        config, folder, base, model, pool, library, reference, space, optimizers, state, skills,
        others[0] if known else None, domains, tests, Measure(model, compiled), ranks, learned=learned,
    )  # fmt: skip
    arrival.replay(run)
    return run


def routed(config: Config, base: Base) -> RoutedGemma3:
    """The base as a config wants it routed, without experts."""
    options = config.model
    return RoutedGemma3(base, options.projections, options.tap, config.training.grad_checkpoint, options.composition)


def _ranks(config: Config) -> Ranks:
    """Ranks of new experts, from the schedule if there is one."""
    options = config.growth.rank
    if options.schedule is None:
        return Ranks(config.model.rank, max(options.max, config.model.rank))
    schedule = rank_law.load(Path(options.schedule).expanduser())
    return Ranks(schedule.start, schedule.max_rank, schedule.scale)


def head_of(config: Config, fingerprint: str, dims: int) -> ProjectionHead | None:
    """The projection head that a config names, for a base."""
    path = config.growth.projection
    if path is None:
        return None
    return projection.load(Path(path).expanduser(), fingerprint, config.growth.whitening, dims)


def _check_layers(config: Config, base: Base) -> None:
    layers = base.args.num_hidden_layers
    if config.model.tap != "final" and int(config.model.tap) >= layers:
        raise UserError(f"model.tap: layer {config.model.tap}, but {base.name} has layers 0 to {layers - 1}")


def _check_enough(skill: Skill, config: Config) -> None:
    growth, train = config.growth, skill.train
    if train.documents < growth.min_samples:
        raise UserError(
            f"skill '{skill.name}' ({skill.source.source}): {train.documents} training documents, at least "
            f"{growth.min_samples} are needed (growth.min_samples)"
        )
    if train.tokens < growth.min_tokens:
        raise UserError(
            f"skill '{skill.name}' ({skill.source.source}): {train.tokens} training tokens, at least {growth.min_tokens} "
            "are needed (growth.min_tokens)"
        )
    if len({piece.tokens.tobytes() for piece in train.pieces}) == 1:
        raise UserError(
            f"skill '{skill.name}' ({skill.source.source}): all {train.documents} training documents are the same text; "
            "there is nothing to tell its kind by"
        )


def first_entry(run: Run) -> Entry:
    """What the base knows, as the library's first entry."""
    assert run.known is not None
    found = study.examine(run.model, run.known, run.config)
    kept = arrival.exemplars_of(run.config, run.known)
    return Entry(run.known.name, 0, found.means, found.statistics, found.memory, exemplars=kept)


def begin(options: cli.Options) -> Run:
    """A fresh run: nothing is written until the base and all data are found good."""
    assert options.config is not None
    if options.folder.exists():
        raise UserError(
            f"{options.folder}: exists already; choose another --name, or go on with --resume {options.folder}"
        )
    place = next(folder for folder in options.folder.absolute().parents if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"{options.folder}: cannot be written, see {place}; choose another folder with --runs")
    run = assemble(options.config, options.folder, None)
    try:
        run.folder.mkdir(parents=True)
        (run.folder / "config.yaml").write_text(options.yaml, encoding="utf-8")
        embedding.save_reference(run.reference, run.folder / REFERENCE)
    except OSError as error:
        raise UserError(
            f"{run.folder}: cannot be written ({error.strerror}); choose another folder with --runs"
        ) from error
    describe(run, "running")
    _open_records(run)
    return run


def resume(folder: Path) -> Run:
    """A run as its newest intact checkpoint left it; later records are taken back."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: no run here (no config.yaml)")
    if (folder / "checkpoints" / "final").is_dir():
        raise UserError(f"{folder}: this run is finished, there is nothing to resume")
    found, files = checkpoint.newest(folder)
    run = assemble(cli.load_config(folder / "config.yaml"), folder, files)
    metrics.truncate(folder / "metrics.jsonl", run.state.records)
    metrics.truncate(folder / ledger.NAME, run.state.ledger)
    display.say(f"resumed from {found}: step {run.state.step}, skill {run.state.skill + 1} of {len(run.skills)}")
    _open_records(run)
    return run


def save(run: Run, name: str | None = None) -> None:
    """Write a checkpoint, named by the step unless told otherwise, prune old ones, and draw the report."""
    run.state.records, run.state.ledger = run.record.records, run.ledger.lines
    files = states.content(run.state, run.base, run.pool, run.library, run.optimizers)
    checkpoint.write(run.folder / "checkpoints" / (name or states.step_folder(run.state.step)), files)
    checkpoint.prune(run.folder, run.config.training.keep_checkpoints)
    report.write(run)


def _open_records(run: Run) -> None:
    plain = asdict(run.config)
    run.recorder = Recorder(run.folder, run.config, plain, run.base.fingerprint[:8] + run.folder.name, display.warn)
    run.decisions = Ledger(run.folder)


def describe(run: Run, status: str) -> None:
    """run.json: versions, device, base and status."""
    info = {
        "status": status, "dylora_mlx": __version__, "mlx": version("mlx"), "python": sys.version.split()[0],
        "device": str(mx.default_device()), "blas": blas.describe(), "base": run.base.name,
        "fingerprint": run.base.fingerprint, "dtype": str(run.base.dtype).removeprefix("mlx.core."), "format": checkpoint.FORMAT,
    }  # fmt: skip
    write_json(run.folder / "run.json", info)


def write_json(path: Path, value: dict) -> None:
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


class Opened(NamedTuple):
    """A run's parts as its final checkpoint, or its newest intact one, holds them."""

    config: Config
    base: Base
    model: RoutedGemma3
    pool: Pool
    library: Library
    checkpoint: Path


def open_run(folder: Path, dtype: Literal["auto", "float32", "bfloat16"] = "auto") -> Opened:
    """Load a run. Raises UserError when there is none, when its checkpoint is damaged, or its base is not at hand."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: no run here (no config.yaml)")
    config = cli.load_config(folder / "config.yaml")
    final = folder / "checkpoints" / "final"
    found, files = (final, checkpoint.read(final)) if final.is_dir() else checkpoint.newest(folder)
    base = bases.load(config.model.base, dtype)
    model = routed(config, base)
    pool = Pool(model)
    library = states.restore_pool(files, base, pool)
    return Opened(config, base, model, pool, library, found)
