"""dylora pack: one archive with every file of a run, links kept as links, that tar or dylora pack --unpack opens."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

import pytest

from dylora_mlx import generate, pack
from dylora_mlx.system.run_format import FORMAT
from dylora_mlx.training.checkpoint import checkpoint


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def inodes(folder: Path) -> int:
    return len({path.stat().st_ino for path in folder.rglob("*") if path.is_file()})


@pytest.fixture(scope="module")
def archive(finished, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "run.tar"
    assert pack.main([str(finished), "--out", str(path)]) == 0
    return path


@pytest.mark.parametrize("tool", ["dylora", "tar"])
def test_what_is_unpacked_is_what_was_packed(archive, finished, tmp_path, tool, capsys):
    out = tmp_path / "small"
    if tool == "tar":
        done = subprocess.run(["tar", "-xf", str(archive)], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stderr == ""
    else:
        assert pack.main(["--unpack", str(archive), "--out", str(out)]) == 0
    assert contents(out) == contents(finished)
    assert inodes(out) == inodes(finished) < len(contents(finished)), "files that checkpoints share are links again"
    checkpoint.verify(out / "checkpoints/final")
    assert generate.main([str(out), "--prompt", "import", "--max-tokens", "2"]) == 0


def test_the_archive_has_each_file_once(archive, finished):
    unique = {path.stat().st_ino: path.stat().st_size for path in finished.rglob("*") if path.is_file()}
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
    assert sum(member.size for member in members if member.isreg()) == sum(unique.values())
    assert (members[0].name, members[-1].name) == ("small/run.json", "small/config.yaml")
    assert {(member.uid, member.gid, member.uname) for member in members} == {(0, 0, "")}


def test_names_follow_the_run(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert pack.main([str(finished)]) == 0
    assert capsys.readouterr().out.startswith("small.tar (")
    assert pack.main(["--unpack", "small.tar"]) == 0
    assert capsys.readouterr().out == "small (from small.tar)\n"
    assert contents(tmp_path / "small") == contents(finished)


def rewrite(archive: Path, target: Path, change) -> Path:
    """Write an archive again, with each member's (TarInfo, content) changed, or left out for None."""
    with tarfile.open(archive) as tar, tarfile.open(target, "w") as out:
        for member in tar.getmembers():
            file = tar.extractfile(member) if member.isreg() else None
            changed = change(member, None if file is None else file.read())
            if changed is not None:
                info, data = changed
                if data is not None:
                    info.size = len(data)
                out.addfile(info, None if data is None else io.BytesIO(data))
    return target


def newer(member: tarfile.TarInfo, data: bytes | None):
    if member.name.endswith("run.json"):
        assert data is not None
        data = json.dumps(json.loads(data) | {"format": FORMAT + 1, "dylora_mlx": "9.8"}).encode()
    return member, data


def outside(member: tarfile.TarInfo, data: bytes | None):
    if member.name.endswith("samples.json"):
        member.name = "small/../../samples.json"
    return member, data


def linked_outside(member: tarfile.TarInfo, data: bytes | None):
    if member.islnk():
        member.linkname = "../secret"
    return member, data


def symbolic(member: tarfile.TarInfo, data: bytes | None):
    if member.name.endswith("samples.json"):
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        return member, None
    return member, data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            newer,
            f"format {FORMAT + 1}, but this version of dylora_mlx reads formats 1 to {FORMAT}; install dylora_mlx 9.8",
        ),
        (outside, "'small/../../samples.json' is not a file of one run folder"),
        (linked_outside, "is not a file of one run folder"),
        (symbolic, "'small/samples.json' is not a file of one run folder"),
        (
            lambda member, data: None if member.name.endswith("config.yaml") else (member, data),
            "its last file is not config.yaml",
        ),
        (lambda member, data: None, "it was cut off or is no archive"),
    ],
    ids=["newer", "outside", "linked outside", "symbolic", "cut off", "empty"],
)
def test_other_archives_are_refused_in_one_line(archive, tmp_path, monkeypatch, capsys, change, message):
    rewrite(archive, tmp_path / "bad.tar", change)
    monkeypatch.chdir(tmp_path)
    assert pack.main(["--unpack", "bad.tar", "--out", "out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: bad.tar: ")
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["bad.tar"]


@pytest.mark.parametrize("share", [0.3, 0.999, 1.0])
def test_a_truncated_archive_is_refused(archive, tmp_path, capsys, share):
    data = archive.read_bytes()
    end = data.rstrip(b"\0")
    (tmp_path / "bad.tar").write_bytes(end[: int(share * len(end)) - 700])
    assert pack.main(["--unpack", str(tmp_path / "bad.tar"), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "bad.tar: " in line
    assert [path.name for path in tmp_path.iterdir()] == ["bad.tar"]


def test_a_failed_write_leaves_nothing(finished, tmp_path, monkeypatch, capsys):
    def fail(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", fail)
    assert pack.main([str(finished), "--out", str(tmp_path / "run.tar")]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
