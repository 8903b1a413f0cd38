"""Locks, signals, full disks, damaged and half-written folders: no progress is lost, and one line gives the remedy."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dylora_mlx import add, import_expert, restore, train
from dylora_mlx.errors import UserError
from dylora_mlx.run import run_folder
from dylora_mlx.system import files, signals
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.skill import learn
from tests.conftest import start

STREAM = """
skills: [{name: sql, source: SQL}, {name: requests, source: REQUESTS}]
growth: {base_skill: null, dense_steps: 1, anneal_steps: 1}
data: {max_seq_length: 256}
training: {grad_accumulation_steps: 1, max_steps: 6, steps_per_eval: 3, memory_tokens: 128, save_every: 2}
log: {steps_per_report: 1}
"""
BRIEF = """
skills: [{name: requests, source: REQUESTS, limit: 20}]
growth: {base_skill: null, min_samples: 8, min_tokens: 100, bootstrap: 50, dense_steps: 1, anneal_steps: 1}
data: {max_seq_length: 256}
training: {grad_accumulation_steps: 1, max_steps: 2, steps_per_eval: 2, memory_tokens: 256, save_every: 1, router_fit_steps: 2}
"""
"""For tests in which it does not matter what is learned."""


@pytest.fixture(scope="module")
def stream(short_skills) -> str:
    return STREAM.replace("SQL", str(short_skills / "sql")).replace("REQUESTS", str(short_skills / "requests"))


@pytest.fixture(scope="module")
def brief(short_skills) -> str:
    return BRIEF.replace("REQUESTS", str(short_skills / "requests"))


@pytest.fixture(scope="module")
def uninterrupted(stream, tmp_path_factory) -> Path:
    """The same run without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    assert train.main(start(folder, stream)) == 0
    return folder / "small"


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    folder = tmp_path / "small"
    shutil.copytree(finished, folder)
    return folder


def interrupted(copy: Path) -> Path:
    """Remove the final checkpoint, as if the run had been stopped after its second skill."""
    shutil.rmtree(copy / "checkpoints" / "final")
    return copy


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Two processes.


def test_a_second_process_is_refused(copy, capsys):
    interrupted(copy)
    before = contents(copy)
    program = "import sys, time; from pathlib import Path; from dylora_mlx.system.files import FolderLock\n"
    program += "held = FolderLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    arguments = [sys.executable, "-c", program, str(copy)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert train.main(["--resume", str(copy)]) == 2
        err = capsys.readouterr().err
        assert err == f"error: {copy}: another process works on this run; wait for it, or stop it first\n"
        assert contents(copy) == before
        holder.kill()
    files.FolderLock(copy).release()  # the lock died with its process


def test_commands_that_change_a_locked_run_are_refused(copy, capsys):
    """dylora import-expert, restore and add change the final checkpoint, so only one process may run them at a time."""
    adapter = str(copy / "checkpoints/final/experts/expert_1")
    before = contents(copy)
    with files.FolderLock(copy):
        for command, arguments in (
            (import_expert, [str(copy), adapter, "--name", "more", "--text", "packaged/flask"]),
            (restore, [str(copy), "removed/001-evict"]),
            (add, [str(copy), "packaged/flask", "--name", "more"]),
        ):
            assert command.main(arguments) == 2
            assert (
                capsys.readouterr().err
                == f"error: {copy}: another process works on this run; wait for it, or stop it first\n"
            )
    assert contents(copy) == before


def test_a_lock_is_released_when_a_command_ends(copy):
    assert add.main([str(copy), "packaged/nothing", "--name", "x"]) == 2
    with files.FolderLock(copy), pytest.raises(UserError, match="another process works on this run"):
        files.FolderLock(copy)
    files.FolderLock(copy).release()


# Signals.


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_saves(stream, uninterrupted, tmp_path, monkeypatch, capsys, signum, code):
    original, calls = learn.train_step, []

    def advance(*arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signum)
        return original(*arguments)

    monkeypatch.setattr(learn, "train_step", advance)
    before = signal.getsignal(signum)
    assert train.main(start(tmp_path, stream)) == code
    assert signal.getsignal(signum) is before
    assert len(calls) == 3
    folder = tmp_path / "small"
    err = capsys.readouterr().err
    assert f"stopped at step 3; nothing is lost, go on with: python -m dylora_mlx.train --resume {folder}" in err
    assert "Traceback" not in err
    assert json.loads((folder / "checkpoints" / "step-000003" / "trainer.json").read_text())["skill_step"] == 3
    assert train.main(["--resume", str(folder)]) == 0
    assert contents(folder / "checkpoints" / "final") == contents(uninterrupted / "checkpoints" / "final")


def test_a_second_signal_exits_at_once():
    program = (
        "import os, signal, time\nfrom dylora_mlx.system import signals\n"
        "with signals.defer_signals():\n"
        "    os.kill(os.getpid(), signal.SIGTERM); assert signals.stop_requested(); print('still here', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT); time.sleep(60); print('never', flush=True)\n"
    )
    began = time.monotonic()
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (130, "still here\n")
    assert "once more leaves at once" in ran.stderr
    assert time.monotonic() - began < 50, "it did not sleep"


