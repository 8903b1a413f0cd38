"""dylora fuse: a full model that mlx-lm loads, with the logits of the forced gate."""

from __future__ import annotations

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from dylora_mlx import fuse
from dylora_mlx.exporting.folder import read_manifest
from dylora_mlx.exporting.write import open_for_export
from dylora_mlx.model.routing.router import Routing
from tests.tiny import alone

TEXT = "SELECT name, count(*) FROM users WHERE age > 30 GROUP BY name\nimport requests\n"


@pytest.mark.parametrize(
    ("options", "gates"), [(["--expert", "sql"], [0.0, 0.0, 1.0]), (["--blend", "sql=2,requests=1.5"], [0.0, 1.5, 2.0])]
)
def test_mlx_lm_loads_it(finished, tmp_path, capsys, options, gates):
    out = tmp_path / "fused"
    assert fuse.main([str(finished), *options, "--out", str(out)]) == 0
    assert f"python -m mlx_lm generate --model {out}" in capsys.readouterr().out
    assert read_manifest(out)["kind"] == "merged"
    model, tokenizer = mlx_lm.load(str(out))[:2]
    model.set_dtype(mx.float32)
    run = open_for_export(finished, "float32")
    tokens = mx.array([tokenizer.encode(TEXT)])
    found, where = np.array(model(tokens)), alone(tokens.shape[1], window=run.model.window)

    def forced(fixed: list[float]) -> np.ndarray:
        all_gates = mx.broadcast_to(mx.array(fixed), (*tokens.shape, 3))
        hidden = run.model(tokens, where, Routing(None, mx.array(1.0)), gates=all_gates).hidden
        return np.array(run.model.logits(hidden))

    difference, moved = np.abs(found - forced(gates)).max(), np.abs(found - forced([1.0, 0.0, 0.0])).max()
    assert difference < 0.1  # the stored weights are bfloat16
    assert moved > 5 * difference


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--expert", "cobol"], "no expert 'cobol'"),
        (["--blend", "sql"], "'sql' should be a name and a number"),
        (["--blend", "sql=1,2=1"], "the same expert"),
        (["--blend", "sql=0"], "a weight other than 0"),
    ],
)
def test_mistakes_write_nothing(finished, tmp_path, capsys, options, message):
    assert fuse.main([str(finished), *options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_left_alone(finished, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert fuse.main([str(finished), "--expert", "sql", "--out", str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("options", [[], ["--expert", "sql", "--blend", "sql=1"]])
def test_one_of_both_has_to_be_named(finished, tmp_path, options, capsys):
    assert fuse.main([str(finished), *options, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert (err.count("\n"), "--expert" in err, "--blend" in err) == (1, True, True)
    assert list(tmp_path.iterdir()) == []
