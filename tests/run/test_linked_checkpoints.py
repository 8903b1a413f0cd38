"""Checkpoints of a growing run: what has not changed is linked, so each writes as much as the one before; any damage is found."""

from __future__ import annotations

import gc
import os
import resource
import shutil
from pathlib import Path

import pytest

from dylora_mlx import add, train
from dylora_mlx.errors import UserError
from dylora_mlx.run import run_folder
from dylora_mlx.training.checkpoint import checkpoint, links
from dylora_mlx.training.skill import learn
from tests.run.homes import GROWING, SKILLS, STORED, interrupt, project, same_bits, trained, write_skills


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A project folder with eight skills."""
    folder = project(tmp_path_factory.mktemp("linked") / "home", GROWING)
    write_skills(folder)
    return folder


@pytest.fixture(scope="module")
def run(home) -> Path:
    """The run that learned the eight skills, with every checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        return trained(home)


def after_skills(run: Path) -> list[Path]:
    """Return the checkpoint after each skill."""
    return [run / f"checkpoints/step-{2 * number:06d}" for number in range(1, SKILLS + 1)]


def written(folders: list[Path]) -> list[dict[str, int]]:
    """Return the bytes by name of the files that each checkpoint has written, not linked: those whose inode is new."""
    seen, result = set(), []
    for folder in folders:
        new = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.stat().st_ino not in seen:
                seen.add(path.stat().st_ino)
                new[path.relative_to(folder).as_posix()] = path.stat().st_size
        result.append(new)
    return result


STATE = {
    "MANIFEST.json",
    "pool.json",
    "router.safetensors",
    "optimizer.safetensors",
    "teacher_gate.safetensors",
    "best.safetensors",
}
"""Files with a gate row, or a line of text, for each skill."""


def test_bytes_written_do_not_grow_with_the_skills(run):
    """From the second to the eighth: the rows of the gate apart, each checkpoint writes as much as the one before."""
    sizes = written([run / "checkpoints/step-000000", *after_skills(run)])[2:]
    fixed = [sum(size for name, size in new.items() if name not in STATE) for new in sizes]
    assert fixed == pytest.approx([fixed[0]] * 7, rel=0.01)
    assert fixed[0] > 45_000, "an expert, an entry and its memory"
    totals = [sum(new.values()) for new in sizes]
    per_skill = (totals[-1] - totals[0]) / 6
    rows = 3 * 4 * (32 + 1)  # weight, bias and two moments of a gate row
    assert rows < per_skill < rows + 1200, "with names in headers, the manifest and the records"
    whole = [sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) for folder in after_skills(run)]
    assert whole[-1] > 6 * totals[-1], "what would be written without links"


def test_only_what_changed_is_written(run):
    during, after = written([*after_skills(run)[:-1], run / "checkpoints/step-000015", after_skills(run)[-1]])[-2:]
    assert {name for name in during if "/" in name} == {
        "experts/expert_8/adapters.safetensors", "experts/expert_8/adapter_config.json",
    }  # fmt: skip
    assert {name for name in after if "/" in name} == {
        "experts/expert_8/adapters.safetensors", "matrix/row_8.json",
        *(f"library/entry_7.{part}.safetensors" for part in ("statistics", "memory", "exemplars")),
    }  # fmt: skip
    last, final = after_skills(run)[-1], run / "checkpoints/final"
    linked = [path for path in last.rglob("*/*") if path.is_file()]
    assert len(linked) == 8 * 2 + 8 * 3 + 9
    assert all(path.samefile(final / path.relative_to(last)) for path in linked)
    assert not (last / "pool.json").samefile(final / "pool.json"), "the state itself has a file of its own"


def test_moments_are_kept_of_the_expert_in_training_alone(run):
    during, after = (
        checkpoint.read(run / f"checkpoints/step-{step:06d}")["optimizer.safetensors"] for step in (15, 16)
    )
    assert {name.split(".")[2] for name in during if name.startswith("experts.experts")} == {"7"}
    assert not [name for name in after if name.startswith("experts.experts")]
    assert after["router.weight.m"].shape == (9, 32)


def test_a_manifest_covers_linked_files(run):
    _, names = checkpoint.verify(run / "checkpoints/final")
    assert {"experts/expert_1/adapters.safetensors", "library/entry_0.memory.safetensors", "matrix/row_0.json"} <= {
        *names
    }


@pytest.mark.parametrize(
    "name", ["experts/expert_2/adapters.safetensors", "library/entry_3.memory.safetensors", "matrix/row_1.json"]
)
def test_a_damaged_linked_file_is_named(run, tmp_path, name):
    copy = Path(shutil.copytree(run, tmp_path / "run", copy_function=os.link))
    path = copy / "checkpoints/final" / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.unlink()
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{name}: damaged, its sha256 is not the manifest's"):
        checkpoint.read(copy / "checkpoints/final")


