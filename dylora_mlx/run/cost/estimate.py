"""Estimate time, memory and disk of a run before it starts: counted FLOPs and bytes, divided by calibrated rates."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import mlx.core as mx

from dylora_mlx.data.stream import Skill
from dylora_mlx.errors import UserError
from dylora_mlx.growth.decide import decision_log
from dylora_mlx.run.cost import count
from dylora_mlx.run.cost.calibrate import calibrate
from dylora_mlx.run.cost.count import AssumedArrival, PlannedSkill, Rate
from dylora_mlx.run.cost.memory import (
    checkpoint_bytes,
    disk_kept,
    disk_temporary,
    feature_cache_bytes,
    peak_memory,
    process_memory,
)
from dylora_mlx.system import process
from dylora_mlx.system.files import is_number
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.run import TrainingRun

MAX_TIMED_BYTES = 32 << 20
"""Maximum bytes of the checkpoint that is written to time the disk."""
TRACES_PER_SKILL = 3
"""Traces of the compiled step for each trained skill: one for each routing phase (dense, annealing, mature)."""

Estimate = dict[str, Any]
"""An estimate as printed with --json and stored in run.json. Times are in seconds, sizes in bytes."""


def estimate_run(run: TrainingRun) -> Estimate:
    """Calibrate the device, and estimate the run if every skill gets an expert.

    `seconds_if_known` is the time if the first expert knows every later skill.
    """
    skills = count.plan_skills(run, count.assume_all_new(run.config, run.skills))
    before = process.peak_resident()
    samples = calibrate(run, skills)
    memory = peak_memory(run, skills, samples)
    rates = {kind: sample.rate for kind, sample in samples.items()}
    rates |= {"disk": _write_rate(run.folder, max(map(sum, checkpoint_bytes(run, skills))))}
    tracing = {kind: sample.trace_seconds for kind, sample in samples.items() if sample.trace_seconds}
    estimate: Estimate = {
        "skills": len(run.skills),
        "device": mx.default_device().type.name,
        "rates": rates,
        "tracing": tracing,
        "sizes": {kind: list(samples[kind].size) for kind in ("reading", "evaluation", "step")},
        "phases": estimate_phases(run, skills, rates, tracing),
        "memory": {part.name: part.bytes for part in memory},
        "process": {
            part.name: part.bytes
            for part in process_memory(run, before, sum(part.bytes for part in memory), memory[-1].bytes)
        },
        "disk": {part.name: part.bytes for part in disk_kept(run, skills)},
        "meanwhile": {part.name: part.bytes for part in disk_temporary(run, skills)},
    }
    known_phases = estimate_phases(
        run, count.plan_skills(run, count.assume_one_expert(run.config, run.skills)), rates, tracing
    )
    return estimate | {"seconds": total_seconds(estimate["phases"]), "seconds_if_known": total_seconds(known_phases)}


def valid_estimate(estimate: Any) -> Estimate | None:
    """Return a value from run.json if it is a valid estimate, else None. An earlier version's lacks `process`."""
    try:
        estimate = {"process": {}, **estimate}
        numbers = [
            estimate["seconds"],
            *estimate["tracing"].values(),
            *estimate["memory"].values(),
            *estimate["process"].values(),
            *estimate["disk"].values(),
        ]
        numbers += [phase[name] for phase in estimate["phases"] for name in ("amount", "seconds")]
        named = all(isinstance(phase["phase"], str) for phase in estimate["phases"])
        rates = [estimate["rates"][kind] for kind in (*get_args(Rate), "disk")]
    except (AttributeError, KeyError, TypeError):
        return None
    return estimate if named and all(map(is_number, numbers + rates)) and min(rates) > 0 else None


def actual_arrivals(folder: Path, skills: list[Skill]) -> list[AssumedArrival]:
    """Read the decision on each skill from decisions.jsonl. Raises UserError if it does not match the run's skills."""
    lines = [
        decided
        for decided in decision_log.read_decisions(folder)
        if decided["action"] not in decision_log.NON_ARRIVAL_ACTIONS
    ]
    decided = [AssumedArrival(line["action"], line["expert"]) for line in lines]
    matches = [line["skill"] for line in lines] == [skill.name for skill in skills]
    if not matches or not all(0 <= arrival.expert <= len(lines) for arrival in decided):
        raise UserError(
            f"{folder / decision_log.FILE_NAME}: the decisions do not match the run's skills (some were imported, or "
            "the file was changed)"
        )
    return decided


def estimate_as_decided(
    run: TrainingRun, arrivals: Sequence[AssumedArrival], estimate: Estimate
) -> list[dict[str, Any]]:
    """Estimate the phases of a run again from its actual decisions, at the rates of its estimate."""
    return estimate_phases(run, count.plan_skills(run, arrivals), estimate["rates"], estimate["tracing"])


def estimate_phases(
    run: TrainingRun, skills: Sequence[PlannedSkill], rates: Mapping[str, float], tracing: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return every kind of work with its amount, FLOPs, bytes written, and seconds, including tracing."""
    planned = []
    for work in count.count_work(run, skills):
        seconds = work.flops / rates[work.rate]
        num_traces = sum(planned.creates for planned in skills) * (TRACES_PER_SKILL if work.rate == "step" else 1)
        seconds += tracing.get(work.rate, 0.0) * num_traces
        planned.append({**work._asdict(), "bytes": 0, "seconds": seconds})
    planned[0]["bytes"] = feature_cache_bytes(run, skills)
    sizes = list(map(sum, checkpoint_bytes(run, skills)))
    saved = {"phase": "checkpoints", "amount": len(sizes), "what": "checkpoints", "rate": "disk", "flops": 0}
    return [*planned, {**saved, "bytes": sum(sizes), "seconds": sum(sizes) / rates["disk"]}]


def total_seconds(phases: Sequence[Mapping[str, Any]]) -> float:
    """Return the seconds of all phases together."""
    return sum(phase["seconds"] for phase in phases)


def _write_rate(folder: Path, size: int) -> float:
    """Measure the bytes a second of writing a checkpoint beside the run folder, or in the system's temporary folder.

    The temporary folder is used if the run's location is not writable.
    """
    size = min(size, MAX_TIMED_BYTES)
    arrays = {"zeros": mx.zeros(size // 4, mx.float32)}
    parent_folder = next(parent for parent in folder.absolute().parents if parent.is_dir())
    try:
        return _time_write(parent_folder, arrays, size)
    except OSError:
        return _time_write(None, arrays, size)


def _time_write(parent_folder: Path | None, arrays: dict[str, mx.array], size: int) -> float:
    """Write a checkpoint of `size` bytes in a temporary folder below `parent_folder`, and return the bytes a second."""
    with tempfile.TemporaryDirectory(dir=parent_folder, prefix=".estimate-") as temporary:
        began = time.perf_counter()
        checkpoint.write(Path(temporary) / "step-000000", {"zeros.safetensors": arrays})
        return size / (time.perf_counter() - began)
