"""Every bad input of every command gives one line on stderr and exit code 2, and changes no file."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from dylora_mlx import __main__
from dylora_mlx.exporting.write import open_for_export
from dylora_mlx.model.base.load import load_base
from dylora_mlx.run import loop
from dylora_mlx.system.files import FolderLock, sha256
from tests.exporting.mixtures import export, tool
from tests.mistakes import keeping, looking, sharing, tools, training
from tests.mistakes.rows import Mistake

ROWS = [*training.ROWS, *looking.ROWS, *sharing.ROWS, *keeping.ROWS, *tools.ROWS]
TOOLS = (
    "tools/benchmarks/evaluate_cuda.py", "tools/benchmarks/train_projection.py", "tools/benchmarks/rank_law.py",
    "tools/benchmarks/compare_methods.py", "tests/stress/crash_test.py", "tests/stress/fuzz.py", "tools/benchmarks/benchmark.py",
    "tests/stress/parallel_delay.py", "tools/dev/write_reference.py",
)  # fmt: skip
NEUTRAL = ("BLAS: ", "no CUDA device here", "cpu, float32", "resumed from")
"""Beginnings of informational lines on stdout that may precede the error."""
RECORD = {"text": "def f(x):\n    return x + 1\n" * 4}
PROBLEM = {"text": "Add one.", "code": "def f(x):\n    return x + 1\n", "test_list": ["assert f(1) == 2"]}
CONFIG = "skills: [{name: notes, source: notes.jsonl}]\ngrowth: {base_skill: null}\n"


@pytest.fixture(scope="module")
def shared(finished, base, tmp_path_factory) -> Path:
    """The folder in which all rows run; a row that damages it gets a copy."""
    place = tmp_path_factory.mktemp("mistakes")
    shutil.copytree(finished, place / "run")
    for path in sorted((place / "run/checkpoints").glob("step-*"))[:-1]:
        shutil.rmtree(path)
    shutil.copytree(place / "run/checkpoints/final/experts/expert_1", place / "adapter")
    export(open_for_export(finished, "float32"), place / "mixture")
    (place / "notes.jsonl").write_text((json.dumps(RECORD) + "\n") * 60)
    (place / "problems.jsonl").write_text(json.dumps(PROBLEM) + "\n")
    (place / "notes.csv").write_text("text\nhello\n")
    (place / "wide.jsonl").write_bytes((json.dumps(RECORD) + "\n").encode("utf-16"))
    (place / "wide.yaml").write_bytes(CONFIG.encode("utf-16"))
    (place / "config.yaml").write_text(CONFIG)
    (place / "empty.jsonl").touch()
    (place / "empty").mkdir()
    return place


@pytest.fixture(scope="module")
def original_content(shared) -> dict[str, str]:
    """The content of that folder before any row."""
    return files(shared)


@cache
def main_of(command: str) -> Callable[[list[str]], int]:
    """Return the main function of a command or script."""
    if command.endswith(".py"):
        return tool(Path(command).stem).main
    return import_module(__main__.module_of(command)).main


def files(place: Path) -> dict[str, str]:
    """Return the hash of every file below a folder, and the kind of everything else, by path."""
    content = {}
    for path in sorted(place.rglob("*")):
        kind = f"link to {os.readlink(path)}" if path.is_symlink() else "folder" if path.is_dir() else ""
        content[path.relative_to(place).as_posix()] = kind or sha256(path)
    return content


@pytest.fixture
def offline(monkeypatch, base):
    """Disable the hub, load the embedded base once, and fail the test if training would start."""

    def unreachable(*args: Any, **kwargs: Any):
        raise ConnectionError("no route to the hub")

    original_load_base = load_base
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    for module in [
        module for module in sys.modules.values() if getattr(module, "load_base", None) is original_load_base
    ]:
        monkeypatch.setattr(
            module,
            "load_base",
            lambda name, *options: base if name == "embedded" else original_load_base(name, *options),
        )
    monkeypatch.setattr(loop, "learn_stream", lambda *_: pytest.fail("nothing was refused"))


MARKED_ROWS = [
    pytest.param(row, marks=pytest.mark.export) if row.command == "tools/benchmarks/evaluate_cuda.py" else row
    for row in ROWS
]
"""The rows. evaluate_cuda.py needs torch: without it, its only message is that torch is missing."""


@pytest.mark.parametrize("row", MARKED_ROWS, ids=lambda row: f"{row.command} {row.argv[:60]}")
def test_a_mistake_is_one_line_and_changes_nothing(
    row: Mistake, shared, original_content, offline, tmp_path, monkeypatch, capfd
):
    if not row.root and os.geteuid() == 0:
        pytest.skip("root may read and write everything")
    place = shared
    if row.damage is not None:
        place = tmp_path / "place"
        shutil.copytree(shared, place)
        row.damage(place)
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "stdin", io.StringIO(row.stdin))
    before = original_content if place is shared else files(place)
    command = main_of(row.command)
    lock = FolderLock(place / "run") if row.locked else None
    capfd.readouterr()
    try:
        code = command(shlex.split(row.argv))
    finally:
        if lock is not None:
            lock.release()
    out, err = capfd.readouterr()
    assert code == 2, (out, err)
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    assert len(err) < 1000, err
    for part in (row.message,) if isinstance(row.message, str) else row.message:
        assert part in err, err
    assert [line for line in out.splitlines() if not line.startswith(NEUTRAL)] == []
    assert files(place) == before


def test_the_table_has_every_command_and_no_duplicates():
    counted = Counter(row.command for row in ROWS)
    assert len(set(ROWS)) == len(ROWS) >= 150
    assert counted.keys() == {*__main__.COMMANDS, *TOOLS}
    assert min(counted.values()) >= 3, counted
