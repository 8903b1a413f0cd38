"""Fuzzing of every reader with damaged files: up to 150 seeded executions of each target; and tests of the fuzzer."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from random import Random

import pytest
from fuzzing import campaign, containers, engines, every, mutate, values
from fuzzing.campaign import SearchOptions
from fuzzing.engines import Search
from fuzzing.target import TARGETS, Target, execute

from dylora_mlx.errors import UserError

TOOLS = Path(__file__).parent
RUNS = {
    "config": 12,
    "source": 50,
    "text-folder": 40,
    "parquet": 60,
    "base-config": 60,
    "explain": 60,
    "removed": 60,
    "token-cache": 60,
}
"""Executions of slow targets, by name."""
SLOW = {"report-": 15, "checkpoint-": 40, "xlora-": 50, "runtime-": 50}
"""Executions of slow targets, by prefix of the name."""
USUAL = 150
"""Executions of every other target."""


def runs_of(name: str) -> int:
    """Return the number of executions of a target."""
    return RUNS.get(name, next((runs for start, runs in SLOW.items() if name.startswith(start)), USUAL))


def marked(name: str) -> object:
    """Mark a target that needs torch."""
    return pytest.param(name, marks=pytest.mark.export) if name.startswith("runtime-") else name


@pytest.mark.parametrize("name", [marked(name) for name in TARGETS])
def test_damage_ends_in_a_user_error(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    target = TARGETS[name]
    with campaign.scratch() as work_dir:
        seeds, target_function = target.make(work_dir)
        target_function(seeds[0])
        search = Search(target_function)
        engines.by_outcome(search, target, seeds, runs_of(name), 60, seed=0)
    assert {location: finding for location, (_, finding) in search.findings.items()} == {}
    assert search.executions == max(runs_of(name), len(seeds[: runs_of(name)]))


def test_every_module_of_targets_is_there():
    assert {path.stem for path in (TOOLS / "fuzzing").glob("of_*.py")} == set(every.__all__)
    assert all(target.about.endswith(").") for target in TARGETS.values()), (
        "each docstring names the module that reads the file"
    )


def planted(data: bytes) -> None:
    """A reader with a planted fault: it assumes that `b` is a number."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError("not JSON") from error
    if not isinstance(content, dict) or "b" not in content:
        raise UserError("no b")
    content["b"] + 1


PLANTED = Target("planted", "json", lambda place: ([b'{"a": [1, 2], "b": 3}'], planted), 1)
SEEDS = [b'{"a": [1, 2], "b": 3}']


def test_a_fault_is_found_and_can_be_repeated():
    search = Search(planted)
    engines.by_outcome(search, PLANTED, SEEDS, 2000, 60, seed=1)
    assert any(finding.startswith("TypeError") for _, finding in search.findings.values())
    for location, (data, finding) in search.findings.items():
        outcome = execute(planted, data)
        assert (outcome.location, outcome.finding) == (location, finding)


def test_a_seed_gives_the_same_inputs():
    inputs: list[list[bytes]] = []
    for seed in (3, 3, 4):
        inputs.append([])
        engines.by_outcome(Search(planted, inputs[-1].append), PLANTED, SEEDS, 300, 60, seed)
    assert inputs[0] == inputs[1] != inputs[2]


@pytest.mark.parametrize("form", [*mutate.FORMS, "text"])
def test_mutated_files_differ_and_are_not_too_large(form, tmp_path, monkeypatch):
    arrays = {"a": ("F32", [2, 2], bytes(16)), "b": ("BF16", [3], bytes(6))}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    npz = TARGETS["token-cache"].make(tmp_path)[0][0]
    data = {"safetensors": containers.write_safetensors(arrays, {"format": "pt"}), "npz": npz}.get(form, SEEDS[0])
    rng = Random(0)
    mutants = [mutate.mutated(data, form, rng, data, ["a", "b"]) for _ in range(300)]
    assert len({*mutants} - {data}) > 150
    assert max(map(len, mutants)) <= mutate.LARGEST


def test_values_keep_a_tree_that_json_can_write():
    rng = Random(0)
    for _ in range(500):
        tree = values.change(json.loads(SEEDS[0]), rng, {"c": [{"d": 1}]}, ["a"])
        assert isinstance(values.encode(tree, rng), bytes)


def test_arrays_survive_our_own_writer():
    arrays = {"a": ("F32", [2, 1], struct.pack("<2f", 1.0, 2.0)), "c": ("U8", [], b"\7")}
    assert containers.read_safetensors(containers.write_safetensors(arrays, {"x": "y"})) == (arrays, {"x": "y"})


CRASH = """
import os, sys
sys.path.insert(0, {tools!r})
from fuzzing.campaign import Box
from pathlib import Path
box = Box(Path(next(a for a in sys.argv if a.startswith("--box=")).removeprefix("--box=")))
box.note(b"harmless")
box.note(b"deadly")
os._exit({code})
"""


@pytest.mark.parametrize("code", [0, 3])
def test_a_process_that_dies_leaves_its_input(tmp_path, code):
    script = tmp_path / "crash.py"
    script.write_text(CRASH.format(tools=str(TOOLS), code=code))
    options = SearchOptions(2, 60.0, "random", tmp_path / "corpus", 0)
    options.corpus.mkdir()
    result = campaign.search("decision-log", options, [sys.executable, str(script)])
    assert result.executions == 2
    if code == 0:
        assert result.findings == []
    else:
        [(path, description)] = result.findings
        assert path.read_bytes() == b"deadly"
        assert description == "the process ends with 3"
        second_result = campaign.search("decision-log", options, [sys.executable, str(script)])
        assert second_result.findings == result.findings, "a finding that occurs again is reported again"


@pytest.mark.slow
def test_the_command_searches_in_child_processes(tmp_path, capfd):
    from tests.exporting.mixtures import tool

    fuzz = tool("fuzz")
    options = ["decision-log", "rank-schedule", "--runs", "40", "--engine", "random", "--corpus", str(tmp_path)]
    assert fuzz.main([*options, "--table"]) == 0
    output = capfd.readouterr().out
    assert "80 executions of 2 targets by random: 0 findings" in output
    assert (
        "| target | executions | a second | findings |\n| --- | ---: | ---: | ---: |\n| `decision-log` | 40 |" in output
    )
