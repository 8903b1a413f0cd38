"""tools/benchmarks/benchmark.py: workloads, FLOP and byte counts, statistics, and one small run."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.conftest import SMALL_BASE

TOOLS = Path(__file__).parents[2] / "tools/benchmarks"

import benchmark  # noqa: E402
from benchmarking import contenders, decoding, matmuls, ours, ratios, serving, whole_run, workload  # noqa: E402
from benchmarking.workload import Workload  # noqa: E402


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(TOOLS / "benchmark.py"), *arguments], capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("lengths", ["snippets", "mbpp"])
def test_documents_are_as_long_as_real_ones(lengths):
    deciles, learned = workload.DECILES[lengths]
    documents = workload.documents(Workload("embedded", lengths), 2000)
    sizes = np.array([len(tokens) - 1 for tokens, _ in documents])
    assert deciles[0] <= sizes.min()
    assert sizes.max() <= deciles[-1]
    assert abs(np.median(sizes) - deciles[5]) < 3
    prompts = np.array([prompt for _, prompt in documents])
    assert abs(1 - prompts.sum() / sizes.sum() - learned) < 0.01


def test_full_documents_fill_rows():
    assert {len(tokens) for tokens, _ in workload.documents(Workload("embedded", "full", length=64), 5)} == {65}


def test_counted_flops_of_training():
    """A forward pass takes two operations per weight and token, a backward pass at most as many."""
    plan = Workload("gemma3-270m", rows=1, length=512, experts=4)
    flops: dict[str, int] = {}
    for product in matmuls.products(plan):
        flops[product.part] = flops.get(product.part, 0) + product.flops
    block = 640 * 256 * (2 * 4 + 2 * 1) + 3 * 640 * 2048
    assert flops["trunk forward"] == 2 * 512 * 18 * block
    assert 0.95 * flops["trunk forward"] < flops["trunk backward"] < flops["trunk forward"]
    assert flops["head"] == 2 * 2 * 512 * 640 * 262144
    full_attention = 6 * 2 * 512 * 512 * 256 * 4 * 18  # six products over whole score matrices
    assert 0.5 * full_attention < flops["attention"] <= full_attention
    single_expert = matmuls.products(Workload("gemma3-270m", rows=1, length=512, experts=1))
    assert sum(p.flops for p in single_expert if p.part == "experts") < flops["experts"] < 0.05 * sum(flops.values())


def test_counted_generation():
    """Each token reads every weight once, and the trunk's twice if the router reads final states."""
    plan = Workload("gemma3-270m", experts=4)
    base = serving.counted(plan, "base")
    trunk, head = 18 * (640 * 256 * (2 * 4 + 2 * 1) + 3 * 640 * 2048), 640 * 262144
    assert trunk + head < base["flops"] / 2 < 1.03 * (trunk + head)
    width = base["bytes"] / (trunk + head)
    assert 2 <= width < 2.1 or 4 <= width < 4.1
    assert serving.counted(plan, "prompt-routed") == base
    ratios = {name: serving.counted(plan, name)["bytes"] / base["bytes"] for name in decoding.WAYS}
    assert 1 + trunk / (trunk + head) < ratios["final states, dense"] < 1.42
    assert 1 < ratios["inner layer, dense"] < 1.02
    assert ratios["final states, dense"] == ratios["final states, top-3"]
    longer = serving.counted(Workload("gemma3-270m", experts=4, prompt=2000), "base")
    assert base["bytes"] < longer["bytes"] < 1.1 * base["bytes"]


def test_each_way_of_decoding_continues_its_text():
    contender = decoding.Decoding(Workload("embedded", experts=4, prompt=6))
    texts: dict[str, list[int]] = {name: [] for name in decoding.WAYS}
    for name in decoding.WAYS:
        assert contender.begin(name) > 0
    for _ in range(2):
        for name, text in texts.items():
            seconds, tokens = contender.proceed(name, 4)
            assert seconds > 0
            text += tokens
    assert len({tuple(text) for text in texts.values()}) == len(texts)
    for name, text in texts.items():
        contender.begin(name)
        assert contender.proceed(name, 8)[1] == text, "other texts in between change nothing"


