"""A run put together from its config: base, data, pool, optimizers; restored from a checkpoint's files if there are any."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx

from dylora_mlx.config import Config
from dylora_mlx.data import skills as sources
from dylora_mlx.data import stream
from dylora_mlx.data.stream import Skill
from dylora_mlx.distributed import group as ranks
from dylora_mlx.errors import UserError
from dylora_mlx.growth.decide import bandit
from dylora_mlx.growth.library import Entry, Library
from dylora_mlx.growth.novelty import projection
from dylora_mlx.growth.novelty.embedding import Space
from dylora_mlx.growth.novelty.projection import ProjectionHead
from dylora_mlx.growth.pool import Pool
from dylora_mlx.growth.rank import schedule as rank_law
from dylora_mlx.model.base import device
from dylora_mlx.model.base import load as bases
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.experts.offload import Shelf
from dylora_mlx.model.kernels import numerics
from dylora_mlx.system import blas, console
from dylora_mlx.training.budget import parameters as budget
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.checkpoint import state as states
from dylora_mlx.training.checkpoint.state import State
from dylora_mlx.training.run import Ranks, Run
from dylora_mlx.training.skill import base_pass as study
from dylora_mlx.training.skill import split_skill as arrival
from dylora_mlx.training.step import evaluate
from dylora_mlx.training.step.evaluate import Measure
from dylora_mlx.training.step.optimizers import make_optimizers


def assemble(config: Config, folder: Path, found: tuple[Path, checkpoint.Content] | None) -> Run:
    """Load the base, read and check all data, and build the run, restored from a checkpoint's folder and files if given."""
    group, known = ranks.group(), config.growth.base_skill
    with group.agreed():
        _check_shares(config, group.size)
        for source in (*([known] if known else []), *config.skills, *config.domains):
            sources.locate(source)
        console.say(f"BLAS: {blas.describe()}; device: {mx.default_device().type.name}")
        device.prepare()
        base = bases.load(config.model.base, config.model.dtype)
        _check_sizes(config, base)
        skills = [stream.prepare(source, config.data, base.tokenizer, config.seed) for source in config.skills]
        others = [
            stream.prepare(source, config.data, base.tokenizer, config.seed)
            for source in ([known] if known else []) + config.domains
        ]
        for skill in (*skills, *(others[:1] if known else [])):
            _check_enough(skill, config)
        model = routed(config, base)
        pool, optimizers = Pool(model, shelf_of(config)), make_optimizers(config.training)
        compiled, everything = not numerics.on_cpu(), (*others, *skills)
        shape = (config.data.row_length, config.training.batch_rows, compiled)
        domains = evaluate.domains({skill.name: skill.validation for skill in everything}, *shape)
        tests = evaluate.domains({skill.name: skill.test for skill in everything}, *shape)
        state = State(digests={skill.name: skill.digest for skill in everything})
        widths = _ranks(config)
        budget.check(config.growth, pool, config.skills, widths.start)
        learned, head = (
            bandit.learn_from(config.growth.bandit, config.seed),
            head_of(config, base.fingerprint, base.args.hidden_size),
        )
        if config.growth.policy == "bandit":
            console.say(f"bandit: {learned[1]}")
        library = Library(base.fingerprint)
        if found is not None:
            place, files = found
            library, state = states.restore_pool(files, base, pool, place), states.restore_training(files, optimizers)
            model.lookup_ratio = state.lookup_ratio if model.lookup_ratio is None else model.lookup_ratio
            for skill in everything:
                if state.digests.setdefault(skill.name, skill.digest) != skill.digest:
                    raise UserError(
                        f"{skill.source.source}: the data of '{skill.name}' changed since the run began; put it back to resume"
                    )
        optimizers.init(model)
    _check_alike(config, base, state)
    reference = study.reference(base, model, config)
    space = Space(reference, config.growth.whitening, head)
    run = Run(
        config, folder, base, model, pool, library, reference, space, optimizers, state, skills,
        others[0] if known else None, domains, tests, Measure(model, compiled), widths, learned=learned,
    )  # fmt: skip
    arrival.replay(run)
    if state.skill > len(run.skills):
        raise UserError(
            f"{folder}: {state.skill} skills were learned, config.yaml has {len(run.skills)}; put it back as it was"
        )
    return run


def shelf_of(config: Config) -> Shelf | None:
    """Where frozen experts stand that are not all in memory."""
    room = config.model.expert_memory_mb
    return None if room is None else Shelf(room * 10**6)


def _check_shares(config: Config, size: int) -> None:
    if config.training.accumulation < size:
        raise UserError(
            f"training.accumulation: {config.training.accumulation} micro-batches in a step are fewer than the {size} ranks "
            f"that share them; raise it to a multiple of {size}, or start fewer ranks"
        )


def _check_alike(config: Config, base: Base, state: State) -> None:
    """Raises UserError where ranks read another config, base or data than rank 0."""
    own = {"config": asdict(config), "base": base.fingerprint, "tokenizer": base.vocabulary, "data": state.digests}
    hashes = {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in own.items()}
    first, *others = ranks.group().everyone(hashes)
    for rank, other in enumerate(others, 1):
        for name in (name for name in own if other[name] != first[name]):
            raise UserError(f"rank {rank} has another {name} than rank 0; give every machine the same files")


def routed(config: Config, base: Base) -> RoutedDecoder:
    """The base as a config wants it routed, without experts."""
    options = config.model
    how = (config.training.grad_checkpoint, options.composition, options.context)
    made = RoutedDecoder(base, options.projections, options.tap, *how)
    made.lookup_ratio = None if options.lookup_ratio == "auto" else options.lookup_ratio
    return made


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


def _check_sizes(config: Config, base: Base) -> None:
    layers, widest = base.args.num_hidden_layers, max(base.args.hidden_size, base.args.intermediate_size)
    if config.model.tap != "final" and int(config.model.tap) >= layers:
        raise UserError(f"model.tap: layer {config.model.tap}, but {base.name} has layers 0 to {layers - 1}")
    ranks = {"model.rank": config.model.rank, **{f"rank of skill '{s.name}'": s.rank for s in config.skills if s.rank}}
    for name, rank in ranks.items():
        if rank > widest:
            raise UserError(f"{name}: {rank} is beyond the {widest} numbers that {base.name}'s widest states have")


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
