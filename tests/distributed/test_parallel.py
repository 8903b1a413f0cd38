"""Data-parallel runs on one machine: they equal the run of one process, and resume on any number of ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed import launching

CHILD = str(launching.ROOT / "tests" / "stress" / "crashing" / "child.py")
STREAM = """
skills:
  - {name: requests, source: DATA/requests}
  - {name: sql, source: DATA/sql}
  - {name: requests_more, source: DATA/requests_more}
growth: {base_skill: {name: python, source: DATA/python}, policy: bandit, dense_steps: 2, anneal_steps: 2, bootstrap: 50, epsilon: 9.0}
data: {max_seq_length: 128}
training:
  {batch_size: 1, grad_accumulation_steps: 4, epochs: 16, max_steps: 35, steps_per_eval: 12, save_every: 9,
   patience: 99, memory_tokens: 128, router_fit_steps: 20, replay_coef: 0.2, distillation_coef: 0.1, keep_checkpoints: 99}
log: {steps_per_report: 1}
"""
TOLERANCE = 1e-5
LOGITS = 50.0
"""Order of magnitude of the router's logits on this base. The z-loss is their square, some thousands."""


@pytest.fixture(scope="module")
def config(short_skills, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("parallel") / "stream.yaml"
    path.write_text(STREAM.replace("DATA", str(short_skills)))
    return path


def run_arguments(config: Path, name: str) -> list[str]:
    """Return the command-line arguments of a run."""
    return ["--config", str(config), "--runs", str(config.parent), "--name", name]


@pytest.fixture(scope="module")
def alone(config) -> Path:
    """Return the folder of the run of one process."""
    completed = subprocess.run(
        [sys.executable, "-m", "dylora_mlx.train", *run_arguments(config, "alone")], capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stderr
    return config.parent / "alone"


def lines(run: Path, name: str) -> list[dict]:
    """Return the objects of a JSONL file of a run."""
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def decided(run: Path) -> list[dict]:
    """Return the decisions without their times and outcomes. The outcomes are compared as losses."""
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "outcome")} for line in lines(run, "decisions.jsonl")
    ]


def losses(run: Path) -> list[dict[str, float]]:
    """Return the losses of every metrics line."""
    return [{k: v for k, v in line.items() if k.endswith("loss")} for line in lines(run, "metrics.jsonl")]


