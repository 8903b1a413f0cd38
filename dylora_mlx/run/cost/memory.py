"""Count the memory and disk that a run needs. Activations come from the calibration, Python from this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from dylora_mlx.config import Config
from dylora_mlx.data.stream import Skill
from dylora_mlx.model.base import device
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.run.cost import count
from dylora_mlx.run.cost.calibrate import CalibrationSample
from dylora_mlx.run.cost.count import PlannedSkill, Rate
from dylora_mlx.system import process
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.checkpoint.feature_cache import BYTES_PER_VALUE
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.skill.base_pass import segments_to_read
from dylora_mlx.training.step.optimizers import moments_per_parameter

FLOAT_BYTES = 4
"""Bytes of a float32."""
HEADER_BYTES = 130
"""Approximate bytes of one array's entry in a safetensors header."""
RECORD_BYTES, PAGE_BYTES, CHART_BYTES, SAMPLE_BYTES = 1500, 10_000, 15_000, 2500
"""Approximate bytes of a metrics record, of an empty report, of a domain's charts in it, and of a domain's sample."""


MALLOC_BYTES, MALLOC_SHARE = 48 << 20, 0.04
"""What malloc holds between the arrays on a CPU: so many bytes, and a share of the activations (fitted to measurements)."""
PYTHON_BYTES = 100 << 20
"""What Python and its libraries take at least."""


class SizedPart(NamedTuple):
    """A part of memory or disk, in bytes."""

    name: str
    bytes: int


def peak_memory(
    run: TrainingRun, skills: Sequence[PlannedSkill], samples: Mapping[Rate, CalibrationSample]
) -> list[SizedPart]:
    """Return the parts of MLX's peak memory.

    Trained experts count with their moments: three times with AdamW, which has two. With model.expert_memory_mb set, frozen experts are
    offloaded without moments, so that only the largest trained expert and the expert cache count. Another copy of the largest
    one holds the best weights for early stopping.
    """
    weights = sum(value.nbytes for value in dict(tree_flatten(run.base.model.parameters())).values())
    created, memory_mb = (
        sum(_parameters(run, planned.skill) for planned in skills if planned.creates),
        run.config.model.expert_memory_mb,
    )
    largest = max((_parameters(run, planned.skill) for planned in skills if planned.plan is not None), default=0)
    bytes_per_position = run.base.args.hidden_size * BYTES_PER_VALUE if run.model.router_layer == "final" else 0
    held_out = sum(shape.rows * shape.length for shape in count.batch_shapes(run.domains.values()))
    experts = _copies(run) * FLOAT_BYTES * (created if memory_mb is None else largest)
    if memory_mb is not None:
        experts += min(memory_mb * 10**6, FLOAT_BYTES * created)
    return [
        SizedPart("base", weights),
        SizedPart("experts, router and their moments", experts + FLOAT_BYTES * largest),
        SizedPart("features of held-out text", held_out * bytes_per_position),
        SizedPart(
            "activations of the largest pass",
            max(samples[kind].peak_bytes for kind in ("reading", "evaluation", "step")),
        ),
    ]


def _python_bytes() -> int:
    """Return the resident bytes of this process besides MLX's arrays: Python, its libraries, the tokenizer, the data.

    On CUDA MLX's arrays are in the GPU's memory, not in the process.
    """
    device.release_freed_memory()
    held = 0 if device.device_kind() == "cuda" else mx.get_active_memory()
    return max(process.resident() - held, PYTHON_BYTES)


def process_memory(run: TrainingRun, before: int, arrays: int, activations: int) -> list[SizedPart]:
    """Return the parts of the process's peak memory that come on top of MLX's peak.

    Args:
        run: the run, after some steps: the BLAS has its workspaces then.
        before: `process.peak_resident()` before these steps.
        arrays: bytes of MLX's peak.
        activations: the share of the largest pass in it.
    """
    training = run.config.training
    cache = device.current_limits(run.base.step_shape(training.batch_size, run.config.data.max_seq_length)).cache
    parts = [SizedPart("Python, libraries, tokenizer, data", _python_bytes())]
    if cache is not None:
        parts.append(SizedPart("buffers that MLX keeps for reuse", min(cache, activations)))
    if device.device_kind() == "cpu":
        parts.append(SizedPart("between malloc's blocks", MALLOC_BYTES + round(MALLOC_SHARE * activations)))
    # Loading a large tokenizer may take more for a moment than a small step does.
    beyond = before - arrays - sum(part.bytes for part in parts)
    return [*parts, SizedPart("more, while loading", beyond)] if beyond > 0 else parts


def _parameters(run: TrainingRun, skill: Skill) -> int:
    """Return the number of parameters of a skill's expert and its gate row."""
    return run.pool.expert_parameters(run.expert_rank(skill)[0]) + run.base.args.hidden_size + 1


