"""Build a `TrainingRun` from its config: base, data, expert pool and optimizers, optionally restored from a checkpoint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import mlx.core as mx

from dylora_mlx.config import Config, Source
from dylora_mlx.config.paths import without_folders
from dylora_mlx.data import kept
from dylora_mlx.data.chat_template import resolve_template
from dylora_mlx.data.counts import summarize
from dylora_mlx.data.kept import RunSources
from dylora_mlx.data.stream import Skill
from dylora_mlx.distributed.group import world
from dylora_mlx.errors import UserError
from dylora_mlx.growth.decide import bandit
from dylora_mlx.growth.library import Library, LibraryEntry
from dylora_mlx.growth.novelty import projection
from dylora_mlx.growth.novelty.embedding import EmbeddingSpace
from dylora_mlx.growth.novelty.projection import ProjectionHead
from dylora_mlx.growth.pool import Pool
from dylora_mlx.growth.rank.schedule import load_schedule
from dylora_mlx.model.base import device
from dylora_mlx.model.base.load import Base, load_base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.experts.offload import ExpertCache
from dylora_mlx.model.kernels import numerics
from dylora_mlx.model.routing.document_mean import DocumentMean
from dylora_mlx.system import blas, console
from dylora_mlx.training.budget.parameters import check_budget
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.checkpoint.state import TrainerState, checkpoint_content, restore_pool, restore_training
from dylora_mlx.training.run import LoraRanks, TrainingRun
from dylora_mlx.training.skill import queue, split_skill
from dylora_mlx.training.skill.base_pass import load_reference_statistics, run_base_pass
from dylora_mlx.training.step.domains import check_eval_budget, make_held_out
from dylora_mlx.training.step.evaluate import Evaluator
from dylora_mlx.training.step.optimizers import make_optimizers


def build_run(
    config: Config,
    folder: Path,
    restored: tuple[Path, checkpoint.CheckpointContent] | None,
    sources: RunSources | None = None,
) -> TrainingRun:
    """Load the base, read and check all data, and build the run. Nothing is written to `folder`.

    Args:
        config: the run's options.
        folder: the run folder.
        restored: folder and content of the checkpoint to restore, None for a fresh run.
        sources: what the run kept of its sources, None for a fresh run.

    Raises:
        UserError: the config, the data or the checkpoint is invalid, on any rank.
    """
    group, base_source = world(), config.growth.base_skill
    all_sources, sources = own_sources(config), sources or RunSources()
    with group.raise_on_all_ranks():
        _check_micro_batches(config, group.world_size)
        sources.check_available(all_sources)
        template = resolve_template(config.data.chat_template)
        console.info(f"BLAS: {blas.describe()}; device: {mx.default_device().type.name}")
        base = load_base(config.model.base, config.model.dtype, template)
        device.set_memory_limits(base.step_shape(config.training.batch_size, config.data.max_seq_length))
        _check_sizes(config, base)
        skills = sources.read_all(all_sources, config, base.tokenizer, base.args.vocab_size)
        skills, other_skills = skills[: len(config.skills)], skills[len(config.skills) :]
        for skill in (*skills, *(other_skills[:1] if base_source else [])):
            check_enough_data(skill, config)
        check_eval_budget((*skills, *other_skills), config)
        model = make_decoder(config, base)
        pool, optimizers = Pool(model, make_expert_cache(config)), make_optimizers(config.training)
        compiled, all_skills = not numerics.on_cpu(), (*other_skills, *skills)
        held_out = make_held_out(all_skills, config, compiled)
        digests = {skill.name: kept.digest_of(skill) for skill in all_skills}
        state = TrainerState(data_digests=digests)
        lora_ranks = _lora_ranks(config)
        check_budget(config.growth, pool, config.skills, lora_ranks.start)
        trained_bandit, projection_head = (
            bandit.train_bandit(config.growth.bandit, config.seed),
            load_projection_head(config, base.fingerprint, base.args.hidden_size),
        )
        if config.growth.policy == "bandit":
            console.info(f"bandit: {trained_bandit[1]}")
        library = Library(base.fingerprint)
        if restored is not None:
            checkpoint_folder, files = restored
            library, state = restore_pool(files, base, pool, checkpoint_folder), restore_training(files, optimizers)
            model.gather_threshold = (
                state.gather_threshold if model.gather_threshold is None else model.gather_threshold
            )
            state.data_digests |= digests
        # After the restore: moments in the checkpoint are kept, and only missing ones are initialised.
        optimizers.init(model)
        for expert_id in pool.frozen:  # a checkpoint of format 1 holds their moments
            optimizers.drop_moments(expert_id)
    _check_same_on_all_ranks(config, base, {skill.name: [skill.digest, skill.token_digest] for skill in all_skills})
    reference = load_reference_statistics(base, model)
    space = EmbeddingSpace(reference, config.growth.whitening, projection_head)
    run = TrainingRun(
        config, folder, base, model, pool, library, reference, space, optimizers, state, skills,
        other_skills[0] if base_source else None, held_out.validation, held_out.test, Evaluator(model, compiled), lora_ranks, sources,
        final_domains=held_out.final, bandit=trained_bandit,
        data_counts={skill.name: summarize(skill, config.data, base.tokenizer) for skill in all_skills},
    )  # fmt: skip
    if restored is not None:
        run.stored = checkpoint.stored_files(*restored, checkpoint_content(state, base, pool, library, optimizers))
    device.release_freed_memory()  # a large tokenizer and the reference's base passes leave hundreds of megabytes
    # config.yaml still lists a split skill as one, while `state.skill_index` counts its parts.
    split_skill.reapply_splits(run)
    queue.restore_order(run)
    if state.skill_index > len(run.skills):
        raise UserError(
            f"{folder}: {state.skill_index} skills were learned, config.yaml has {len(run.skills)}; put it back as it was"
        )
    return run


def own_sources(config: Config) -> list[Source]:
    """Return the sources of a config: skills, base skill, domains."""
    base_skill = config.growth.base_skill
    return [*config.skills, *([base_skill] if base_skill else []), *config.domains]


def make_expert_cache(config: Config) -> ExpertCache | None:
    """Return the cache for offloaded frozen experts, or None if all experts stay in memory (model.expert_memory_mb: null)."""
    memory_mb = config.model.expert_memory_mb
    return None if memory_mb is None else ExpertCache(memory_mb * 10**6)


def _check_micro_batches(config: Config, world_size: int) -> None:
    """Raise UserError if a step has fewer micro-batches than there are ranks."""
    if config.training.grad_accumulation_steps < world_size:
        raise UserError(
            f"training.grad_accumulation_steps: {config.training.grad_accumulation_steps} micro-batches in a "
            f"step are fewer than the {world_size} ranks that share them; raise it to a multiple of {world_size}, or start fewer ranks"
        )


def _check_same_on_all_ranks(config: Config, base: Base, data: dict[str, list[str]]) -> None:
    """Raise UserError if a rank has another config, base, tokenizer or data than rank 0. Compares hashes.

    The same files may be in different folders. `data` has the digests of records and of tokens by skill.
    """
    inputs = {
        "config": without_folders(config),
        "base": base.fingerprint,
        "tokenizer": base.tokenizer_hash,
        "data": data,
    }
    hashes = {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in inputs.items()}
    first, *others = world().all_gather_object(hashes)
    for rank, other in enumerate(others, 1):
        for name in (name for name in inputs if other[name] != first[name]):
            raise UserError(f"rank {rank} has another {name} than rank 0; give every machine the same files")


def make_decoder(config: Config, base: Base) -> RoutedDecoder:
    """Build the routed decoder of a config over a base, without experts."""
    options = config.model
    mean = DocumentMean(options.document_mean_weight, options.document_mean_decay)
    settings = (config.training.grad_checkpoint, options.mixing, mean)
    decoder = RoutedDecoder(base, options.projection_names, options.router_layer, *settings)
    decoder.gather_threshold = None if options.gather_threshold == "auto" else options.gather_threshold
    return decoder


def _lora_ranks(config: Config) -> LoraRanks:
    """Return the LoRA ranks of new experts, from the rank schedule if the config names one."""
    options = config.growth.rank
    if options.schedule is None:
        return LoraRanks(config.model.rank, max(options.max, config.model.rank))
    schedule = load_schedule(Path(options.schedule).expanduser())
    return LoraRanks(schedule.start, schedule.max_rank, schedule.scale)


def load_projection_head(config: Config, fingerprint: str, dims: int) -> ProjectionHead | None:
    """Load the projection head that a config names, or return None. `fingerprint` and `dims` are the base's, to check it."""
    path = config.growth.projection
    if path is None:
        return None
    return projection.load_head(Path(path).expanduser(), fingerprint, config.growth.whitening, dims)


