"""Files that have not changed are linked from the checkpoint before; everything else, and what cannot be linked, is written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import mlx.core as mx
import pytest

from dylora_mlx.system.frozen_arrays import FrozenArrays
from dylora_mlx.training.checkpoint import checkpoint, links
from dylora_mlx.training.checkpoint.links import StoredFiles
from dylora_mlx.training.checkpoint.state import pool_files, restore_pool
from tests.tiny import tiny_base, tiny_pool
from tests.training.checkpoint.test_state import make_library

WEIGHTS = {"a": mx.arange(4), "b": mx.array([0.5])}
EXPERT = "experts/expert_1/adapters.safetensors"


def content(weights=WEIGHTS, row: float = 1.0, step: int = 1) -> checkpoint.CheckpointContent:
    return {EXPERT: FrozenArrays(weights), "matrix/row_0.json": {"a": row}, "trainer.json": {"step": step}}


@pytest.fixture
def stored(tmp_path) -> StoredFiles:
    """The files of the checkpoint `one`."""
    files = StoredFiles()
    checkpoint.write(tmp_path / "one", content(), files)
    return files


def same_files(folder: Path) -> set[str]:
    """Return the names of the files of `two` that are links to those of `one`."""
    one, two = folder / "one", folder / "two"
    names = [path.relative_to(two).as_posix() for path in two.rglob("*") if path.is_file()]
    return {name for name in names if (one / name).exists() and (one / name).samefile(two / name)}


def test_what_is_the_same_is_linked(stored, tmp_path):
    checkpoint.write(tmp_path / "two", content(step=2), stored)
    assert same_files(tmp_path) == {EXPERT, "matrix/row_0.json"}
    assert (
        checkpoint.read_manifest(tmp_path / "two")[1][EXPERT] == checkpoint.read_manifest(tmp_path / "one")[1][EXPERT]
    )
    assert checkpoint.read(tmp_path / "two")["trainer.json"] == {"step": 2}


@pytest.mark.parametrize(
    ("changed", "linked"),
    [
        (content({"a": mx.arange(4), "b": WEIGHTS["b"]}), {"matrix/row_0.json"}),
        (content({"a": WEIGHTS["a"]}), {"matrix/row_0.json"}),
        (content({"c": WEIGHTS["a"], "b": WEIGHTS["b"]}), {"matrix/row_0.json"}),
        (content() | {EXPERT: dict(WEIGHTS)}, {"matrix/row_0.json"}),
        (content(row=2.0), {EXPERT}),
    ],
    ids=["another array", "one array less", "another name", "not frozen", "another loss"],
)
def test_what_is_other_is_written(stored, tmp_path, changed, linked):
    checkpoint.write(tmp_path / "two", changed, stored)
    assert same_files(tmp_path) == linked
    assert checkpoint.read(tmp_path / "two")["matrix/row_0.json"] == changed["matrix/row_0.json"]


@pytest.mark.parametrize("damage", ["modified", "removed"])
def test_a_file_that_something_else_changed_is_written_again(stored, tmp_path, damage):
    path = tmp_path / "one" / EXPERT
    data = path.read_bytes()
    path.unlink()
    if damage == "modified":
        path.write_bytes(data[:-1])
    checkpoint.write(tmp_path / "two", content(), stored)
    assert same_files(tmp_path) == {"matrix/row_0.json"}
    assert (tmp_path / "two" / EXPERT).read_bytes() == data
    checkpoint.verify(tmp_path / "two")


def test_a_checkpoint_of_the_same_name_links_its_own_files(stored, tmp_path):
    inode = (tmp_path / "one" / EXPERT).stat().st_ino
    for step in (2, 3):
        checkpoint.write(tmp_path / "one", content(step=step), stored)
    assert (tmp_path / "one" / EXPERT).stat().st_ino == inode
    assert checkpoint.read(tmp_path / "one")["trainer.json"] == {"step": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_failed_write_leaves_the_files_to_link(stored, tmp_path):
    with pytest.raises(TypeError):
        checkpoint.write(tmp_path / "two", content() | {"trainer.json": {"step": object()}}, stored)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    checkpoint.write(tmp_path / "two", content(), stored)
    assert same_files(tmp_path) == {EXPERT, "matrix/row_0.json"}


@pytest.mark.parametrize("error", [errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV])
def test_without_links_files_are_copied_and_it_is_said_once(stored, tmp_path, monkeypatch, capsys, error):
    def refuse(source, target):
        raise OSError(error, os.strerror(error))

    links._warn_no_links.cache_clear()
    monkeypatch.setattr(os, "link", refuse)
    checkpoint.write(tmp_path / "two", content(), stored)
    assert same_files(tmp_path) == set()
    assert checkpoint.read(tmp_path / "two").keys() == content().keys()
    checkpoint.write(tmp_path / "three", content(), stored)
    assert " ".join(capsys.readouterr().err.split()) == (
        "warning: this file system has no hard links, so every checkpoint is written as a whole: each takes the space of all "
        "experts"
    )


def test_a_file_with_too_many_links_is_copied_silently(stored, tmp_path, monkeypatch, capsys):
    real = os.link

    def refuse(source, target):
        if Path(source).parent.name == "expert_1":
            raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))
        real(source, target)

    monkeypatch.setattr(os, "link", refuse)
    checkpoint.write(tmp_path / "two", content(), stored)
    assert same_files(tmp_path) == {"matrix/row_0.json"}
    checkpoint.verify(tmp_path / "two")
    assert capsys.readouterr().err == ""


def test_a_restored_pool_links_the_files_that_it_was_read_from(tmp_path):
    pool, library = tiny_pool([2, 3]), make_library()
    pool.freeze(1)
    checkpoint.write(tmp_path / "one", pool_files(tiny_base(), pool, library))
    files, again = checkpoint.read(tmp_path / "one"), tiny_pool(filled=False)
    restored = restore_pool(files, tiny_base(), again, tmp_path / "one")
    stored = checkpoint.stored_files(tmp_path / "one", files, pool_files(tiny_base(), again, restored))
    checkpoint.write(tmp_path / "two", pool_files(tiny_base(), again, restored), stored)
    assert same_files(tmp_path) == {
        EXPERT, *(f"experts/expert_{i}/adapter_config.json" for i in (1, 2)),
        *(f"library/entry_{i}.{part}.safetensors" for i in range(2) for part in ("statistics", "memory")),
    }, "the second expert is still trained"  # fmt: skip
    one, two = (checkpoint.read_manifest(tmp_path / name)[1] for name in ("one", "two"))
    assert one == two
