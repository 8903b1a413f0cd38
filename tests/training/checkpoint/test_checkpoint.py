"""Checkpoints: equal after a round trip, written atomically, and any damage is detected."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx.errors import UserError
from dylora_mlx.system.run_format import FORMAT
from dylora_mlx.training.checkpoint import checkpoint

CONTENT = {
    "trainer.json": {"step": 7, "matrix": [{"a": 1.5}], "best": None},
    "router.safetensors": {"rows.0.weight": mx.arange(5).astype(mx.float32), "rows.0.bias": mx.array([1e-9])},
    "experts/expert_1/adapters.safetensors": {"model.layers.0.q.lora_a": np.ones((3, 2), np.float32)},
    "optimizer.safetensors": {"step": mx.array(3, mx.uint64), "half": mx.array([1.5], mx.bfloat16)},
}


@pytest.fixture
def folder(tmp_path) -> Path:
    checkpoint.write(tmp_path / "final", CONTENT)
    return tmp_path / "final"


def write_steps(run: Path, *steps: int) -> None:
    (run / "checkpoints").mkdir(exist_ok=True)
    for step in steps:
        checkpoint.write(run / "checkpoints" / f"step-{step:06d}", {"trainer.json": {"step": step}})


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def test_round_trip(folder):
    content = checkpoint.read(folder)
    assert content.keys() == CONTENT.keys()
    assert content["trainer.json"] == CONTENT["trainer.json"]
    for name in (n for n in CONTENT if n.endswith(".safetensors")):
        assert content[name].keys() == CONTENT[name].keys()
        for key, value in CONTENT[name].items():
            assert mx.array_equal(content[name][key], mx.array(value))
            assert content[name][key].dtype == mx.array(value).dtype


def test_manifest_lists_the_hash_of_every_file(folder):
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file() and p.name != "MANIFEST.json"}
    assert manifest["sha256"] == {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in files.items()}
    assert manifest["format"] == FORMAT


def test_bytes_do_not_depend_on_the_order_of_arrays(tmp_path):
    arrays = {f"rows.{i}.{part}": mx.full((1 + i,), i) for i in range(40) for part in ("weight", "bias")}
    for name, content in (("one", arrays), ("other", dict(reversed(arrays.items())))):
        checkpoint.write(tmp_path / name, {"router.safetensors": content})
    one, other = ((tmp_path / name / "router.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other


def test_no_partial_folder_is_left(folder):
    assert [p.name for p in folder.parent.iterdir()] == ["final"]


def test_an_older_checkpoint_of_that_name_is_replaced(folder):
    checkpoint.write(folder, {"trainer.json": {"step": 8}})
    assert checkpoint.read(folder) == {"trainer.json": {"step": 8}}
    assert sorted(p.name for p in folder.iterdir()) == ["MANIFEST.json", "trainer.json"]


def test_a_failed_write_leaves_the_older_checkpoint(folder):
    with pytest.raises(TypeError):
        checkpoint.write(folder, {"trainer.json": {"step": object()}})
    assert checkpoint.read(folder)["trainer.json"]["step"] == 7
    checkpoint.write(folder, {"trainer.json": {"step": 9}})
    assert [p.name for p in folder.parent.iterdir()] == ["final"]


@pytest.mark.parametrize("name", CONTENT)
def test_a_damaged_file_is_named(folder, name):
    damage(folder / name)
    with pytest.raises(UserError, match=f"{name}: damaged"):
        checkpoint.read(folder)


@pytest.mark.parametrize("name", CONTENT)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name}: missing"):
        checkpoint.read(folder)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"format": 1}', '{"format": 1, "sha256": [1]}'])
def test_without_a_manifest_it_is_no_checkpoint(folder, text):
    (folder / "MANIFEST.json").unlink()
    if text is not None:
        (folder / "MANIFEST.json").write_text(text)
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint.read(folder)


def rewrite(folder: Path, **fields) -> None:
    path = folder / "MANIFEST.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_newer_format_is_refused(folder):
    rewrite(folder, format=FORMAT + 1)
    with pytest.raises(UserError, match=f"format {FORMAT + 1}"):
        checkpoint.read(folder)


@pytest.mark.parametrize("form", ["../outside.json", "experts/../../outside.json", "absolute"])
def test_a_path_out_of_the_folder_is_refused(folder, form):
    outside = folder.parent / "outside.json"
    outside.write_text("{}")
    name = str(outside) if form == "absolute" else form
    rewrite(folder, sha256={name: hashlib.sha256(b"{}").hexdigest()})
    with pytest.raises(UserError, match="leads out of"):
        checkpoint.read(folder)


def test_newest_is_the_highest_step(tmp_path):
    write_steps(tmp_path, 100, 20, 2_000_000, 3, 999_999)
    folder, content = checkpoint.newest(tmp_path)
    assert (folder.name, content["trainer.json"]["step"]) == ("step-2000000", 2_000_000)


def test_newest_skips_damaged_checkpoints(tmp_path):
    write_steps(tmp_path, 1, 2, 3)
    damage(tmp_path / "checkpoints" / "step-000003" / "trainer.json")
    (tmp_path / "checkpoints" / "step-000002" / "MANIFEST.json").unlink()
    assert checkpoint.newest(tmp_path)[1]["trainer.json"]["step"] == 1


def test_a_half_written_folder_is_ignored(tmp_path):
    write_steps(tmp_path, 1)
    partial = tmp_path / "checkpoints" / ".step-000002.partial"
    partial.mkdir()
    (partial / "trainer.json").write_text('{"step": 2}')
    assert checkpoint.newest(tmp_path)[0].name == "step-000001"
    write_steps(tmp_path, 2)
    assert not partial.exists()
    assert checkpoint.newest(tmp_path)[0].name == "step-000002"


def test_newest_without_an_intact_checkpoint_gives_the_reason(tmp_path):
    with pytest.raises(UserError, match="no checkpoint here; go on with --resume"):
        checkpoint.newest(tmp_path)
    write_steps(tmp_path, 1, 2)
    for step in (1, 2):
        damage(tmp_path / "checkpoints" / f"step-00000{step}" / "trainer.json")
    with pytest.raises(UserError, match=r"step-000002.*damaged"):
        checkpoint.newest(tmp_path)
