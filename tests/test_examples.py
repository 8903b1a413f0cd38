"""The examples run as they stand, one after the other in one folder, and what they print is true."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

import dylora_mlx

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("examples")


def run_script(name: str) -> None:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_scripts(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    run_script("own_skills.py")
    first = dylora_mlx.load("runs/own-skills").results["test"]
    out = capsys.readouterr().out
    for name in ("docstrings", "logs"):
        assert f"with the experts {first[name]['mixture']:.3f}" in out

    run_script("add_a_skill.py")
    run = dylora_mlx.load("runs/own-skills")
    assert list(run.experts) == ["docstrings", "logs", "sql"]
    losses = run.results["test"]
    assert losses["sql"]["mixture"] < losses["sql"]["base"] - 0.1
    for name in ("docstrings", "logs"):
        assert losses[name]["mixture"] == pytest.approx(first[name]["mixture"], abs=0.05)
    assert "checkpoints/before-sql" in capsys.readouterr().out
    assert Path("runs/own-skills/checkpoints/before-sql").is_dir()

    run_script("route_and_look.py")
    out = capsys.readouterr().out
    assert all(f"{name}: " in out for name in ("base", "docstrings", "logs", "sql"))


class TestNotebook:  # a class of its own: pytest-xdist then runs it beside the scripts
    def test_it_runs(self, tmp_path, monkeypatch):
        """Cell by cell, in one namespace, as a kernel would."""
        monkeypatch.chdir(tmp_path)
        notebook = json.loads((EXAMPLES / "walkthrough.ipynb").read_text(encoding="utf-8"))
        names: dict[str, object] = {}
        cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
        for number, source in enumerate(cells):
            exec(compile(source, f"walkthrough.ipynb, code cell {number}", "exec"), names)
        run = names["run"]
        assert isinstance(run, dylora_mlx.Run)
        assert list(run.experts) == ["requests", "sql", "flask"]
        assert "<span" in run.route("SELECT 1")._repr_html_()


def test_every_example_is_in_the_readme():
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.iterdir():
        assert path.name == "README.md" or path.suffix not in (".py", ".ipynb") or f"({path.name})" in page
