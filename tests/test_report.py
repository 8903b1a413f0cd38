"""python -m dylora_mlx.report, and the report that a run writes by itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dylora_mlx import report, train
from dylora_mlx.reporting import page
from tests.conftest import start
from tests.reporting.synthetic import build, sound

TINY = """
skills: [{{name: sql, source: '{home}/sql'}}]
growth: {{base_skill: null, min_tokens: 100, dense_steps: 1, anneal_steps: 0}}
data: {{max_seq_length: 256}}
training: {{max_steps: 2, steps_per_eval: 2, save_every: 1, memory_tokens: 256, router_fit_steps: 2}}
log: {{steps_per_report: 1}}
"""


def test_writes_into_the_run_or_where_it_is_told(tmp_path, monkeypatch, capsys):
    folder = build(tmp_path / "run", ["sql"], steps=3)
    assert report.main([str(folder)]) == 0
    assert capsys.readouterr().out.startswith(f"{folder / 'report.html'} (0.0")
    assert report.main([str(folder), "--out", str(tmp_path / "there.html")]) == 0
    assert (tmp_path / "there.html").read_bytes() == (folder / "report.html").read_bytes()
    monkeypatch.chdir(tmp_path)
    assert report.main(["run", "run"]) == 0
    assert "2 runs compared" in sound((tmp_path / "report-compare.html").read_text()).text
    monkeypatch.chdir(folder)
    assert report.main(["."]) == 0
    assert "<h1>Run run</h1>" in (folder / "report.html").read_text()


def test_a_run_without_metrics_is_drawn(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("skills: []\n")
    assert report.main([str(tmp_path)]) == 0
    assert "no step has been recorded" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required"),
        (["none"], "no such folder; give a run folder"),
        (["empty"], "no run here (no config.yaml)"),
        (["file"], "not a folder; give a run folder"),
        (["run", "none"], "no such folder"),
        (["run", "--out", "empty"], "a folder; --out takes a file"),
        (["run", "--out", "none/report.html"], "cannot be written (No such file or directory)"),
        (["run", "--open"], "unrecognized arguments"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    build(tmp_path / "run", ["sql"], steps=2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert report.main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("*.html"))


def test_no_model_is_loaded(tmp_path):
    folder = build(tmp_path / "run", ["sql"], steps=2)
    code = "import sys; from dylora_mlx import report; print(report.main(sys.argv[1:]), 'mlx.core' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"


def test_every_run_leaves_a_report(finished):
    text = sound((finished / "report.html").read_text(encoding="utf-8")).text
    assert "status finished" in text
    assert "Left out" not in text
    assert not list(finished.glob("*.partial"))


def test_a_failing_report_stops_no_run(short_skills, tmp_path, monkeypatch, capsys):
    def fail(folder) -> None:
        raise OSError("the disk\nis full")

    monkeypatch.setattr(page, "write_page", fail)
    assert train.main(start(tmp_path, TINY.format(home=short_skills))) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("the report could not be written (OSError: the disk); the run goes on") == 1
    assert (tmp_path / "small" / "checkpoints" / "final").is_dir()
    assert (tmp_path / "small" / "samples.json").is_file()
    assert not (tmp_path / "small" / "report.html").exists()
