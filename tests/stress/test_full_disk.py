"""Commands on a file system that is really full: a tmpfs of a few megabytes. Needs Linux and root to mount it."""

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
"""Size of the file system in bytes."""
BLOCK = 4096


class Disk:
    """A small file system. A ballast file next to the runs fills it up."""

    def __init__(self, folder: Path):
        self.folder, self.ballast = folder, folder / "ballast"

    @property
    def free(self) -> int:
        """Free space in bytes."""
        stats = os.statvfs(self.folder)
        return stats.f_bavail * stats.f_frsize

    def leave(self, kilobytes: int) -> None:
        """Fill the file system, except for this many kilobytes."""
        count = (self.free - (kilobytes << 10)) // BLOCK
        assert count > 0, "less space is free already"
        with self.ballast.open("ab") as file:
            for _ in range(count):
                file.write(bytes(BLOCK))

    def clear(self) -> None:
        """Free the space again."""
        self.ballast.unlink()


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    """A mounted small file system. Skips the test if mounting is not possible."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    if not sys.platform.startswith("linux") or os.geteuid():
        pytest.skip("mounting a small file system needs Linux and root")
    result = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(mount_point)], capture_output=True
    )
    if result.returncode:
        pytest.skip("this system does not allow mounting a file system")
    try:
        yield Disk(mount_point)
    finally:
        # Lazy: an unevaluated MLX array or the frames of a failed test may still hold files open.
        subprocess.run(["umount", "--lazy", str(mount_point)], check=True)


@pytest.fixture(scope="module")
def options(short_skills) -> str:
    """The config of a short run of two skills."""
    text = STREAM.replace("SQL", str(short_skills / "sql")).replace("REQUESTS", str(short_skills / "requests"))
    return text.replace("max_steps: 6", "max_steps: 4").replace("max_seq_length: 256", "max_seq_length: 128")


@pytest.fixture(scope="module")
def finished_run(options, tmp_path_factory) -> Path:
    """A finished run that had enough space."""
    folder = tmp_path_factory.mktemp("whole")
    assert train.main([*start(folder, options), "--quiet"]) == 0
    return folder / "small"


def last_error(capsys) -> str:
    """Return the last line on stderr. Only warnings may precede it."""
    *before, last = capsys.readouterr().err.splitlines()
    assert all(line.startswith("warning: ") for line in before), before
    return last


def check_checkpoints(folder: Path) -> None:
    """Check that every checkpoint can be read, and that no partly written one is left."""
    for step_folder in checkpoint.step_folders(folder):
        checkpoint.read(step_folder)
    assert not [path.name for path in (folder / "checkpoints").glob(".*")]


@pytest.mark.parametrize(
    "free_kb", [400, *(pytest.param(free_kb, marks=pytest.mark.slow) for free_kb in (40, 100, 450, 500, 600, 760))]
)
def test_a_run_that_filled_the_disk_resumes_when_there_is_space(disk, options, finished_run, capsys, free_kb):
    """The disk is full at the first checkpoint, the features, another checkpoint, run.json, the same of the second skill, or the end."""
    config = start(disk.folder, options)
    disk.leave(free_kb)
    assert train.main([*config, "--quiet"]) == 1
    line, run = last_error(capsys), disk.folder / "small"
    assert line.startswith("failed: ")
    assert "free some space" in line
    assert f"--resume {run}" in line
    check_checkpoints(run)
    disk.clear()
    assert train.main(["--resume", str(run), "--quiet"]) == 0
    assert crash_test.outcome(run) == crash_test.outcome(finished_run)


@pytest.mark.parametrize("free_kb", [0, 12])
def test_no_space_to_start(disk, options, capsys, free_kb):
    config = start(disk.folder, options)
    disk.leave(free_kb)
    assert train.main([*config, "--quiet"]) == 1
    line = last_error(capsys)
    assert line.startswith(f"failed: {disk.folder / 'small'}: cannot be written (")
    assert "free some space" in line
    assert sorted(path.name for path in disk.folder.iterdir()) == ["ballast", "small.yaml"]


@pytest.fixture
def run_copy(disk, finished_run) -> Path:
    """A copy of the finished run on the small disk."""
    return Path(shutil.copytree(finished_run, disk.folder / "small"))


@pytest.mark.parametrize(
    "free_kb", [8, pytest.param(150, marks=pytest.mark.slow), pytest.param(400, marks=pytest.mark.slow)]
)
def test_add(disk, run_copy, short_skills, capsys, free_kb):
    disk.leave(free_kb)
    words = [str(run_copy), str(short_skills / "stripe"), "--name", "stripe", "--quiet"]
    assert add.main(words) == 1
    line = last_error(capsys)
    assert "free some space" in line
    check_checkpoints(run_copy)
    disk.clear()
    resume_words = ["--resume", str(run_copy), "--quiet"]
    assert (train.main(resume_words) if "--resume" in line else add.main(words)) == 0
    assert (run_copy / "checkpoints" / "before-stripe").is_dir()


@pytest.mark.parametrize("free_kb", [0, 20, 36])
def test_exports(disk, run_copy, capsys, free_kb):
    disk.leave(free_kb)
    out = disk.folder / "exported"
    assert run_command(export.command, [str(run_copy), "--out", str(out)]) == 1
    assert "free some space" in last_error(capsys)
    assert not out.exists()
    disk.clear()
    assert run_command(export.command, [str(run_copy), "--out", str(out)]) == 0


def test_fuse(disk, run_copy, capsys):
    disk.leave(600)
    out = disk.folder / "fused"
    words = [str(run_copy), "--expert", "sql", "--out", str(out)]
    assert fuse.main(words) == 1
    assert "space" in last_error(capsys)
    assert not out.exists()


def test_report(disk, run_copy, capsys):
    before = (run_copy / "report.html").read_bytes()
    disk.leave(0)
    assert report.main([str(run_copy)]) == 1
    assert "free some space" in last_error(capsys)
    assert (run_copy / "report.html").read_bytes() == before
