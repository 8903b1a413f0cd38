"""Several ranks resume with the documents that rank 0 kept, and start from files in different folders."""

from __future__ import annotations

import shutil

from tests.distributed import launching
from tests.run import homes


def test_ranks_resume_without_the_sources(tmp_path):
    """With two micro-batches a step, two ranks end with the bits of one process."""
    run = homes.trained(homes.project(tmp_path / "home"))
    interrupted = homes.interrupt(run, tmp_path / "interrupted", "step-000002")
    shutil.rmtree(tmp_path / "home/data")
    argv = ["-m", "dylora_mlx.train", "--resume", str(interrupted), "--quiet"]
    results = launching.run_ranks(tmp_path, 2, argv, 300)
    assert [rank.code for rank in results] == [0, 0], [rank.err for rank in results]
    assert [rank.err.count("gone; the documents that the run kept are used") for rank in results] == [1, 0]
    assert homes.same_bits(interrupted, run)


def test_ranks_start_from_different_folders(tmp_path):
    """Machines may keep the same files in different places, but not other files."""
    homes.project(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    argv = [
        ["-m", "dylora_mlx.train", "--config", str(tmp_path / f"{name}/my.yaml"), "--runs", str(tmp_path), "--quiet"]
        for name in ("one", "two")
    ]
    results = launching.wait_for_ranks(launching.start_ranks(tmp_path, argv), 300)
    assert [rank.code for rank in results] == [0, 0], [rank.err for rank in results]
    homes.change_record(tmp_path / "two/data/digits.jsonl")
    shutil.rmtree(tmp_path / "my")
    results = launching.wait_for_ranks(launching.start_ranks(tmp_path, argv), 300)
    assert [rank.code for rank in results] == [2, 2]
    assert "rank 1 has another data than rank 0; give every machine the same files" in results[0].err
