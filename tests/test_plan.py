"""python -m dylora_mlx.plan: similarities, decisions, parameters, memory and time, before any training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dylora_mlx import console, plan
from tests.conftest import SMALL


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
            assert plan.main([str(config)]) == 0
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
    sizes = [6 * rank * ((256 + 256) + (256 + 64)) for rank in (8, 4)]
    assert f"2 experts, {sum(sizes)} adapter parameters" in printed
    assert "GB at the peak of a step" in printed
    assert "measured here and now" in printed


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