# Stopped, resumed, moved.


FIVE_LEARNED = "step-000010"
"""Where stopped runs begin: three skills are left, and there is much to link."""


def killed(run: Path, folder: Path, monkeypatch, module, name: str, number: int) -> Path:
    """Go on with a copy of the run after five skills and end the process's work at the `number`-th call of a function,
    without any cleanup."""
    copy, real, calls = interrupt(run, folder / "run", FIVE_LEARNED), getattr(module, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, counted)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if killed: a half-written checkpoint stays
        assert train.main(["--resume", str(copy), "--quiet"]) == 130
    return copy


@pytest.mark.parametrize(
    ("module", "name", "number"),
    [
        (links, "link_or_copy", 90),
        (checkpoint, "fsync", 50),
        (checkpoint, "save_arrays", 16),
        (learn, "train_step", 4),
    ],
    ids=["linking", "flushing", "writing", "training"],
)
def test_a_stopped_run_ends_with_the_same_bits(run, tmp_path, monkeypatch, module, name, number):
    stopped = killed(run, tmp_path, monkeypatch, module, name, number)
    before = checkpoint.step_folders(stopped)[-1]
    assert before.name > FIVE_LEARNED, "it went on before it was killed"
    assert train.main(["--resume", str(stopped), "--quiet"]) == 0
    assert same_bits(stopped, run)
    assert checkpoint.read_manifest(stopped / "checkpoints/final") == checkpoint.read_manifest(
        run / "checkpoints/final"
    )
    after = written([before, checkpoint.step_folders(stopped)[checkpoint.step_folders(stopped).index(before) + 1]])[-1]
    assert sum(after.values()) < 70_000, "the first checkpoint after resuming links what was restored"
    assert not list((stopped / "checkpoints").glob(".*"))


def test_without_hard_links_the_bits_are_the_same(run, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    links._warn_no_links.cache_clear()
    monkeypatch.setattr(os, "link", refuse)
    copy = interrupt(run, tmp_path / "run", FIVE_LEARNED)
    options = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(options.replace("keep_checkpoints: 40", "keep_checkpoints: 1"))
    assert train.main(["--resume", str(copy), "--quiet"]) == 0
    assert same_bits(copy, run)
    assert len(checkpoint.step_folders(copy)) < len(checkpoint.step_folders(run)) - 5, "earlier ones were removed"
    warnings = " ".join(capsys.readouterr().err.split())
    assert warnings.count("this file system has no hard links") == 1


def test_a_run_that_is_moved_while_it_is_open_ends_in_one_line(run, tmp_path, monkeypatch, capsys):
    real, calls, new = learn.train_step, [], tmp_path / "elsewhere"
    old = interrupt(run, tmp_path / "run", FIVE_LEARNED)

    def moving(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            old.rename(new)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(learn, "train_step", moving)
        assert train.main(["--resume", str(old), "--quiet"]) == 1
    assert " ".join(capsys.readouterr().err.split()) == (
        f"failed: {old}: the run folder is not there any more; if it was moved, its last checkpoint is whole, and it goes on "
        "with: python -m dylora_mlx.train --resume, and its new place"
    )
    assert not old.exists()
    assert train.main(["--resume", str(new), "--quiet"]) == 0
    assert same_bits(new, run)


def test_adding_a_skill_links_what_the_run_knows(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    assert add.main([str(copy), str(STORED / "data/signs.jsonl"), "--name", "signs", "--quiet"]) == 0
    before, after = copy / "checkpoints/before-signs", copy / "checkpoints/final"
    shared = [path.relative_to(before) for path in before.rglob("*/*") if path.is_file()]
    assert len(shared) == 8 * 2 + 8 * 3 + 9
    changed = {str(name) for name in shared if not (after / name).samefile(before / name)}
    assert changed == {"matrix/row_0.json", "matrix/row_8.json"}, "the losses of the new domain"
    assert checkpoint.read(after).keys() > checkpoint.read(before).keys()


def open_files() -> int:
    return len(os.listdir("/dev/fd"))


def test_a_run_holds_one_open_file_for_each_skill(home, run, monkeypatch):
    """macOS starts a process with 256 open files. The limit is raised, and only the mapped memories stay open."""
    monkeypatch.chdir(home)
    gc.collect()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = open_files()
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + SKILLS, hard))
    try:
        opened = run_folder.open_run(run)
        assert len(opened.pool) == SKILLS
        assert open_files() <= before + SKILLS + 2
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > before + SKILLS
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
