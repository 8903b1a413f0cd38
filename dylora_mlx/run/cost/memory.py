"""Memory and disk that a run needs, counted; what a step holds beside the weights comes from the calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from dylora_mlx.config import Config
from dylora_mlx.data.stream import Skill
from dylora_mlx.model.base import device
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.run.cost import count
from dylora_mlx.run.cost.calibrate import CalibrationSample
from dylora_mlx.run.cost.count import PlannedSkill, Rate
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.checkpoint.feature_cache import BYTES_PER_VALUE
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.skill.base_pass import segments_to_read

WORD = 4
"""Bytes of a float32."""
HEADER = 130
"""Bytes of one array's entry in a safetensors file, about."""
RECORD, PAGE, DRAWN, SAMPLES = 1500, 10_000, 15_000, 2500
"""Bytes of a metrics record, of an empty report, of what it draws of a domain, and of a domain's sample, about."""


class SizedPart(NamedTuple):
    """A part of memory or disk, in bytes."""

    name: str
    bytes: int


def peak_memory(
    run: TrainingRun, skills: Sequence[PlannedSkill], samples: Mapping[Rate, CalibrationSample]
) -> list[SizedPart]:
    """What MLX holds at its peak."""
    weights = sum(value.nbytes for value in dict(tree_flatten(run.base.model.parameters())).values())
    trained, room = (
        sum(_parameters(run, found.skill) for found in skills if found.creates),
        run.config.model.expert_memory_mb,
    )
    best = max((_parameters(run, found.skill) for found in skills if found.plan is not None), default=0)
    states = run.base.args.hidden_size * BYTES_PER_VALUE if run.model.router_layer == "final" else 0
    held_out = sum(shape.rows * shape.length for shape in count.shapes_of(run.domains.values()))
    held = 3 * WORD * (trained if room is None else best)
    if room is not None:
        held += min(room * 10**6, WORD * trained)
    return [
        SizedPart("base", weights),
        SizedPart("experts, router and their moments", held + WORD * best),
        SizedPart("features of held-out text", held_out * states),
        SizedPart(
            "activations of the largest pass",
            max(_scaled(run.config, samples[kind]) for kind in ("reading", "evaluation", "step")),
        ),
    ]


def cache_limit() -> int | None:
    """Bytes that MLX's allocator may keep for the next operation, at most; None where its own limit is kept."""
    return device.memory_limits(device.device_kind(), mx.device_info(), device.physical_memory()).cache


def _parameters(run: TrainingRun, skill: Skill) -> int:
    """Of an expert and its gate row."""
    return run.pool.expert_parameters(run.expert_rank(skill)[0]) + run.base.args.hidden_size + 1


def _scaled(config: Config, sample: CalibrationSample) -> int:
    """Bytes of a pass over a whole micro-batch, from those over a part of one."""
    whole = config.training.batch_size * config.data.max_seq_length
    return round(sample.peak * whole / np.prod(sample.size))


def checkpoint_sizes(run: TrainingRun, skills: Sequence[PlannedSkill]) -> list[int]:
    """Bytes of every checkpoint in the order in which they are written, each with its own name, the final one last; without
    those of experts in files, which it links to."""
    remembered = [_entry(run.config, run.base, skill) for skill in count.all_skills(run.skills, run.base_skill)]
    library = sum(remembered[: len(remembered) - len(skills)])
    pool, router = 0, _row(run.base)
    found, training = [library + router], run.config.training
    for skill, entry in zip(skills, remembered[len(remembered) - len(skills) :], strict=True):
        own = 3 * _file(run, skill) if skill.creates else 0  # with two moments
        router += 3 * _row(run.base) * skill.creates
        if skill.creates and skill.plan is not None:
            within = (skill.steps - 1) // training.save_every
            found += [pool + own + router + library + WORD * _parameters(run, skill.skill)] * within
        pool += 0 if _in_files(run.config) else own
        library += entry
        found = found[: len(found) - (skill.plan is None)]  # without a step it takes the name of the one before
        found.append(pool + router + library)
    return [*found, pool + router + library]


def _in_files(config: Config) -> bool:
    return config.model.expert_memory_mb is not None


def _file(run: TrainingRun, found: PlannedSkill) -> int:
    """Bytes of an expert's file."""
    arrays = 2 * sum(len(named) for named in run.model.shapes.values())
    return WORD * run.pool.expert_parameters(run.expert_rank(found.skill)[0]) + HEADER * arrays


def _row(base: Base) -> int:
    return WORD * (base.args.hidden_size + 1) + 2 * HEADER


def _entry(config: Config, base: Base, skill: Skill) -> int:
    """Bytes of what the library remembers of a skill."""
    dims, growth = base.args.hidden_size, config.growth
    pieces, _ = segments_to_read(skill, config, dims)
    documents = min(growth.embedding_samples, len({piece.document for piece in pieces}))
    exemplars = min(config.training.replay_tokens, skill.train.num_tokens)
    return (
        WORD * dims * (documents + count.remembered_of(config, skill) + dims + 1) + (WORD + 1) * exemplars + 8 * HEADER
    )


def features_kept(run: TrainingRun, skills: Sequence[PlannedSkill]) -> int:
    """Bytes of all features that are written while skills are learned, one skill's after the other's."""
    return sum(_features(run.config, run.base, run.model, found) for found in skills)


def _features(config: Config, base: Base, model: RoutedDecoder, found: PlannedSkill) -> int:
    whole = count.kept(config, base, model, found.skill)
    return found.skill.train.num_tokens * base.args.hidden_size * BYTES_PER_VALUE * whole


def disk_kept(run: TrainingRun, skills: Sequence[PlannedSkill]) -> list[SizedPart]:
    """What a run folder holds at the end."""
    written, dims = checkpoint_sizes(run, skills), run.base.args.hidden_size
    _, last = checkpoint.split_retained(written[:-1], run.config.training.keep_checkpoints)
    records = RECORD * sum(found.steps for found in skills) // run.config.log.steps_per_report
    linked = sum(_file(run, found) for found in skills if found.creates) if _in_files(run.config) else 0
    domains = (DRAWN + SAMPLES) * len(run.domains)
    return [
        SizedPart("checkpoints", sum(last) + written[-1] + linked),
        SizedPart("reference, records, report", WORD * dims * (dims + 1) + records + PAGE + domains),
    ]


def disk_temporary(run: TrainingRun, skills: Sequence[PlannedSkill]) -> list[SizedPart]:
    """What it needs beside that for a time."""
    return [
        SizedPart(
            "features of the skill that is learned",
            max(_features(run.config, run.base, run.model, found) for found in skills),
        ),
        SizedPart("a checkpoint that is written", max(checkpoint_sizes(run, skills))),
    ]
