"""Fuzz targets for growth: rank schedules, projection heads, reference statistics, bandit histories, decision logs."""

from __future__ import annotations

import json
from pathlib import Path

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
import numpy as np

from dylora_mlx.growth.decide import bandit_log, decision_log
from dylora_mlx.growth.decide.bandit_log import BanditContext, BanditTrial
from dylora_mlx.growth.novelty import embedding, projection
from dylora_mlx.growth.novelty.embedding import EmbeddingSpace, Reference
from dylora_mlx.growth.novelty.projection import ProjectionHead
from dylora_mlx.growth.rank import power_law
from dylora_mlx.growth.rank import schedule as schedules
from fuzzing.target import Harness, target

DIMS = 6
LOSSES = [3.0, 2.7, 2.5, 2.45]
CONTEXT = BanditContext(0.4, -0.1, 0.7, 0.2, 3, 12_000)


@target("rank-schedule", "json", 4)
def rank_schedule(work_dir: Path) -> Harness:
    """growth.rank.schedule: the JSON that tools/benchmarks/rank_law.py writes (growth/rank/schedule)."""
    path = work_dir / "schedule.json"
    law = power_law.fit([2, 4, 8, 16], [[value, value + 0.01] for value in LOSSES])
    schedules.save_schedule(schedules.rank_schedule(law, 0.02, 2.0), path, {"config": "quickstart"})
    bare_schedule = schedules.rank_schedule(power_law.fit([1, 2, 4], LOSSES[:3]), 0.02, 1.0)
    bare_path = work_dir / "other.json"
    schedules.save_schedule(bare_schedule, bare_path, {})

    def run(data: bytes) -> None:
        path.write_bytes(data)
        loaded = schedules.load_schedule(path)
        assert 1 <= loaded.start <= loaded.max_rank
        assert loaded.scale * loaded.max_rank > 0, "alpha of a new expert"

    return [path.read_bytes(), bare_path.read_bytes()], run


@target("projection-head", "safetensors", 3)
def projection_head(work_dir: Path) -> Harness:
    """growth.projection: a projection head's safetensors (growth/novelty/projection)."""
    path = work_dir / "head.safetensors"
    ProjectionHead(DIMS, 4, np.random.default_rng(0)).save(path, "f" * 64, 0.1)
    unit = embedding.normalize(np.ones((2, DIMS)))

    def run(data: bytes) -> None:
        path.write_bytes(data)
        head = projection.load_head(path, "f" * 64, 0.1, DIMS)
        assert np.isfinite(head(unit)).all()

    return [path.read_bytes()], run


@target("reference", "safetensors", 3)
def reference(work_dir: Path) -> Harness:
    """reference.safetensors of a run: statistics of the reference text (growth/novelty/embedding)."""
    path = work_dir / "reference.safetensors"
    states = np.random.default_rng(0).normal(size=(40, DIMS))
    embedding.save_reference(embedding.compute_reference(states), path)

    def run(data: bytes) -> None:
        path.write_bytes(data)
        loaded: Reference = embedding.load_reference(path, DIMS)
        assert np.isfinite(EmbeddingSpace(loaded, 0.1)(states)).all()

    return [path.read_bytes()], run


@target("bandit-history", "lines", 4)
def bandit_history(work_dir: Path) -> Harness:
    """growth.bandit.history: the bandit's records in decisions.jsonl (growth/decide/bandit_log)."""
    trials = (
        BanditTrial(CONTEXT, "create", 0.7, {"create": 0.3}),
        BanditTrial(CONTEXT, "known", None, {"create": 0.1, "known": 0.2}),
    )
    lines = [
        json.dumps({"skill": "a", "action": "create", "expert": 1, "bandit": bandit_log.to_json(trial)})
        for trial in trials
    ]
    path = work_dir / decision_log.FILE_NAME

    def run(data: bytes) -> None:
        path.write_bytes(data)
        for trial in bandit_log.read_history([path]):
            assert np.isfinite(trial.context.features()).all()

    return ["\n".join([*lines, ""]).encode(), lines[0].encode()], run


@target("decision-log", "lines", 4)
def decision_log_lines(work_dir: Path) -> Harness:
    """decisions.jsonl, as read by explain, by evaluate and by a resumed run (growth/decide/decision_log)."""
    decision = {"skill": "sql", "action": "create", "expert": 1, "score": 0.31, "interval": [0.2, 0.4], "outcome": None}
    log = decision_log.DecisionLog(work_dir)
    log.append(decision)
    log.update_last({"outcome": {"loss": 2.5}})
    log.append({**decision, "skill": "caf\u00e9", "action": "reuse"})

    def run(data: bytes) -> None:
        log.path.write_bytes(data)
        for record in decision_log.read_decisions(work_dir):
            assert {"skill", "action", "expert"} <= record.keys()

    return [log.path.read_bytes()], run