def checkpoint_sizes(run: TrainingRun, skills: Sequence[PlannedSkill]) -> list[int]:
    """Return the bytes of every checkpoint folder in the order of writing, the final one last.

    A checkpoint that replaces one of the same name counts once. Offloaded experts do not count: checkpoints link to their
    files.
    """
    entries = [
        _library_entry_bytes(run.config, run.base, planned) for planned in count.all_skills(run.skills, run.base_skill)
    ]
    library = sum(entries[: len(entries) - len(skills)])
    pool, router = 0, _gate_row_bytes(run.base)
    sizes, training = [library + router], run.config.training
    for planned, entry in zip(skills, entries[len(entries) - len(skills) :], strict=True):
        expert = _copies(run) * _expert_file_bytes(run, planned) if planned.creates else 0
        router += 3 * _gate_row_bytes(run.base) * planned.creates
        if planned.creates and planned.plan is not None:
            num_saved = (planned.steps - 1) // training.save_every
            sizes += [pool + expert + router + library + FLOAT_BYTES * _parameters(run, planned.skill)] * num_saved
        pool += 0 if _offloads(run.config) else expert
        library += entry
        # A skill without steps replaces the checkpoint of the same step.
        sizes = sizes[: len(sizes) - (planned.plan is None)]
        sizes.append(pool + router + library)
    return [*sizes, pool + router + library]


def _offloads(config: Config) -> bool:
    """Return whether frozen experts are offloaded to files."""
    return config.model.expert_memory_mb is not None


def _copies(run: TrainingRun) -> int:
    """Return the arrays of the size of a trained expert: its weights and their moments."""
    return 1 + moments_per_parameter(run.config.training)


def _expert_file_bytes(run: TrainingRun, planned: PlannedSkill) -> int:
    """Return the bytes of an expert's safetensors file."""
    arrays = 2 * sum(len(projections) for projections in run.model.shapes.values())
    return FLOAT_BYTES * run.pool.expert_parameters(run.expert_rank(planned.skill)[0]) + HEADER_BYTES * arrays


def _gate_row_bytes(base: Base) -> int:
    """Return the bytes of an expert's gate row and bias."""
    return FLOAT_BYTES * (base.args.hidden_size + 1) + 2 * HEADER_BYTES


def _library_entry_bytes(config: Config, base: Base, skill: Skill) -> int:
    """Return the bytes of a skill's library entry: document means, statistics, remembered features and exemplars."""
    dims, growth = base.args.hidden_size, config.growth
    segments, _ = segments_to_read(skill, config, dims)
    documents = min(growth.embedding_samples, len({segment.document for segment in segments}))
    exemplars = min(config.training.replay_tokens, skill.train.num_tokens)
    return (
        FLOAT_BYTES * dims * (documents + count.remembered_tokens(config, skill) + dims + 1)
        + (FLOAT_BYTES + 1) * exemplars
        + 8 * HEADER_BYTES
    )


def feature_cache_bytes(run: TrainingRun, skills: Sequence[PlannedSkill]) -> int:
    """Return the bytes written to the feature caches of all skills. They exist one at a time."""
    return sum(_cache_bytes(run.config, run.base, run.model, planned) for planned in skills)


def _cache_bytes(config: Config, base: Base, model: RoutedDecoder, planned: PlannedSkill) -> int:
    """Return the bytes of a skill's feature cache, 0 if its features are not cached."""
    cached = count.features_cached(config, base, model, planned.skill)
    return planned.skill.train.num_tokens * base.args.hidden_size * BYTES_PER_VALUE * cached


def disk_kept(run: TrainingRun, skills: Sequence[PlannedSkill]) -> list[SizedPart]:
    """Return the parts of a run folder's size at the end of the run."""
    sizes, dims = checkpoint_sizes(run, skills), run.base.args.hidden_size
    _, retained = checkpoint.split_retained(sizes[:-1], run.config.training.keep_checkpoints)
    records = RECORD_BYTES * sum(planned.steps for planned in skills) // run.config.log.steps_per_report
    linked = (
        sum(_expert_file_bytes(run, planned) for planned in skills if planned.creates) if _offloads(run.config) else 0
    )
    domains = (CHART_BYTES + SAMPLE_BYTES) * len(run.domains)
    return [
        SizedPart("checkpoints", sum(retained) + sizes[-1] + linked),
        SizedPart("tokenized documents", run.sources.num_bytes),
        SizedPart("reference, records, report", FLOAT_BYTES * dims * (dims + 1) + records + PAGE_BYTES + domains),
    ]


def disk_temporary(run: TrainingRun, skills: Sequence[PlannedSkill]) -> list[SizedPart]:
    """Return the parts of the disk space that is needed in addition while the run goes."""
    return [
        SizedPart(
            "features of the skill that is learned",
            max(_cache_bytes(run.config, run.base, run.model, planned) for planned in skills),
        ),
        SizedPart("a checkpoint that is written", max(checkpoint_sizes(run, skills))),
    ]
