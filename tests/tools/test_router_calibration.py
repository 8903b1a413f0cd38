"""tools/benchmarks/router_calibration.py: quality by hand, and the command on two short skills."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
import router_calibration as tool

from dylora_mlx.model.routing.router import Gate


def test_quality_by_hand():
    """Two texts of one and two tokens; the second counts half a token each."""
    gate = Gate(mx.array([[0.0], [1.0]]), mx.array([0.0, 0.0]))
    texts = [tool.Unseen(np.array([[2.0]], np.float32), 1), tool.Unseen(np.array([[0.5], [-1.0]], np.float32), 0)]
    p = 1 / (1 + np.exp(-np.array([2.0, 0.5, -1.0])))
    result = tool.quality(gate, texts)
    expected = 0.5 * -np.log(p[0]) + 0.25 * (-np.log(1 - p[1]) - np.log(1 - p[2]))
    assert result.cross_entropy == pytest.approx(expected, rel=1e-5)
    assert result.accuracy == pytest.approx(0.75)
    # Confidences 0.881, 0.622 and 0.731 fall into three bins; the second token is wrong.
    gaps = 0.5 * (1 - p[0]) + 0.25 * p[1] + 0.25 * p[2]
    assert result.calibration_error == pytest.approx(gaps, rel=1e-4)


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys, short_skills):
    config, out = tmp_path / "c.yaml", tmp_path / "out.json"
    config.write_text(
        "skills:\n" + "".join(f"  - {{name: {n}, source: {short_skills}/{n}}}\n" for n in ("requests", "sql"))
        + f"growth: {{base_skill: {{name: python, source: {short_skills}/python}}}}\n"
        + "training: {memory_tokens: 128, router_fit_steps: 20}\n"
    )  # fmt: skip
    assert tool.main(["--config", str(config), "--json", str(out)]) == 0
    assert "calibration error" in capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert [row["skill"] for row in rows] == ["requests", "sql"]
    for row in rows:
        assert row["best penalty"]["cross_entropy"] <= row["fixed penalty"]["cross_entropy"]
        assert 0.5 < row["ours"]["accuracy"] <= 1
        assert 0 <= row["ours"]["calibration_error"] < 0.5
