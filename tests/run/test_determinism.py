"""The quickstart twice, in processes of their own: the same bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import crash_test
import pytest

SHORT = {"training.max_steps": 4, "training.save_every": 2, "training.keep_checkpoints": 99, "log.steps_per_report": 1}
"""What makes it short, and keeps everything that there is to compare."""


def learned(folder: Path, *options: str) -> dict[str, str]:
    words = ["--config", "quickstart", "--runs", str(folder), "--name", "same", "--quiet", *options]
    words += [word for name, value in SHORT.items() for word in (f"--{name}", str(value))]
    ran = subprocess.run([sys.executable, "-m", "dylora_mlx.train", *words], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return crash_test.outcome(folder / "same", "checkpoints")


@pytest.mark.slow
def test_two_processes_leave_the_same_bits(tmp_path):
    first, second = (learned(tmp_path / name) for name in ("first", "second"))
    assert len([name for name in first if name.endswith("router.safetensors")]) > 5
    assert {"metrics.jsonl", "decisions.jsonl", "checkpoints/final/MANIFEST.json"} <= first.keys()
    assert [name for name in first | second if first.get(name) != second.get(name)] == []


@pytest.mark.slow
def test_another_seed_leaves_others(tmp_path):
    """What is compared would show a difference."""
    first, other = learned(tmp_path / "first"), learned(tmp_path / "other", "--seed", "1")
    assert first["checkpoints/final/router.safetensors"] != other["checkpoints/final/router.safetensors"]
    assert first["metrics.jsonl"] != other["metrics.jsonl"]
