"""dylora prune: it removes old checkpoints, prints what is left, and the run still opens and resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dylora_mlx import prune, train
from dylora_mlx.run import run_folder
from dylora_mlx.training.checkpoint import checkpoint
from tests.run.homes import same_bits


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def left(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_finished_run_keeps_its_final_checkpoint(run, capsys):
    before = left(run)
    assert prune.main([str(run), "--keep", "1", "--dry-run"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:-1] == [f"would remove {name}" for name in before[1:]], "oldest first"
    assert out[-1].startswith("would keep final: ")
    assert left(run) == before
    assert prune.main([str(run), "--keep", "1"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:-1] == [f"removed {name}" for name in before[1:]]
    assert left(run) == ["final"]
    assert run_folder.open_run(run, "float32").checkpoint.name == "final"
    assert train.main(["--resume", str(run / "checkpoints" / before[1])]) == 2
    line = " ".join(capsys.readouterr().err.split())
    assert line == (
        f"error: {run}/checkpoints/{before[1]}: this checkpoint is not there, or not any more; give the run folder, {run}, "
        "which has final"
    )


def test_an_interrupted_run_resumes_after_it(run, finished, tmp_path):
    shutil.rmtree(run / "checkpoints/final")
    (run / "results.json").unlink()
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"status": "running"}))
    for folder in checkpoint.step_folders(run)[-2:]:
        shutil.rmtree(folder)
    newest = checkpoint.step_folders(run)[-1].name
    assert prune.main([str(run), "--max-bytes", "1kB"]) == 0
    assert left(run) == [newest]
    assert train.main(["--resume", str(run), "--quiet"]) == 0
    assert same_bits(run, finished)


def test_sizes_are_of_what_is_kept_and_freed(run, capsys):
    total = sum(path.stat().st_size for path in (run / "checkpoints").rglob("*") if path.is_file())
    final = sum(path.stat().st_size for path in (run / "checkpoints/final").rglob("*") if path.is_file())
    assert prune.main([str(run), "--max-bytes", f"{final}"]) == 0, "copies: nothing is shared here"
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"kept final: {final / 1e3:.1f} kB; {(total - final) / 1e6:.1f} MB freed"
    )
    assert prune.main([str(run), "--max-bytes", "2kB"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "the last complete checkpoint alone takes more than 2.0 kB"


def test_the_limits_of_the_run_are_the_default(run, capsys):
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("keep_checkpoints: 20", "keep_checkpoints: 3"))
    assert prune.main([str(run)]) == 0
    assert len(left(run)) == 3
    config.write_text(config.read_text().replace("checkpoints_mb: null", "checkpoints_mb: 1"))
    assert prune.main([str(run), "--keep", "9"]) == 0
    assert 1 <= len(left(run)) <= 3


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("2kB", 2000),
        ("1.5MB", 1_500_000),
        ("2 GiB", 2 << 30),
        ("3g", 3 * 10**9),
        ("1TB", 10**12),
        ("4Kib", 4096),
    ],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert prune.byte_count(text) == size
