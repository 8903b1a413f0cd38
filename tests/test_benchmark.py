"""tools/benchmark.py: its workloads, its counts, its statistics, and one small run of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TOOLS = Path(__file__).parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

import benchmark  # noqa: E402
from benchmarking import contenders, matmuls, ours, workload  # noqa: E402
from benchmarking.workload import Workload  # noqa: E402


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(TOOLS / "benchmark.py"), *arguments], capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("lengths", ["snippets", "mbpp"])
def test_documents_are_as_long_as_real_ones(lengths):
    deciles, learned = workload.DECILES[lengths]
    found = workload.documents(Workload("embedded", lengths), 2000)
    sizes = np.array([len(tokens) - 1 for tokens, _ in found])
    assert deciles[0] <= sizes.min()
    assert sizes.max() <= deciles[-1]
    assert abs(np.median(sizes) - deciles[5]) < 3
    prompts = np.array([prompt for _, prompt in found])
    assert abs(1 - prompts.sum() / sizes.sum() - learned) < 0.01


def test_full_documents_fill_rows():
    assert {len(tokens) for tokens, _ in workload.documents(Workload("embedded", "full", length=64), 5)} == {65}


def test_counted_products():
    """Against the parameters: a forward pass is two operations a weight and token, a backward pass at most as many."""
    plan = Workload("gemma3-270m", rows=1, length=512, experts=4)
    found: dict[str, int] = {}
    for product in matmuls.products(plan):
        found[product.part] = found.get(product.part, 0) + product.flops
    block = 640 * 256 * (2 * 4 + 2 * 1) + 3 * 640 * 2048
    assert found["trunk forward"] == 2 * 512 * 18 * block
    assert 0.95 * found["trunk forward"] < found["trunk backward"] < found["trunk forward"]
    assert found["head"] == 2 * 2 * 512 * 640 * 262144
    whole = 6 * 2 * 512 * 512 * 256 * 4 * 18  # six products over whole score matrices
    assert 0.5 * whole < found["attention"] <= whole
    one = matmuls.products(Workload("gemma3-270m", rows=1, length=512, experts=1))
    assert sum(p.flops for p in one if p.part == "experts") < found["experts"] < 0.05 * sum(found.values())


def test_a_ratio_has_its_interval():
    rng = np.random.default_rng(0)
    found = benchmark.ratio(rng.normal(20, 1, 50).tolist(), rng.normal(10, 1, 50).tolist())
    assert found["low"] < found["ratio"] < found["high"]
    assert abs(found["ratio"] - 2) < 0.2
    assert found["high"] - found["low"] < 0.5
    assert benchmark.ratio([3.0], [2.0]) == {"ratio": 1.5, "low": 1.5, "high": 1.5}


@pytest.mark.parametrize("lengths", ["snippets", "mbpp"])
@pytest.mark.parametrize("length", [512, 1024])
def test_padding_stays_low(lengths, length):
    assert ours.padding(Workload("embedded", lengths, 2, length)) < 0.015


def test_contenders_train_the_same_number_of_weights():
    plan = Workload("embedded", length=32)
    mine, theirs = contenders.Ours(plan), contenders.MlxLm(plan)
    assert contenders.trainable(mine) == contenders.trainable(theirs) > 0
    for contender in (mine, theirs, contenders.TwoPass(plan)):
        sample = contender.step()
        assert sample.tokens == 64
        assert sample.seconds > 0


def test_a_small_run(tmp_path):
    out = tmp_path / "found.json"
    done = run(
        *("--size", "embedded", "--length", "64", "--runs", "2", "--only", "step", "padding"),
        *("--contenders", "ours", "mlx-lm", "--json", str(out)),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["machine"]["device"]
    for name in ("ours (with mlx-lm)", "mlx-lm"):
        assert len(found["step"][name]["seconds"]) == 2
        assert found["step"][name]["tokens"] == [128, 128]
        assert min(found["step"][name]["peak"], found["step"][name]["rss"]) > 0
    assert found["step"]["mlx-lm"]["ours_against_it"]["ratio"] > 0
    assert set(found["padding"]) == {"snippets", "mbpp"}
    assert "ours" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [["--runs", "0"], ["--length", "5"], ["--only", "everything"], ["--contenders", "nobody"]],
    ids=" ".join,
)
def test_bad_usage_is_one_line(arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
