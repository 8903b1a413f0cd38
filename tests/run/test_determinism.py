"""The quickstart in two separate processes gives the same bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import crash_test
import pytest

SHORT = {"training.max_steps": 4, "training.save_every": 2, "training.keep_checkpoints": 99, "log.steps_per_report": 1}
"""Options that make the run short and keep every checkpoint for the comparison."""


def run_quickstart(folder: Path, *options: str) -> dict[str, str]:
    arguments = ["--config", "quickstart", "--runs", str(folder), "--name", "same", "--quiet", *options]
    arguments += [word for name, value in SHORT.items() for word in (f"--{name}", str(value))]
    ran = subprocess.run([sys.executable, "-m", "dylora_mlx.train", *arguments], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return crash_test.outcome(folder / "same", "checkpoints")


@pytest.mark.slow
def test_two_processes_write_the_same_bits(tmp_path):
    first, second = (run_quickstart(tmp_path / name) for name in ("first", "second"))
    assert len([name for name in first if name.endswith("router.safetensors")]) > 5
    assert {"metrics.jsonl", "decisions.jsonl", "checkpoints/final/MANIFEST.json"} <= first.keys()
    assert [name for name in first | second if first.get(name) != second.get(name)] == []


@pytest.mark.slow
def test_another_seed_writes_other_files(tmp_path):
    """The comparison above is able to fail."""
    first, other = run_quickstart(tmp_path / "first"), run_quickstart(tmp_path / "other", "--seed", "1")
    assert first["checkpoints/final/router.safetensors"] != other["checkpoints/final/router.safetensors"]
    assert first["metrics.jsonl"] != other["metrics.jsonl"]
