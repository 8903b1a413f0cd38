"""Memory and disk that a run needs, counted; what a step holds beside the weights comes from the calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from dylora_mlx.data.stream import Skill
from dylora_mlx.model.base import device
from dylora_mlx.run.cost import count
from dylora_mlx.run.cost.calibrate import Sample
from dylora_mlx.run.cost.count import Learned, Rate
from dylora_mlx.training.checkpoint import feature_cache as features
from dylora_mlx.training.run import Run
from dylora_mlx.training.skill import base_pass as study

WORD = 4
"""Bytes of a float32."""
HEADER = 130
"""Bytes of one array's entry in a safetensors file, about."""
RECORD, PAGE, DRAWN, SAMPLES = 1500, 10_000, 15_000, 2500
"""Bytes of a metrics record, of an empty report, of what it draws of a domain, and of a domain's sample, about."""


class Part(NamedTuple):
    """A part of memory or disk, in bytes."""

    name: str
    bytes: int


def memory(run: Run, skills: Sequence[Learned], samples: Mapping[Rate, Sample]) -> list[Part]:
    """What MLX holds at its peak."""
    weights = sum(value.nbytes for value in dict(tree_flatten(run.base.model.parameters())).values())
    trained, room = (
        sum(_parameters(run, found.skill) for found in skills if found.creates),
        run.config.model.expert_memory_mb,
    )
    best = max((_parameters(run, found.skill) for found in skills if found.plan is not None), default=0)
    states = run.base.args.hidden_size * features.BYTES if run.model.tap == "final" else 0
    held_out = sum(shape.rows * shape.length for shape in count.shapes_of(run.domains.values()))
    held = 3 * WORD * (trained if room is None else best)
    if room is not None:
        held += min(room * 10**6, WORD * trained)
    return [
        Part("base", weights),
        Part("experts, router and their moments", held + WORD * best),
        Part("features of held-out text", held_out * states),
        Part(
            "activations of the largest pass",
            max(_scaled(run, samples[kind]) for kind in ("reading", "evaluation", "step")),
        ),
    ]


def cache() -> int | None:
    """Bytes that MLX's allocator may keep for the next operation, at most; None where its own limit is kept."""
    return device.limits(device.kind(), mx.device_info(), device.memory()).cache


def _parameters(run: Run, skill: Skill) -> int:
    """Of an expert and its gate row."""
    return run.pool.size(run.rank(skill)[0]) + run.base.args.hidden_size + 1


def _scaled(run: Run, sample: Sample) -> int:
    """Bytes of a pass over a whole micro-batch, from those over a part of one."""
    whole = run.config.training.batch_rows * run.config.data.row_length
    return round(sample.peak * whole / np.prod(sample.size))


def checkpoints(run: Run, skills: Sequence[Learned]) -> list[int]:
    """Bytes of every checkpoint in the order in which they are written, each with its own name, the final one last; without
    those of experts in files, which it links to."""
    remembered = [_entry(run, skill) for skill in count.everything(run)]
    library = sum(remembered[: len(remembered) - len(skills)])
    pool, router = 0, _row(run)
    found, training = [library + router], run.config.training
    for skill, entry in zip(skills, remembered[len(remembered) - len(skills) :], strict=True):
        own = 3 * _file(run, skill) if skill.creates else 0  # with two moments
        router += 3 * _row(run) * skill.creates
        if skill.creates and skill.plan is not None:
            within = (skill.steps - 1) // training.checkpoint_every
            found += [pool + own + router + library + WORD * _parameters(run, skill.skill)] * within
        pool += 0 if _in_files(run) else own
        library += entry
        found = found[: len(found) - (skill.plan is None)]  # without a step it takes the name of the one before
        found.append(pool + router + library)
    return [*found, pool + router + library]


def _in_files(run: Run) -> bool:
    return run.config.model.expert_memory_mb is not None


def _file(run: Run, found: Learned) -> int:
    """Bytes of an expert's file."""
    arrays = 2 * sum(len(named) for named in run.model.shapes.values())
    return WORD * run.pool.size(run.rank(found.skill)[0]) + HEADER * arrays


def _row(run: Run) -> int:
    return WORD * (run.base.args.hidden_size + 1) + 2 * HEADER


def _entry(run: Run, skill: Skill) -> int:
    """Bytes of what the library remembers of a skill."""
    dims, growth = run.base.args.hidden_size, run.config.growth
    pieces, _ = study.read(skill, run.config, dims)
    documents = min(growth.embedding_samples, len({piece.document for piece in pieces}))
    exemplars = min(run.config.training.replay_tokens, skill.train.tokens)
    return WORD * dims * (documents + count.remembered_of(run, skill) + dims + 1) + (WORD + 1) * exemplars + 8 * HEADER


def features_kept(run: Run, skills: Sequence[Learned]) -> int:
    """Bytes of all features that are written while skills are learned, one skill's after the other's."""
    return sum(_features(run, found) for found in skills)


def _features(run: Run, found: Learned) -> int:
    whole = count.kept(run, found.skill)
    return found.skill.train.tokens * run.base.args.hidden_size * features.BYTES * whole


def kept(run: Run, skills: Sequence[Learned]) -> list[Part]:
    """What a run folder holds at the end."""
    written, dims = checkpoints(run, skills), run.base.args.hidden_size
    last = written[:-1][-run.config.training.keep_checkpoints :]
    records = RECORD * sum(found.steps for found in skills) // run.config.log.every
    linked = sum(_file(run, found) for found in skills if found.creates) if _in_files(run) else 0
    domains = (DRAWN + SAMPLES) * len(run.domains)
    return [
        Part("checkpoints", sum(last) + written[-1] + linked),
        Part("reference, records, report", WORD * dims * (dims + 1) + records + PAGE + domains),
    ]


def meanwhile(run: Run, skills: Sequence[Learned]) -> list[Part]:
    """What it needs beside that for a time."""
    return [
        Part("features of the skill that is learned", max(_features(run, found) for found in skills)),
        Part("a checkpoint that is written", max(checkpoints(run, skills))),
    ]
