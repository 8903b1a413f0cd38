"""tools/benchmarks/serving_benchmark.py: it measures a run and the bare base, and prints a table."""

from __future__ import annotations

import json

import serving_benchmark as tool


def test_the_command_prints_a_table_and_writes_json(finished, tmp_path, capsys):
    arguments = [
        "--requests",
        "2",
        "--prompt",
        "3",
        "--tokens",
        "3",
        "--repeats",
        "1",
        "--json",
        str(tmp_path / "s.json"),
    ]
    assert tool.main([str(finished), *arguments]) == 0
    out = capsys.readouterr().out
    assert "8 at once, tokens/s" in out
    assert "first token, 500 known, s" in out
    results = json.loads((tmp_path / "s.json").read_text())
    assert list(results) == ["run", "base in mlx_lm.server"]
    for result in results.values():
        assert list(result["speeds"]) == ["1", "4", "8"]
        assert all(value > 0 for speed in result["speeds"].values() for value in speed.values())
        assert result["first_token_known"] > 0


def test_mistakes_are_one_line(tmp_path, capsys):
    for arguments, message in [
        ([str(tmp_path / "none")], "no run here"),
        (["x", "--tokens", "0"], "--tokens must be at least 1"),
    ]:
        assert tool.main(arguments) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
