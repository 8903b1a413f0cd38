"""A file system that is really full: a few megabytes in memory, where the system lets us mount that (Linux, as root)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import crash_test
import pytest

from dylora_mlx import add, export, fuse, report, train
from dylora_mlx.cli.parser import run_command
from dylora_mlx.training.checkpoint import checkpoint
from tests.conftest import start
from tests.run.test_trust import STREAM

SIZE = 8 << 20
"""Bytes of the file system."""
BLOCK = 4096


class Disk:
    """A small file system. A file beside the runs takes the space that they shall not have."""

    def __init__(self, folder: Path):
        self.folder, self.ballast = folder, folder / "ballast"

    @property
    def free(self) -> int:
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize

    def leave(self, kilobytes: int) -> None:
        """Fill it up but for this much."""
        count = (self.free - (kilobytes << 10)) // BLOCK
        assert count > 0, "less is free already"
        with self.ballast.open("ab") as file:
            for _ in range(count):
                file.write(bytes(BLOCK))

    def clear(self) -> None:
        self.ballast.unlink()


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    place = tmp_path / "disk"
    place.mkdir()
    if not sys.platform.startswith("linux") or os.geteuid():
        pytest.skip("mounting a small file system needs Linux and root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this system does not let us mount a file system")
    try:
        yield Disk(place)
    finally:
        # At once in any case: an array that nobody evaluated, or the frames of a test that failed, hold its files open.
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture(scope="module")
def options(short_skills) -> str:
    text = STREAM.replace("SQL", str(short_skills / "sql")).replace("REQUESTS", str(short_skills / "requests"))
    return text.replace("max_steps: 6", "max_steps: 4").replace("max_seq_length: 256", "max_seq_length: 128")


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory) -> Path:
    """The run that had room."""
    folder = tmp_path_factory.mktemp("whole")
    assert train.main([*start(folder, options), "--quiet"]) == 0
    return folder / "small"


def told(capsys) -> str:
    """The line that a command left with; warnings may stand before it."""
    *before, last = capsys.readouterr().err.splitlines()
    assert all(line.startswith("warning: ") for line in before), before
    return last


def whole_or_nothing(folder: Path) -> None:
    """Every checkpoint that is there can be read, and nothing half-written lies beside."""
    for found in checkpoint._steps(folder):
        checkpoint.read(found)
    assert not [path.name for path in (folder / "checkpoints").glob(".*")]


@pytest.mark.parametrize(
    "room", [400, *(pytest.param(room, marks=pytest.mark.slow) for room in (40, 100, 450, 500, 600, 760))]
)
def test_a_run_that_fills_the_disk_goes_on_when_there_is_room(disk, options, whole, capsys, room):
    """Full at the first checkpoint, features, another checkpoint, run.json, and the same of the second skill; at the end."""
    config = start(disk.folder, options)
    disk.leave(room)
    assert train.main([*config, "--quiet"]) == 1
    line, run = told(capsys), disk.folder / "small"
    assert line.startswith("failed: ")
    assert "free some space" in line
    assert f"--resume {run}" in line
    whole_or_nothing(run)
    disk.clear()
    assert train.main(["--resume", str(run), "--quiet"]) == 0
    assert crash_test.outcome(run) == crash_test.outcome(whole)


@pytest.mark.parametrize("room", [0, 12])
def test_no_room_to_begin(disk, options, capsys, room):
    config = start(disk.folder, options)
    disk.leave(room)
    assert train.main([*config, "--quiet"]) == 1
    line = told(capsys)
    assert line.startswith(f"failed: {disk.folder / 'small'}: cannot be written (")
    assert "free some space" in line
    assert sorted(path.name for path in disk.folder.iterdir()) == ["ballast", "small.yaml"]


@pytest.fixture
def moved(disk, whole) -> Path:
    """The finished run on the small disk."""
    return Path(shutil.copytree(whole, disk.folder / "small"))


@pytest.mark.parametrize(
    "room", [8, pytest.param(150, marks=pytest.mark.slow), pytest.param(400, marks=pytest.mark.slow)]
)
def test_add(disk, moved, short_skills, capsys, room):
    disk.leave(room)
    words = [str(moved), str(short_skills / "stripe"), "--name", "stripe", "--quiet"]
    assert add.main(words) == 1
    line = told(capsys)
    assert "free some space" in line
    whole_or_nothing(moved)
    disk.clear()
    again = ["--resume", str(moved), "--quiet"]
    assert (train.main(again) if "--resume" in line else add.main(words)) == 0
    assert (moved / "checkpoints" / "before-stripe").is_dir()


@pytest.mark.parametrize("room", [0, 20, 36])
def test_exports(disk, moved, capsys, room):
    disk.leave(room)
    out = disk.folder / "exported"
    assert run_command(export.command, [str(moved), "--out", str(out)]) == 1
    assert "free some space" in told(capsys)
    assert not out.exists()
    disk.clear()
    assert run_command(export.command, [str(moved), "--out", str(out)]) == 0


def test_fuse(disk, moved, capsys):
    disk.leave(600)
    out = disk.folder / "fused"
    words = [str(moved), "--expert", "sql", "--out", str(out)]
    assert fuse.main(words) == 1
    assert "space" in told(capsys)
    assert not out.exists()


def test_report(disk, moved, capsys):
    before = (moved / "report.html").read_bytes()
    disk.leave(0)
    assert report.main([str(moved)]) == 1
    assert "free some space" in told(capsys)
    assert (moved / "report.html").read_bytes() == before