def rounded(value: object) -> object:
    """Replace floats by approximations within the tolerance, because decisions contain measured losses."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return pytest.approx(value, abs=TOLERANCE, rel=1e-6) if isinstance(value, float) else value


def check_same(run: Path, alone: Path) -> None:
    """Check that a run made the decisions and reached the losses of the run of one process."""
    decisions, expected_decisions = decided(run), decided(alone)
    assert [(d["skill"], d["action"], d["expert"]) for d in decisions] == [
        (d["skill"], d["action"], d["expert"]) for d in expected_decisions
    ]
    for line, expected_line in zip(decisions, expected_decisions, strict=True):  # BLAS threads may change the last bits
        assert line["similarities"] == pytest.approx(expected_line["similarities"], abs=1e-12)
    assert decisions == rounded(expected_decisions)
    run_losses, expected_losses = losses(run), losses(alone)
    assert len(run_losses) == len(expected_losses) > 100
    differences: dict[str, float] = {}
    for line, expected_line in zip(run_losses, expected_losses, strict=True):
        assert line.keys() == expected_line.keys()
        for name, value in expected_line.items():
            # Tolerance: 1e-5 nats for a domain's loss; 1e-5 of their size, or of the logits' size, for a step's terms.
            size = (
                1.0 if name.startswith("eval_") else max(1.0, abs(value), LOGITS if name == "rehearsal_loss" else 0.0)
            )
            differences[name] = max(differences.get(name, 0.0), abs(line[name] - value) / size)
    assert max(differences.values()) <= TOLERANCE, differences


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_several_ranks_equal_one_process(config, alone, tmp_path, count):
    """There are four micro-batches a step.

    Three ranks share them unevenly, and the last step of a skill leaves one rank without any.
    """
    results = launching.run_ranks(
        tmp_path, count, ["-m", "dylora_mlx.train", *run_arguments(config, f"ranks-{count}")], 900
    )
    assert [rank.code for rank in results] == [0] * count, [rank.err for rank in results]
    assert [rank.out for rank in results[1:]] == [""] * (count - 1), "only rank 0 prints"
    run = config.parent / f"ranks-{count}"
    check_same(run, alone)
    steps = [line for line in lines(run, "metrics.jsonl") if "tokens_per_second" in line]
    assert all(line["ranks"] == count and line["communication_mb"] > 0 for line in steps)
    assert json.loads((run / "results.json").read_text())["steps"] >= 100
    totals = [[line["total_flos"] for line in lines(r, "metrics.jsonl") if "total_flos" in line] for r in (run, alone)]
    assert totals[0] == totals[1]


@pytest.mark.slow
@pytest.mark.parametrize(("killed", "count"), [(1, 1), (0, 2)])
def test_a_killed_rank_ends_the_others_and_any_number_resumes(config, alone, tmp_path, killed, count):
    name = f"killed-{killed}"
    crash_points = [["none", "0"], ["none", "0"]]
    # The crash point "step" is reached before and after each step; its 101st time is before the 51st step.
    crash_points[killed] = ["step", "101"]
    results = launching.wait_for_ranks(
        launching.start_ranks(
            tmp_path, [[CHILD, *crash_point, *run_arguments(config, name)] for crash_point in crash_points]
        ),
        900,
    )
    assert results[killed].code == -signal.SIGKILL
    other = results[1 - killed]
    assert other.code == 1
    line = other.error_lines[-1]  # warnings may precede it
    assert line.startswith(f"failed: rank {1 - killed} of 2 lost another rank")
    assert line.endswith("on any number of ranks")
    run = config.parent / name
    resumed = launching.run_ranks(tmp_path, count, ["-m", "dylora_mlx.train", "--resume", str(run)], 900)
    assert [rank.code for rank in resumed] == [0] * count, [rank.err for rank in resumed]
    check_same(run, alone)


@pytest.mark.slow
def test_offloaded_experts_on_several_ranks(config, tmp_path):
    """Every rank has expert files of its own, also for experts that it got from rank 0 on resuming."""
    more = ["--model.expert_memory_mb", "0", "--training.max_steps", "6", "--training.save_every", "2"]
    train = ["-m", "dylora_mlx.train"]
    subprocess.run(
        [sys.executable, *train, *run_arguments(config, "files-alone"), *more], check=True, capture_output=True
    )
    crash_points = [["none", "0"], ["step", "29"]]
    processes = launching.start_ranks(
        tmp_path, [[CHILD, *point, *run_arguments(config, "files"), *more] for point in crash_points]
    )
    assert [rank.code for rank in launching.wait_for_ranks(processes)] == [1, -signal.SIGKILL]
    run, alone = config.parent / "files", config.parent / "files-alone"
    assert list((run / "experts").glob("*.safetensors"))
    resumed = launching.run_ranks(tmp_path, 2, [*train, "--resume", str(run)])
    assert [rank.code for rank in resumed] == [0, 0], [rank.err for rank in resumed]
    assert not (run / "experts").exists()
    ours, theirs = (json.loads((r / "results.json").read_text()) for r in (run, alone))
    assert ours["experts"] == theirs["experts"]
    assert ours["matrix"] == rounded(theirs["matrix"])


@pytest.mark.slow
def test_a_signal_to_one_rank_lets_all_finish_their_step(config, alone, tmp_path):
    name = "asked"
    processes = launching.start_ranks(tmp_path, [["-m", "dylora_mlx.train", *run_arguments(config, name)]] * 2)
    log = config.parent / name / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (log.is_file() and log.read_text().count("train_loss") > 20):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGTERM)
    results = launching.wait_for_ranks(processes, 300)
    assert [rank.code for rank in results] == [143, 143], [rank.err for rank in results]
    assert "nothing is lost, go on with" in results[0].err
    run = config.parent / name
    assert launching.run_ranks(tmp_path, 1, ["-m", "dylora_mlx.train", "--resume", str(run)], 900)[0].code == 0
    check_same(run, alone)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip"), reason="needs namespaces")
def test_a_slow_network_does_not_change_the_losses(capsys):
    """Use two network namespaces. A step waits for at least two hops and has the same losses."""
    import parallel_delay

    assert parallel_delay.main(["--delays", "0", "40", "--steps", "4"]) == 0
    output_lines = capsys.readouterr().out.splitlines()
    rows = [[float(cell) for cell in line.strip("| ").split("|")] for line in output_lines[2:4]]
    assert [row[0] for row in rows] == [0, 40]
    assert rows[1][2] > max(rows[1][3], rows[0][2])
    assert rows[0][4] == rows[1][4] == pytest.approx(4e-3 * (39_936 + 2 * 257 + 12), abs=0.1)
    assert output_lines[-1] == "All 4 losses are the same with every delay, to the bit."


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("mlx.launch"), reason="mlx.launch is not installed")
def test_mlx_launch(short_skills, tmp_path):
    text = STREAM.replace("DATA", str(short_skills)).replace("max_steps: 35", "max_steps: 2")
    (tmp_path / "few.yaml").write_text(text)
    command = [
        "mlx.launch",
        "-n",
        "2",
        sys.executable,
        "-m",
        "dylora_mlx.train",
        *run_arguments(tmp_path / "few.yaml", "few"),
    ]
    env = {**os.environ, "PYTHONPATH": str(launching.ROOT)}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    (result,) = launching.wait_for_ranks([process], 300)
    assert result.code == 0, result.err
    assert result.out.count("[1/3] requests") == 1
    assert json.loads((tmp_path / "few" / "run.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_more_ranks_than_micro_batches_are_refused(tmp_path):
    command = ["-m", "dylora_mlx.train", "--training.grad_accumulation_steps", "1", "--runs", str(tmp_path)]
    results = launching.run_ranks(tmp_path, 2, command, 120)
    assert [rank.code for rank in results] == [2, 2]
    assert results[0].err.startswith(
        "error: training.grad_accumulation_steps: 1 micro-batches in a step are fewer than the 2 ranks"
    )
    assert (results[0].err.count("\n"), results[1].err) == (1, "")
    assert not (tmp_path / "quickstart").exists()
