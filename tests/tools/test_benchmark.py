"""tools/benchmarks/benchmark.py: its workloads, its counts, its statistics, and one small run of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TOOLS = Path(__file__).parents[2] / "tools/benchmarks"

import benchmark  # noqa: E402
from benchmarking import contenders, decoding, matmuls, ours, ratios, serving, workload  # noqa: E402
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


def test_counted_generation():
    """Against the parameters: a token reads every weight once, the trunk's twice where the router reads final states."""
    plan = Workload("gemma3-270m", experts=4)
    base = serving.counted(plan, "base")
    trunk, head = 18 * (640 * 256 * (2 * 4 + 2 * 1) + 3 * 640 * 2048), 640 * 262144
    assert trunk + head < base["flops"] / 2 < 1.03 * (trunk + head)
    width = base["bytes"] / (trunk + head)
    assert 2 <= width < 2.1 or 4 <= width < 4.1
    assert serving.counted(plan, "prompt-routed") == base
    ratios = {name: serving.counted(plan, name)["bytes"] / base["bytes"] for name in decoding.WAYS}
    assert 1 + trunk / (trunk + head) < ratios["final states, dense"] < 1.4
    assert 1 < ratios["inner layer, dense"] < 1.01
    assert ratios["final states, dense"] == ratios["final states, top-3"]
    longer = serving.counted(Workload("gemma3-270m", experts=4, prompt=2000), "base")
    assert base["bytes"] < longer["bytes"] < 1.1 * base["bytes"]


def test_every_way_to_serve_writes_its_own_text():
    contender = decoding.Decoding(Workload("embedded", experts=4, prompt=6))
    texts: dict[str, list[int]] = {name: [] for name in decoding.WAYS}
    for name in decoding.WAYS:
        assert contender.begin(name) > 0
    for _ in range(2):
        for name, text in texts.items():
            seconds, found = contender.proceed(name, 4)
            assert seconds > 0
            text += found
    assert len({tuple(text) for text in texts.values()}) == len(texts)
    for name, text in texts.items():
        contender.begin(name)
        assert contender.proceed(name, 8)[1] == text, "whoever else had a turn in between"


def test_a_ratio_has_its_interval():
    rng = np.random.default_rng(0)
    found = benchmark.ratio(rng.normal(20, 1, 50).tolist(), rng.normal(10, 1, 50).tolist())
    assert found["low"] < found["ratio"] < found["high"]
    assert abs(found["ratio"] - 2) < 0.2
    assert found["high"] - found["low"] < 0.5
    assert benchmark.ratio([3.0], [2.0]) == {"ratio": 1.5, "low": 1.5, "high": 1.5}


def test_a_paired_ratio_knows_no_drift():
    rng, drift = np.random.default_rng(0), np.linspace(1, 5, 60)
    found = ratios.paired((2 * drift * rng.normal(1, 0.02, 60)).tolist(), drift.tolist())
    assert found["low"] < found["ratio"] < found["high"]
    assert abs(found["ratio"] - 2) < 0.03
    assert found["high"] - found["low"] < 0.05


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


def test_a_small_run_of_generation(tmp_path):
    out = tmp_path / "found.json"
    options = ("--size", "embedded", "--only", "decode", "--runs", "2", "--prompt", "8", "--tokens", "4")
    done = run(*options, "--json", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["decode"]
    assert set(found) == set(decoding.WAYS)
    for way, measured in found.items():
        assert len(measured["seconds"]) == len(measured["prompt"]) == 2, "a turn of four tokens for each text"
        assert measured["counted"]["ratio"] >= 1
        assert way in done.stdout
    assert found["base"]["counted"]["ratio"] == found["base"]["time_against_base"]["ratio"] == 1


@pytest.mark.parametrize(
    "arguments",
    [["--runs", "0"], ["--length", "5"], ["--only", "everything"], ["--contenders", "nobody"], ["--tokens", "1"]],
    ids=" ".join,
)
def test_bad_usage_is_one_line(arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
