"""python -m dylora_mlx.plan: similarities, decisions, parameters, memory and time, before any training."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dylora_mlx import plan, train
from dylora_mlx.run import forecast
from dylora_mlx.run.cost import memory
from dylora_mlx.system import console
from tests.conftest import SMALL, SMALL_BASE, start

REFINED = """
skills: [{name: requests, source: DATA/requests, limit: 20}, {name: requests_more, source: DATA/requests_more, limit: 20}]
growth: {base_skill: null, bootstrap: 50, min_samples: 8, min_tokens: 100, epsilon: 9.0, policy: threshold}
data: {max_seq_length: 256}
training: {grad_accumulation_steps: 1, epochs: 2, steps_per_eval: 1000, memory_tokens: 128, router_fit_steps: 10}
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> str:
    """What a plan of the small stream prints; nothing is written."""
    folder = tmp_path_factory.mktemp("plan")
    config = folder / "small.yaml"
    config.write_text(SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(console.console, "_width", 200)
        with console.console.capture() as caught:
            assert plan.main([str(config), "--model.base", str(SMALL_BASE)]) == 0
    assert [path.name for path in folder.iterdir()] == ["small.yaml"]
    return " ".join(caught.get().split())


def test_the_plan_is_what_the_run_does(printed, finished):
    for line in (finished / "decisions.jsonl").read_text().splitlines():
        found = json.loads(line)
        assert f"│ {found['action']} -> {found['expert']}" in printed
        assert f"{found['score']:.3f}" in printed
        for value in found["similarities"].values():
            assert f"{value:.3f}" in printed


def test_parameters_memory_and_time(printed):
    attention, mlp = 2 * (64 + 64) + 2 * (64 + 32), 3 * (64 + 160)
    sizes = [2 * rank * (attention + mlp) for rank in (8, 4)]
    assert f"2 experts, {sum(sizes)} adapter parameters" in printed
    process, arrays = map(
        float, re.search(r"the process takes (\S+) GB at the peak of a step, MLX's arrays (\S+) GB", printed).groups()
    )
    assert process > arrays + (memory.PYTHON_BYTES + memory.MALLOC_BYTES) / 1e9 - 0.01
    assert "measured here and now" in printed


def test_steps_are_those_that_the_run_makes(short_skills, tmp_path, monkeypatch):
    """A refinement replays documents of the expert's earlier skills, which are steps too."""
    assert train.main(start(tmp_path, REFINED.replace("DATA", str(short_skills)))) == 0
    lines = (tmp_path / "small" / "decisions.jsonl").read_text().splitlines()
    decisions, planned = [json.loads(line) for line in lines], []
    monkeypatch.setattr(forecast, "measure_cost", lambda *_: forecast.MeasuredCost(1.0, 1.0, 1, 1))
    monkeypatch.setattr(forecast, "print_decisions", lambda *given: planned.extend(given[3]))
    assert plan.main([str(tmp_path / "small.yaml"), "--model.base", str(SMALL_BASE)]) == 0
    assert [found["action"] for found in decisions] == ["create", "refine"]
    assert planned == [found["outcome"]["steps"] for found in decisions]
    assert planned[1] > planned[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["nothing.yaml"], "no such config file"), (["--resume", "runs/x"], "unrecognized arguments: --resume")],
)
def test_mistakes_get_one_line(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert plan.main(argv) == 2
    found = capsys.readouterr()
    assert message in found.err
    assert found.err.count("\n") == 1
    assert not list(Path(tmp_path).iterdir())
