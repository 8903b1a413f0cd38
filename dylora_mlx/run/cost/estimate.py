"""Time, memory and disk of a run before it is made: what is counted, over what the calibration measured."""

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
    cache_limit,
    checkpoint_sizes,
    disk_kept,
    disk_temporary,
    features_kept,
    peak_memory,
)
from dylora_mlx.system.files import is_number
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.run import TrainingRun

WRITTEN = 32 << 20
"""Bytes of the checkpoint that is written to time the disk, at most."""
TRACES = 3
"""Compiled steps that a skill needs: one for each phase of its routing."""

Estimate = dict[str, Any]
"""As it is printed with --json and kept in run.json; sizes in bytes."""


def estimate_run(run: TrainingRun) -> Estimate:
    """Count and calibrate: every skill with an expert of its own, and beside it the time if there is only one expert."""
    skills = count.plan_skills(run, count.assume_all_new(run.config, run.skills))
    samples = calibrate(run, skills)
    rates = {kind: sample.rate for kind, sample in samples.items()}
    rates |= {"disk": _writing(run.folder, max(checkpoint_sizes(run, skills)))}
    tracing = {kind: sample.first for kind, sample in samples.items() if sample.first}
    made: Estimate = {
        "skills": len(run.skills),
        "device": mx.default_device().type.name,
        "rates": rates,
        "tracing": tracing,
        "sizes": {kind: list(samples[kind].size) for kind in ("reading", "evaluation", "step")},
        "phases": estimate_phases(run, skills, rates, tracing),
        "memory": {part.name: part.bytes for part in peak_memory(run, skills, samples)},
        "cache": cache_limit(),
        "disk": {part.name: part.bytes for part in disk_kept(run, skills)},
        "meanwhile": {part.name: part.bytes for part in disk_temporary(run, skills)},
    }
    known = estimate_phases(
        run, count.plan_skills(run, count.assume_one_expert(run.config, run.skills)), rates, tracing
    )
    return made | {"seconds": total_seconds(made["phases"]), "seconds_if_known": total_seconds(known)}


def valid_estimate(found: Any) -> Estimate | None:
    """An estimate that was read from a file; None for what is none."""
    try:
        numbers = [found["seconds"], *found["tracing"].values(), *found["memory"].values(), *found["disk"].values()]
        numbers += [phase[name] for phase in found["phases"] for name in ("amount", "seconds")]
        named = all(isinstance(phase["phase"], str) for phase in found["phases"])
        rates = [found["rates"][kind] for kind in (*get_args(Rate), "disk")]
    except (AttributeError, KeyError, TypeError):
        return None
    return found if named and all(map(is_number, numbers + rates)) and min(rates) > 0 else None


def actual_arrivals(folder: Path, skills: list[Skill]) -> list[AssumedArrival]:
    """What became of each skill. Raises UserError for a ledger that is not the run's."""
    lines = [
        found
        for found in decision_log.read_decisions(folder)
        if found["action"] not in decision_log.NON_ARRIVAL_ACTIONS
    ]
    found = [AssumedArrival(line["action"], line["expert"]) for line in lines]
    known = [line["skill"] for line in lines] == [skill.name for skill in skills]
    if not known or not all(0 <= arrival.expert <= len(lines) for arrival in found):
        raise UserError(
            f"{folder / decision_log.FILE_NAME}: not those of the skills that this run learned (some were imported, "
            "or the file was changed)"
        )
    return found


def estimate_as_decided(run: TrainingRun, arrivals: Sequence[AssumedArrival], made: Estimate) -> list[dict[str, Any]]:
    """The phases of a run whose decisions are known by now, at the rates of its estimate."""
    return estimate_phases(run, count.plan_skills(run, arrivals), made["rates"], made["tracing"])


def estimate_phases(
    run: TrainingRun, skills: Sequence[PlannedSkill], rates: Mapping[str, float], tracing: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Every kind of work with its count, FLOPs, bytes that are written, and seconds."""
    found = []
    for work in count.count_work(run, skills):
        seconds = work.flops / rates[work.rate]
        traced = sum(found.creates for found in skills) * (TRACES if work.rate == "step" else 1)
        seconds += tracing.get(work.rate, 0.0) * traced
        found.append({**work._asdict(), "bytes": 0, "seconds": seconds})
    found[0]["bytes"] = features_kept(run, skills)
    written = checkpoint_sizes(run, skills)
    saved = {"phase": "checkpoints", "amount": len(written), "what": "checkpoints", "rate": "disk", "flops": 0}
    return [*found, {**saved, "bytes": sum(written), "seconds": sum(written) / rates["disk"]}]


def total_seconds(found: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of all phases."""
    return sum(phase["seconds"] for phase in found)


def _writing(folder: Path, size: int) -> float:
    """Bytes a second of a checkpoint where the run is to be; of the machine's temporary folder if that is no place."""
    size = min(size, WRITTEN)
    arrays = {"zeros": mx.zeros(size // 4, mx.float32)}
    place = next(parent for parent in folder.absolute().parents if parent.is_dir())
    try:
        return _timed(place, arrays, size)
    except OSError:
        return _timed(None, arrays, size)


def _timed(place: Path | None, arrays: dict[str, mx.array], size: int) -> float:
    with tempfile.TemporaryDirectory(dir=place, prefix=".estimate-") as home:
        began = time.perf_counter()
        checkpoint.write(Path(home) / "step-000000", {"zeros.safetensors": arrays})
        return size / (time.perf_counter() - began)