def test_a_ratio_has_its_interval():
    rng = np.random.default_rng(0)
    interval = benchmark.ratio(rng.normal(20, 1, 50).tolist(), rng.normal(10, 1, 50).tolist())
    assert interval["low"] < interval["ratio"] < interval["high"]
    assert abs(interval["ratio"] - 2) < 0.2
    assert interval["high"] - interval["low"] < 0.5
    assert benchmark.ratio([3.0], [2.0]) == {"ratio": 1.5, "low": 1.5, "high": 1.5}


def test_a_paired_ratio_cancels_drift():
    rng, drift = np.random.default_rng(0), np.linspace(1, 5, 60)
    interval = ratios.paired((2 * drift * rng.normal(1, 0.02, 60)).tolist(), drift.tolist())
    assert interval["low"] < interval["ratio"] < interval["high"]
    assert abs(interval["ratio"] - 2) < 0.03
    assert interval["high"] - interval["low"] < 0.05


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
    process = run(
        *("--size", "embedded", "--length", "64", "--runs", "2", "--only", "step", "padding"),
        *("--contenders", "ours", "mlx-lm", "--json", str(out)),
    )
    assert process.returncode == 0, process.stderr
    results = json.loads(out.read_text())
    assert results["machine"]["device"]
    for name in ("ours (with mlx-lm)", "mlx-lm"):
        assert len(results["step"][name]["seconds"]) == 2
        assert results["step"][name]["tokens"] == [128, 128]
        assert min(results["step"][name]["peak"], results["step"][name]["rss"]) > 0
    assert results["step"]["mlx-lm"]["ours_against_it"]["ratio"] > 0
    assert set(results["padding"]) == {"snippets", "mbpp"}
    assert "ours" in process.stdout


def test_a_small_run_of_generation(tmp_path):
    out = tmp_path / "found.json"
    options = ("--size", "embedded", "--only", "decode", "--runs", "2", "--prompt", "8", "--tokens", "4")
    process = run(*options, "--json", str(out))
    assert process.returncode == 0, process.stderr
    results = json.loads(out.read_text())["decode"]
    assert set(results) == set(decoding.WAYS)
    for way, measured in results.items():
        assert len(measured["seconds"]) == len(measured["prompt"]) == 2, "a turn of four tokens for each text"
        assert measured["counted"]["ratio"] >= 1
        assert way in process.stdout
    assert results["base"]["counted"]["ratio"] == results["base"]["time_against_base"]["ratio"] == 1


def test_a_whole_run_and_mlx_lms_trainer_learn_the_same_documents(monkeypatch):
    monkeypatch.setattr(whole_run, "SKILLS", ("requests", "sql"))
    seen: dict[str, list] = {"train": [], "evaluate": []}
    train, evaluate = whole_run.train, whole_run.evaluate

    def trained(model, optimizer, training, validation, args):
        seen["train"] += [len(training), len(validation), args.iters, -(-args.iters // args.steps_per_eval)]
        train(model, optimizer, training, validation, args)

    def evaluated(model, test, *rest):
        seen["evaluate"].append(len(test))
        return evaluate(model, test, *rest)

    monkeypatch.setattr(whole_run, "train", trained)
    monkeypatch.setattr(whole_run, "evaluate", evaluated)
    results = whole_run.measure(str(SMALL_BASE), 256, 32, 1)
    documents, held_out, iterations, evaluations = seen["train"]
    assert 2 * 32 <= documents <= 3 * 32, "a document longer than a row is cut"
    assert (iterations, evaluations) == (documents // 4, 2), "after each skill, and mlx-lm's one before the first step"
    assert held_out >= 3 * 16, "the base's own text too"
    assert seen["evaluate"][0] >= 3 * 16
    assert results["ratios"]["seconds"]["ratio"] == pytest.approx(
        results["ours"][0]["seconds"] / results["mlx-lm"][0]["seconds"]
    )
    assert {"evaluations", "reading", "steps", "report"} <= results["ours"][0]["parts"].keys()
    assert results["experts"] in (1, 2)
    shown = Console(width=200, file=io.StringIO())
    shown.print(whole_run.table(results))
    assert "ours / mlx-lm: " in shown.file.getvalue()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--runs", "0"],
        ["--length", "5"],
        ["--only", "everything"],
        ["--documents", "8"],
        ["--contenders", "nobody"],
        ["--tokens", "1"],
    ],
    ids=" ".join,
)
def test_bad_usage_is_refused_in_one_line(arguments):
    process = run(*arguments)
    assert process.returncode == 2
    assert "Traceback" not in process.stderr
