"""Targets of growth: rank schedules, projection heads, reference statistics, and histories for the bandit."""

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
from dylora_mlx.growth.rank import schedule as rank_law
from fuzzing.target import Made, target

DIMS = 6
LOSSES = [3.0, 2.7, 2.5, 2.45]
CONTEXT = BanditContext(0.4, -0.1, 0.7, 0.2, 3, 12_000)


@target("rank-schedule", "json", 4)
def rank_schedule(place: Path) -> Made:
    """growth.rank.schedule: the JSON that tools/benchmarks/rank_law.py writes (growth/rank_law)."""
    path = place / "schedule.json"
    law = power_law.fit([2, 4, 8, 16], [[value, value + 0.01] for value in LOSSES])
    rank_law.save_schedule(rank_law.rank_schedule(law, 0.02, 2.0), path, {"config": "quickstart"})
    bare = rank_law.rank_schedule(power_law.fit([1, 2, 4], LOSSES[:3]), 0.02, 1.0)
    other = place / "other.json"
    rank_law.save_schedule(bare, other, {})

    def run(data: bytes) -> None:
        path.write_bytes(data)
        found = rank_law.load_schedule(path)
        assert 1 <= found.start <= found.max_rank
        assert found.scale * found.max_rank > 0, "alpha of a new expert"

    return [path.read_bytes(), other.read_bytes()], run


@target("projection-head", "safetensors", 3)
def projection_head(place: Path) -> Made:
    """growth.projection: a projection head's safetensors (growth/projection)."""
    path = place / "head.safetensors"
    ProjectionHead(DIMS, 4, np.random.default_rng(0)).save(path, "f" * 64, 0.1)
    unit = embedding.normalize(np.ones((2, DIMS)))

    def run(data: bytes) -> None:
        path.write_bytes(data)
        head = projection.load_head(path, "f" * 64, 0.1, DIMS)
        assert np.isfinite(head(unit)).all()

    return [path.read_bytes()], run


@target("reference", "safetensors", 3)
def reference(place: Path) -> Made:
    """reference.safetensors of a run: statistics of ordinary text (growth/embedding)."""
    path = place / "reference.safetensors"
    states = np.random.default_rng(0).normal(size=(40, DIMS))
    embedding.save_reference(embedding.compute_reference([states]), path)

    def run(data: bytes) -> None:
        path.write_bytes(data)
        found: Reference = embedding.load_reference(path, DIMS)
        assert np.isfinite(EmbeddingSpace(found, 0.1)(states)).all()

    return [path.read_bytes()], run


@target("bandit-history", "lines", 4)
def bandit_history(place: Path) -> Made:
    """growth.bandit.history: the bandit's records in decisions.jsonl (growth/trials)."""
    made = (
        BanditTrial(CONTEXT, "create", 0.7, {"create": 0.3}),
        BanditTrial(CONTEXT, "known", None, {"create": 0.1, "known": 0.2}),
    )
    lines = [
        json.dumps({"skill": "a", "action": "create", "expert": 1, "bandit": bandit_log.to_json(trial)})
        for trial in made
    ]
    path = place / decision_log.FILE_NAME

    def run(data: bytes) -> None:
        path.write_bytes(data)
        for trial in bandit_log.read_history([path]):
            assert np.isfinite(trial.context.features()).all()

    return ["\n".join([*lines, ""]).encode(), lines[0].encode()], run


@target("ledger", "lines", 4)
def ledger_lines(place: Path) -> Made:
    """decisions.jsonl, as explain and evaluate read it, and as a run that goes on does (growth/ledger)."""
    decision = {"skill": "sql", "action": "create", "expert": 1, "score": 0.31, "interval": [0.2, 0.4], "outcome": None}
    made = decision_log.DecisionLog(place)
    made.append(decision)
    made.update_last({"outcome": {"loss": 2.5}})
    made.append({**decision, "skill": "caf\u00e9", "action": "reuse"})

    def run(data: bytes) -> None:
        made.path.write_bytes(data)
        for found in decision_log.read_decisions(place):
            assert {"skill", "action", "expert"} <= found.keys()

    return [made.path.read_bytes()], run
