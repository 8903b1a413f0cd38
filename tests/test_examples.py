"""The examples run, one after the other in one folder, and what they print is true.

By default on the beginnings of their documents, which takes a tenth of the time; every line of them runs all the same. As they
stand they run with the slow tests.
"""

from __future__ import annotations

import inspect
import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

import dylora_mlx
from dylora_mlx import assets
from dylora_mlx.config import DataConfig

EXAMPLES = Path(__file__).parent.parent / "examples"


SIZES = {"train": 48, "validation": 6, "test": 6}
"""Number of documents of each split of a shortened skill."""


@pytest.fixture(params=["beginnings", pytest.param("whole", marks=pytest.mark.slow)])
def place(request, tmp_path, monkeypatch) -> Path:
    """The current folder; with `beginnings`, packaged documents and docstrings are cut to 150 characters, and rows are short."""
    if request.param == "beginnings":
        for skill in ("python", "requests", "sql", "flask"):
            (tmp_path / "packaged" / skill).mkdir(parents=True)
            for split, count in SIZES.items():
                lines = (assets.SKILLS / skill / f"{split}.jsonl").read_text().splitlines()[:count]
                short = "".join(json.dumps({"text": json.loads(line)["text"][:150]}) + "\n" for line in lines)
                (tmp_path / "packaged" / skill / f"{split}.jsonl").write_text(short)
        monkeypatch.setattr(assets, "SKILLS", tmp_path / "packaged")
        whole = inspect.getdoc
        monkeypatch.setattr(inspect, "getdoc", lambda function: (whole(function) or "")[:150])
        learn, rows = dylora_mlx.learn, DataConfig(max_seq_length=128)
        monkeypatch.setattr(dylora_mlx, "learn", lambda config, **options: learn(replace(config, data=rows), **options))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def run_script(name: str) -> None:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_scripts(place, capsys):
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
        assert losses[name]["mixture"] < first[name]["mixture"] + 0.05
    assert "checkpoints/before-sql" in capsys.readouterr().out
    assert Path("runs/own-skills/checkpoints/before-sql").is_dir()

    run_script("route_and_look.py")
    out = capsys.readouterr().out
    assert all(f"{name}: " in out for name in ("base", "docstrings", "logs", "sql"))


def test_the_notebook(place):
    """Cell by cell, in one namespace, as a kernel would."""
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
