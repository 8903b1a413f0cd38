"""Which checkpoints are kept: the newest by count and by size, and never fewer than the last complete one."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from dylora_mlx.errors import UserError
from dylora_mlx.system.frozen_arrays import FrozenArrays
from dylora_mlx.system.run_format import FORMAT
from dylora_mlx.training.checkpoint import checkpoint, retention
from dylora_mlx.training.checkpoint.links import StoredFiles

OWN, SHARED = 40_000, 400_000
"""Bytes of arrays that each checkpoint writes, and that all of them link."""


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with checkpoints of three steps, one from before a skill was added, and the final one."""
    stored, shared = StoredFiles(), FrozenArrays({"a": mx.zeros(SHARED // 4)})
    (tmp_path / "checkpoints").mkdir()
    for name, step in (
        ("step-000002", 2),
        ("before-sql", 4),
        ("step-000020", 20),
        ("step-1000000", 10**6),
        ("final", 10**6),
    ):
        content = {
            "trainer.json": {"step": step},
            "router.safetensors": {"own": mx.zeros(OWN // 4)},
            "experts/1.safetensors": shared,
        }
        checkpoint.write(tmp_path / "checkpoints" / name, content, stored)
    return tmp_path


def names(folders) -> list[str]:
    return [folder.name for folder in folders]


ALL = ["step-000002", "before-sql", "step-000020", "step-1000000", "final"]


@pytest.mark.parametrize("keep", [1, 2, 4, 9])
def test_a_run_in_training_keeps_its_newest_steps(run, keep):
    retention.prune_steps(run, keep, None)
    left = {path.name for path in (run / "checkpoints").iterdir()}
    assert left == {"final", "before-sql", *["step-000002", "step-000020", "step-1000000"][-keep:]}


@pytest.mark.parametrize(
    ("size", "steps"), [(1, 1), (SHARED + 1.5 * OWN, 1), (SHARED + 2.5 * OWN, 2), (SHARED + 3.5 * OWN, 3)]
)
def test_a_run_in_training_keeps_what_fits(run, size, steps, monkeypatch):
    """A file that checkpoints share counts once."""
    monkeypatch.setattr(retention, "split_by_size", lambda f, _, real=retention.split_by_size: real(f, int(size)))
    retention.prune_steps(run, 3, 1)
    assert len(checkpoint.step_folders(run)) == steps
    assert checkpoint.step_folders(run)[-1].name == "step-1000000"


def test_the_order_is_that_of_the_steps(run):
    assert names(retention.all_checkpoints(run)) == ALL


@pytest.mark.parametrize(("keep", "size", "kept"), [(1, None, 1), (3, None, 3), (9, None, 5), (9, 1, 1), (2, 10**9, 2)])
def test_all_checkpoints_are_pruned_by_count_and_size(run, keep, size, kept):
    removed, left = retention.split_checkpoints(run, keep, size)
    assert (names(removed), names(left)) == (ALL[:-kept], ALL[-kept:])


def test_the_last_complete_one_is_kept_when_newer_ones_are_damaged(run):
    for name in ("final", "step-1000000"):
        (run / "checkpoints" / name / "router.safetensors").write_bytes(b"damaged")
    removed, left = retention.split_checkpoints(run, 1, 1)
    assert names(left) == ["step-000020"]
    assert sorted(names(removed)) == ["before-sql", "final", "step-000002", "step-1000000"]
    for folder in removed:
        retention.remove(folder)
    checkpoint.verify(run / "checkpoints/step-000020")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000020"]


def test_without_a_complete_one_nothing_is_removed(run):
    for name in ALL:
        (run / "checkpoints" / name / "MANIFEST.json").unlink()
    with pytest.raises(
        UserError, match=r"no complete checkpoint, so none is removed: .*step-000002.*no complete checkpoint"
    ):
        retention.split_checkpoints(run, 1, None)


def test_a_newer_checkpoint_is_not_taken_for_a_damaged_one(run):
    path = run / "checkpoints/final/MANIFEST.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": FORMAT + 1}))
    with pytest.raises(UserError, match=f"format {FORMAT + 1}"):
        retention.split_checkpoints(run, 1, None)


def test_bytes_count_once(run):
    folders = retention.all_checkpoints(run)
    single, both = retention.bytes_of(folders[:1]), retention.bytes_of(folders[:2])
    assert OWN < both - single < OWN + 1000
    assert SHARED + OWN < single < SHARED + OWN + 2000


def test_what_is_left_of_an_interrupted_removal_is_no_checkpoint(run, monkeypatch):
    monkeypatch.setattr(retention.shutil, "rmtree", lambda *_, **__: None)
    retention.remove(run / "checkpoints/step-000002")
    assert names(retention.all_checkpoints(run)) == ALL[1:]
    monkeypatch.undo()
    checkpoint.recover(run)
    assert not list((run / "checkpoints").glob(".*"))