def _check_sizes(config: Config, base: Base) -> None:
    """Raise UserError if the router layer or a LoRA rank does not fit the base."""
    layers, widest = base.args.num_hidden_layers, max(base.args.hidden_size, base.args.intermediate_size)
    if config.model.router_layer != "final" and int(config.model.router_layer) >= layers:
        raise UserError(
            f"model.router_layer: layer {config.model.router_layer}, but {base.name} has layers 0 to {layers - 1}"
        )
    lora_ranks = {
        "model.rank": config.model.rank,
        **{f"rank of skill '{s.name}'": s.rank for s in config.skills if s.rank},
    }
    for name, rank in lora_ranks.items():
        if rank > widest:
            raise UserError(f"{name}: {rank} exceeds {widest}, the largest hidden or intermediate size of {base.name}")


def check_enough_data(skill: Skill, config: Config) -> None:
    """Raise UserError if a skill has too few documents or tokens, or only copies of one text."""
    growth, train = config.growth, skill.train
    if train.num_documents < growth.min_samples:
        raise UserError(
            f"skill '{skill.name}' ({skill.source.source}): {train.num_documents} training documents, at least "
            f"{growth.min_samples} are needed (growth.min_samples)"
        )
    if train.num_tokens < growth.min_tokens:
        raise UserError(
            f"skill '{skill.name}' ({skill.source.source}): {train.num_tokens} training tokens, at least {growth.min_tokens} "
            "are needed (growth.min_tokens)"
        )
    if len({piece.tokens.tobytes() for piece in train.segments}) == 1:
        raise UserError(
            f"skill '{skill.name}' ({skill.source.source}): all {train.num_documents} training documents are the same text; "
            "give it different documents"
        )


def base_skill_entry(config: Config, model: RoutedDecoder, base_skill: Skill | None) -> LibraryEntry:
    """Build the library entry of the base skill, which the base itself serves (expert_id 0)."""
    assert base_skill is not None
    base_pass = run_base_pass(model, base_skill, config)
    kept_exemplars = split_skill.skill_exemplars(config, base_skill)
    return LibraryEntry(
        base_skill.name, 0, base_pass.means, base_pass.statistics, base_pass.memory, exemplars=kept_exemplars,
        format=str(base_skill.format),
    )  # fmt: skip