def test_a_signal_before_training_exits_without_a_checkpoint(brief, tmp_path, monkeypatch, capsys):
    from dylora_mlx.run import loop

    original = loop.run_base_pass

    def interrupted_pass(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments, **options)

    monkeypatch.setattr(loop, "run_base_pass", interrupted_pass)
    assert train.main(start(tmp_path, brief)) == 130
    assert "nothing is lost, go on with --resume" in capsys.readouterr().err
    assert not signals.stop_requested()
    monkeypatch.undo()
    assert train.main(["--resume", str(tmp_path / "small")]) == 0


# The disk.


@pytest.mark.parametrize(
    ("number", "advice"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "make the file system writable")]
)
def test_a_disk_that_fails(brief, tmp_path, monkeypatch, capsys, number, advice):
    original, calls = checkpoint.fsync, []

    def sync(path):
        calls.append(path)
        if len(calls) > 30:
            raise OSError(number, os.strerror(number), str(path))
        original(path)

    monkeypatch.setattr(checkpoint, "fsync", sync)
    assert train.main(start(tmp_path, brief)) == 1
    err = capsys.readouterr().err
    assert err.startswith("failed: ")
    assert os.strerror(number) in err
    assert advice in err
    assert err.count("\n") == 1
    folder = tmp_path / "small"
    assert not [path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")]
    monkeypatch.undo()
    assert train.main(["--resume", str(folder)]) == 0


def test_too_little_memory(brief, tmp_path, monkeypatch, capsys):
    def advance(*_):
        raise RuntimeError("[metal::malloc] Attempting to allocate 99 bytes which is greater than the maximum allowed")

    monkeypatch.setattr(learn, "train_step", advance)
    assert train.main(start(tmp_path, brief)) == 1
    err = capsys.readouterr().err
    assert err.startswith("failed: out of memory")
    assert "training.grad_checkpoint" in err
    monkeypatch.undo()
    assert train.main(["--resume", str(tmp_path / "small")]) == 0


def test_internal_errors_keep_their_traceback(brief, tmp_path, monkeypatch):
    def advance(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(learn, "train_step", advance)
    with pytest.raises(RuntimeError, match="something else"):
        train.main(start(tmp_path, brief))
    files.FolderLock(tmp_path / "small").release()


# Folders of a stopped process.


def test_a_run_that_was_stopped_before_its_first_checkpoint(brief, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_folder, "save_checkpoint", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert train.main(start(tmp_path, brief)) == 130
    monkeypatch.undo()
    folder = tmp_path / "small"
    assert not list(folder.glob("checkpoints/step-*"))
    capsys.readouterr()
    assert train.main(["--resume", str(folder)]) == 0
    assert "resumed from the beginning, there was no checkpoint yet" in capsys.readouterr().out


def test_a_run_that_was_stopped_after_its_final_checkpoint(copy, capsys):
    info = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**info, "status": "running"}))
    (copy / "features").mkdir()
    (copy / "report.html").unlink()
    for _ in range(2):
        assert train.main(["--resume", str(copy)]) == 2
        assert "this run is finished, there is nothing to resume" in capsys.readouterr().err
        assert json.loads((copy / "run.json").read_text()) == {**info, "status": "finished"}
    assert not (copy / "features").exists()
    assert (copy / "report.html").is_file()


def test_a_checkpoint_that_was_being_replaced_is_recovered(copy):
    folder = interrupted(copy) / "checkpoints"
    newest = checkpoint.step_folders(copy)[-1]
    wanted = contents(newest)
    newest.rename(folder / f".{newest.name}.old")
    shutil.copytree(folder / f".{newest.name}.old", folder / f".{newest.name}.partial")
    checkpoint.recover(copy)
    assert contents(newest) == wanted
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    shutil.copytree(newest, folder / f".{newest.name}.old")  # killed a moment later
    checkpoint.recover(copy)
    assert contents(newest) == wanted
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_damaged_newest_checkpoint_is_reported_and_the_previous_is_used(copy, capsys):
    interrupted(copy)
    newest, before = checkpoint.step_folders(copy)[-1], checkpoint.step_folders(copy)[-2]
    with (newest / "router.safetensors").open("r+b") as file:
        file.seek(100)
        file.write(b"\x00\x01\x02\x03damaged")
    assert train.main(["--resume", str(copy)]) == 0
    out, err = capsys.readouterr()
    assert f"{newest / 'router.safetensors'}: damaged" in " ".join(err.split())
    assert f"resumed from {before}" in out


def test_a_damaged_final_checkpoint_is_reported(copy, capsys):
    (copy / "checkpoints" / "final" / "pool.json").write_text("{}")
    opened = run_folder.open_run(copy, "float32")
    assert opened.checkpoint.name.startswith("step-")
    assert f"{opened.checkpoint} is used instead" in " ".join(capsys.readouterr().err.split())
