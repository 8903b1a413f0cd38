"""tools/benchmarks/compare_gates.py: kinds of gates on features that come apart, or do not."""

from __future__ import annotations

import json

import compare_gates as tool
import mlx.core as mx
import numpy as np
import pytest
from methods import gates


def clouds(spread: float) -> list[gates.Remembered]:
    """Four skills around the corners of a simplex, the last one of the second's expert."""
    rng = np.random.default_rng(0)
    centres = 3 * np.eye(6, dtype=np.float32)[[0, 1, 2, 1]]
    drawn = [[c + spread * rng.standard_normal((64, 6)).astype(np.float32) for _ in "lv"] for c in centres]
    return [
        gates.Remembered(f"s{i}", *pair, expert_id)
        for i, (pair, expert_id) in enumerate(zip(drawn, [0, 1, 2, 1], strict=True))
    ]


@pytest.mark.parametrize("kind", ["softmax", "cosine", "sigmoid"])
@pytest.mark.parametrize("frozen", [False, True])
def test_every_kind_finds_what_lies_apart_and_not_what_does_not(kind, frozen):
    found = gates.course(kind, clouds(0.1), frozen, 100, 0)
    assert found.right > 0.95
    assert abs(found.lost) < 0.05
    assert found.own > 0.6
    mixed = gates.course(kind, clouds(30.0), frozen, 100, 0)
    assert mixed.right < 0.8, "noise of ten times the distance cannot be told apart"


@pytest.mark.parametrize("kind", ["softmax", "cosine", "sigmoid"])
def test_gates_sum_to_one(kind):
    logits = mx.array(np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32) * 4)
    found = np.array(gates.gates(kind, logits))
    assert found.min() >= -1e-6
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)


def test_the_tables_and_files_of_the_command(tmp_path, capsys, short_skills):
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
    found = json.loads((tmp_path / "g.json").read_text())
    assert len(found) == 6
    assert all(0 <= r["right"] <= 1 for rs in found.values() for r in rs)
    assert tool.main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert str(tmp_path / "none.yaml") in capsys.readouterr().err
