"""What a run prints: one screen by default, and with -v every figure."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from dylora_mlx import train
from dylora_mlx.system import console
from dylora_mlx.training import summary
from dylora_mlx.training.final_losses import FinalLosses
from tests.conftest import SMALL, start

DETAILS = [
    "  similarity: ",
    "  router fitted to ",
    " steps of 2 rows, padding ",
    "95% interval",
    "router regret",
    "│ base ",
]


@pytest.fixture(scope="module")
def verbose(tmp_path_factory):
    """The folder of a run with -v."""
    folder = tmp_path_factory.mktemp("verbose")
    with pytest.MonkeyPatch.context() as patch, (folder / "out.txt").open("w") as out:
        patch.setattr("sys.stdout", out)
        patch.setattr(console.console, "_width", 200)  # wherever the tests run, no heading wraps
        assert train.main(start(folder, SMALL, "-v", "--training.max_steps", "2")) == 0
    return folder


def test_verbose_prints_every_figure(verbose):
    shown = (verbose / "out.txt").read_text()
    assert [part for part in DETAILS if part not in shown] == []
    assert "test loss at the end" not in shown


def test_the_default_is_one_screen_with_the_same_figures(verbose, tmp_path, capsys):
    run = tmp_path / "small"
    shutil.copytree(verbose / "small", run)
    shutil.rmtree(run / "checkpoints/final")
    first, *_ = sorted((run / "checkpoints").glob("step-*"))
    for checkpoint in sorted((run / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(checkpoint)
    capsys.readouterr()
    assert first.name == "step-000000"
    assert train.main(["--resume", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 30
    assert [part for part in DETAILS if any(part in line for line in lines)] == []
    heads = [line for line in lines if line.startswith("[")]
    assert [head.split(":")[0] for head in heads] == ["[1/3] requests", "[2/3] sql", "[3/3] requests_more"]
    results = json.loads((run / "results.json").read_text())
    rows = {cells[0]: cells[1:] for line in lines if len(cells := re.findall(r"[^│\s]+", line)) == 7 and "│" in line}
    assert list(rows) == ["python", "requests", "sql", "requests_more"]
    names = ["base", *results["skills"]]
    for domain, (_, base, learned, now, change, test) in rows.items():
        column = [row[domain] for row in results["matrix"]]
        when = f"{column[names.index(domain)]:.3f}" if domain in names else "-"
        assert (base, learned, now) == (f"{column[0]:.3f}", when, f"{column[-1]:.3f}")
        assert change == f"{column[-1] - column[0]:+.3f}"
        assert test == f"{results['test'][domain]['mixture']:.3f}"
    assert f"in pictures: {run}/report.html; in words: dylora explain {run}" in lines


def test_domains_without_a_skill_or_a_test_split_have_a_dash(capsys):
    rows = [{"sql": 4.0, "other": 3.0}, {"sql": 3.25, "other": 3.5}]
    final = {name: FinalLosses(rows[0][name], rows[1][name], None, {}, None) for name in ("sql", "other")}
    tested = {"sql": FinalLosses(4.0, 4.25, 4.5, {}, None)}
    summary.print_outcome(rows, ["sql"], final, tested, {"sql": 1})
    *_, sql, other, _, note = capsys.readouterr().out.splitlines()
    assert re.findall(r"[^│\s]+", sql) == ["sql", "1", "4.000", "3.250", "3.250", "-0.750", "4.250"]
    assert re.findall(r"[^│\s]+", other) == ["other", "-", "3.000", "-", "3.500", "+0.500", "-"]
    assert note.endswith("no merit there: sql")
