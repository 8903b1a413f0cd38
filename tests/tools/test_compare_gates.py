"""tools/benchmarks/compare_gates.py: gate kinds on features that are separable, or not."""

from __future__ import annotations

import json

import compare_gates as tool
import mlx.core as mx
import numpy as np
import pytest
from methods import gates


def remembered_clusters(noise: float) -> list[gates.Remembered]:
    """Return four skills around the corners of a simplex; the last one belongs to the second one's expert."""
    rng = np.random.default_rng(0)
    centres = 3 * np.eye(6, dtype=np.float32)[[0, 1, 2, 1]]
    features = [[c + noise * rng.standard_normal((64, 6)).astype(np.float32) for _ in "lv"] for c in centres]
    return [
        gates.Remembered(f"s{i}", *pair, expert_id)
        for i, (pair, expert_id) in enumerate(zip(features, [0, 1, 2, 1], strict=True))
    ]


@pytest.mark.parametrize("kind", ["softmax", "cosine", "sigmoid"])
@pytest.mark.parametrize("frozen", [False, True])
def test_every_kind_separates_only_separable_features(kind, frozen):
    separable = gates.course(kind, remembered_clusters(0.1), frozen, 100, 0)
    assert separable.right > 0.95
    assert abs(separable.lost) < 0.05
    assert separable.own > 0.6
    mixed = gates.course(kind, remembered_clusters(30.0), frozen, 100, 0)
    assert mixed.right < 0.8, "noise of ten times the distance cannot be told apart"


@pytest.mark.parametrize("kind", ["softmax", "cosine", "sigmoid"])
def test_gates_sum_to_one(kind):
    logits = mx.array(np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32) * 4)
    gate_values = np.array(gates.gates(kind, logits))
    assert gate_values.min() >= -1e-6
    np.testing.assert_allclose(gate_values.sum(-1), 1, atol=1e-6)


def test_the_command_prints_tables_and_writes_json(tmp_path, capsys, short_skills):
    config = tmp_path / "c.yaml"
    config.write_text(
        "skills:\n" + "".join(f"  - {{name: {n}, source: {short_skills}/{n}}}\n" for n in ("requests", "sql"))
        + f"growth: {{base_skill: {{name: python, source: {short_skills}/python}}}}\n"
        + "training: {memory_tokens: 128, router_fit_steps: 20}\n"
    )  # fmt: skip
    assert tool.main(["--config", str(config), "--seeds", "1", "--json", str(tmp_path / "g.json")]) == 0
    out = capsys.readouterr().out
    assert "softmax, all rows" in out
    assert "sigmoid, newest row only" in out
    results = json.loads((tmp_path / "g.json").read_text())
    assert len(results) == 6
    assert all(0 <= r["right"] <= 1 for rs in results.values() for r in rs)
    assert tool.main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert str(tmp_path / "none.yaml") in capsys.readouterr().err
