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
from dylora_mlx.training.checkpoint import retention
from dylora_mlx.training.checkpoint.feature_cache import BYTES_PER_VALUE
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.skill.base_pass import segments_to_read
from dylora_mlx.training.step.optimizers import moments_per_parameter

FLOAT_BYTES = 4
"""Bytes of a float32."""
HALF_BYTES = 2
"""Bytes of a float16, in which features are remembered."""
HEADER_BYTES = 130
"""Approximate bytes of one array's entry in a safetensors header."""
STATE_BYTES, STATE_BYTES_PER_SKILL = 2500, 900
"""Approximate bytes of a checkpoint's JSON files, and of what each skill adds to them: records, and lines of the manifest."""
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

    The expert in training counts with its moments, two with AdamW, and a copy of the best weights for early stopping. A frozen
    one counts twice: weights, and their copy in the stack that steps multiply with. With model.expert_memory_mb set, frozen
    experts are offloaded: only the expert cache counts.
    """
    weights = sum(value.nbytes for value in dict(tree_flatten(run.base.model.parameters())).values())
    created, memory_mb = (
        sum(_parameters(run, planned.skill) for planned in skills if planned.creates),
        run.config.model.expert_memory_mb,
    )
    largest = max((_parameters(run, planned.skill) for planned in skills if planned.plan is not None), default=0)
    bytes_per_position = run.base.args.hidden_size * BYTES_PER_VALUE if run.model.router_layer == "final" else 0
    held_out = sum(shape.rows * shape.length for shape in count.batch_shapes(count.evaluated_together(run)))
    frozen = 2 * FLOAT_BYTES * (created - largest)
    if memory_mb is not None:
        frozen = min(memory_mb * 10**6, FLOAT_BYTES * created)
    return [
        SizedPart("base", weights),
        SizedPart("experts, router and their moments", frozen + (_copies(run) + 1) * FLOAT_BYTES * largest),
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


class CheckpointBytes(NamedTuple):
    """What one checkpoint writes."""

    own: int
    """Bytes of files that the next checkpoint does not link: the router, the moments, an expert in training."""
    shared: int
    """Bytes of new files that all later checkpoints link: a frozen expert, a library entry."""


def checkpoint_bytes(run: TrainingRun, skills: Sequence[PlannedSkill]) -> list[CheckpointBytes]:
    """Return what every checkpoint writes, in the order of writing, the final one last.

    A checkpoint that replaces one of the same name counts once, with the shared files of both.
    """
    entries = [
        _library_entry_bytes(run.config, run.base, planned) for planned in count.all_skills(run.skills, run.base_skill)
    ]
    known = len(entries) - len(skills)
    state = _gate_row_bytes(run.base) + STATE_BYTES + STATE_BYTES_PER_SKILL * known
    written, training = [CheckpointBytes(state, sum(entries[:known]))], run.config.training
    for planned, entry in zip(skills, entries[known:], strict=True):
        expert = _expert_file_bytes(run, planned) * planned.creates
        state += _copies(run) * _gate_row_bytes(run.base) * planned.creates
        if planned.creates and planned.plan is not None:
            num_saved = (planned.steps - 1) // training.save_every
            # Weights, their moments, and the best weights for early stopping.
            written += [
                CheckpointBytes(_copies(run) * expert + state + FLOAT_BYTES * _parameters(run, planned.skill), 0)
            ] * num_saved
        shared = expert + entry
        if planned.plan is None:  # without steps, it replaces the checkpoint of the same step
            shared += written.pop().shared
        state += STATE_BYTES_PER_SKILL
        written.append(CheckpointBytes(state, shared))
    return [*written, CheckpointBytes(state, 0)]


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
    remembered = HALF_BYTES * dims * count.remembered_tokens(config, skill)
    return FLOAT_BYTES * dims * (documents + dims + 1) + remembered + (FLOAT_BYTES + 1) * exemplars + 8 * HEADER_BYTES


def feature_cache_bytes(run: TrainingRun, skills: Sequence[PlannedSkill]) -> int:
    """Return the bytes written to the feature caches of all skills. They exist one at a time."""
    return sum(_cache_bytes(run.config, run.base, run.model, planned) for planned in skills)


def _cache_bytes(config: Config, base: Base, model: RoutedDecoder, planned: PlannedSkill) -> int:
    """Return the bytes of a skill's feature cache, 0 if its features are not cached."""
    cached = count.features_cached(config, base, model, planned.skill)
    return planned.skill.train.num_tokens * base.args.hidden_size * BYTES_PER_VALUE * cached


def disk_kept(run: TrainingRun, skills: Sequence[PlannedSkill]) -> list[SizedPart]:
    """Return the parts of a run folder's size at the end of the run."""
    written, dims = checkpoint_bytes(run, skills), run.base.args.hidden_size
    _, retained = retention.split_retained(written[:-1], run.config.training.keep_checkpoints)
    records = RECORD_BYTES * sum(planned.steps for planned in skills) // run.config.log.steps_per_report
    shared = sum(each.shared for each in written)
    domains = (CHART_BYTES + SAMPLE_BYTES) * len(run.domains)
    return [
        SizedPart("checkpoints", sum(each.own for each in (*retained, written[-1])) + shared),
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
        SizedPart("a checkpoint that is written", max(map(sum, checkpoint_bytes(run, skills)))),
    ]
