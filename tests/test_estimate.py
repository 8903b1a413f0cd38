"""dylora estimate: counts are those of a real run, bytes and memory near it; no time is asserted."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import pytest

from dylora_mlx import estimate, train
from dylora_mlx.growth.decide import decision_log
from dylora_mlx.run import metadata, run_folder
from dylora_mlx.run.cost import calibrate, memory, tables
from dylora_mlx.run.cost import estimate as estimates
from dylora_mlx.run.cost.estimate import estimate_run
from dylora_mlx.system import console
from dylora_mlx.training.checkpoint import retention
from dylora_mlx.training.metrics.timers import OTHER
from dylora_mlx.training.skill import base_pass as study
from dylora_mlx.training.skill.base_pass import iterate_states
from dylora_mlx.training.step.evaluate import Evaluator
from tests.bases import config_of, quantised, write
from tests.conftest import start

NEW = """
skills: [{name: requests, source: DATA/requests, limit: 20}, {name: sql, source: DATA/sql, limit: 20, rank: 4}]
growth: {base_skill: null, threshold: 1.0, policy: threshold, split: false, min_samples: 8, min_tokens: 100, bootstrap: 50,
  acceptance: always}
data: {max_seq_length: 256}
training: {epochs: 2, steps_per_eval: 2, save_every: 2, memory_tokens: 128, router_fit_steps: 10, patience: 99,
  keep_checkpoints: 20}
log: {steps_per_report: 1}
"""
"""A stream whose skills are all new."""


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Hardly any timing, on whole rows however slow the machine is: what is counted does not depend on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "SECONDS", 0.1)
        patch.setattr(calibrate, "LONGEST", 1e9)
        yield


@pytest.fixture(scope="module")
def made(short_skills, tmp_path_factory):
    """A folder with a run that was estimated before it began, and what was seen while it was made: rows that the base
    read, rows that were evaluated; and bytes that were held before. On the embedded base: on a small one most of the memory
    is what lanes hold at a moment, which differs from run to run."""
    folder, seen = tmp_path_factory.mktemp("estimated"), {"rows": 0, "evaluated": 0}
    gc.collect()
    seen["held"] = mx.get_active_memory()
    passes, evaluate_batches = iterate_states, Evaluator.evaluate_batches

    def counted(model, batches):
        seen["rows"] += sum(len(batch.inputs) for batch in batches)
        return passes(model, batches)

    def evaluated(evaluator, batches, *rest):
        seen["evaluated"] += sum(len(batch.inputs) for batch in batches)
        return evaluate_batches(evaluator, batches, *rest)

    def calibrate_first(*given):
        samples = real(*given)
        patch.setattr(study, "iterate_states", counted)
        patch.setattr(Evaluator, "evaluate_batches", evaluated)
        return samples

    with pytest.MonkeyPatch.context() as patch, console.console.capture() as caught:
        real = calibrate.calibrate
        patch.setattr(estimates, "calibrate", calibrate_first)
        text = NEW.replace("DATA", str(short_skills))
        assert train.main(start(folder, text, "--estimate", base="embedded")) == 0
    return folder / "small", seen, caught.get()


@pytest.fixture(scope="module")
def described(made) -> dict:
    return json.loads((made[0] / "run.json").read_text())


def phase(found: dict, name: str) -> dict:
    return next(each for each in found["phases"] if each["phase"] == name)


def test_counts_are_those_of_the_run(made, described):
    folder, seen, _ = made
    estimated, taken = described["estimate"], described["resources"]
    trainer = json.loads((folder / "checkpoints/final/trainer.json").read_text())
    assert phase(estimated, "steps")["amount"] == taken["steps"] == trainer["step"]
    assert phase(estimated, "steps")["flops"] == trainer["flops"]
    assert phase(estimated, "reading")["amount"] == seen["rows"]
    # At most: the last evaluation of a skill may be true of the state that it keeps.
    watched = sum(each["tokens"] for each in json.loads((folder / "results.json").read_text())["validation"].values())
    assert 0 <= phase(estimated, "evaluations")["amount"] - seen["evaluated"] <= watched / 256 + 2
    assert phase(estimated, "router")["amount"] == len(decision_log.read_decisions(folder)) == 2


def test_bytes_are_those_of_the_run(made, described):
    folder, _, _ = made
    estimated = described["estimate"]
    folders = retention.all_checkpoints(folder)
    # What a checkpoint writes is what it adds to those before it.
    totals = [retention.bytes_of(folders[:number]) for number in range(len(folders) + 1)]
    assert estimated["disk"]["checkpoints"] == pytest.approx(totals[-1], rel=0.05)
    largest = max(after - before for before, after in pairwise(totals))
    assert estimated["meanwhile"]["a checkpoint that is written"] == pytest.approx(largest, rel=0.05)
    assert sum(estimated["disk"].values()) == pytest.approx(described["resources"]["disk"], rel=0.1)


def test_memory_is_near_that_of_the_run(made, described):
    # What other tests held before the run was freed while it went on, or was not.
    peak, held = described["resources"]["memory"], made[1]["held"]
    assert 0.75 * (peak - held) <= sum(described["estimate"]["memory"].values()) <= 1.25 * peak


def test_the_process_is_counted_beside_the_arrays(described):
    """What MLX and malloc keep of freed memory, and Python with its libraries and the data."""
    parts, activations = (
        described["estimate"]["process"],
        described["estimate"]["memory"]["activations of the largest pass"],
    )
    assert parts["buffers that MLX keeps for reuse"] == 32 << 20
    assert parts["between malloc's blocks"] == memory.MALLOC_BYTES + round(memory.MALLOC_SHARE * activations)
    assert parts["Python, libraries, tokenizer, data"] >= memory.PYTHON_BYTES


def test_an_estimate_of_an_earlier_version_has_no_process(described):
    """It is printed without that row, as is a run that did not record it."""
    now, taken = described["estimate"], described["resources"]
    earlier = {name: value for name, value in now.items() if name != "process"}
    assert estimates.valid_estimate(now) == now
    assert estimates.valid_estimate(earlier) == earlier | {"process": {}}
    for given, used in ((earlier | {"process": {}}, taken), (now, taken | {"resident": 0})):
        with console.console.capture() as caught:
            tables.print_comparison(given, now["phases"], used)
        printed = caught.get()
        assert "MLX's peak" in printed
        assert "process" not in printed


PROCESS = """
import sys
from itertools import pairwise
from dylora_mlx import train
from dylora_mlx.run.cost import calibrate

calibrate.SECONDS = calibrate.LONGEST = 0.0  # the shortest rows are timed
sys.exit(train.main(sys.argv[1:]))
"""


def test_the_process_takes_what_was_estimated(short_skills, tmp_path):
    """In a process of its own, whose peak is that of its whole life. The activations are those of one row times the rows."""
    text = NEW.replace("DATA", str(short_skills)).replace("epochs: 2", "epochs: 1, max_steps: 2")
    arguments = start(tmp_path, text, "--estimate", "--quiet", base="embedded")
    subprocess.run([sys.executable, "-c", PROCESS, *arguments], check=True, cwd=Path(__file__).parent.parent)
    found = json.loads((tmp_path / "small/run.json").read_text())
    arrays, process = (sum(found["estimate"][name].values()) for name in ("memory", "process"))
    assert found["estimate"]["sizes"]["step"] != [1, 256]
    assert found["resources"]["memory"] == pytest.approx(arrays, rel=0.25)
    assert found["resources"]["resident"] == pytest.approx(arrays + process, rel=0.2)
    assert found["resources"]["resident"] > found["resources"]["memory"] + memory.PYTHON_BYTES / 2


def test_experts_in_files_are_counted_once(short_skills, tmp_path):
    """As checkpoints link to them."""
    text = NEW.replace("DATA", str(short_skills)) + "model: {expert_memory_mb: 1}\n"
    assert train.main(start(tmp_path, text, "--quiet")) == 0
    run, taken = run_folder.reopen_finished(tmp_path / "small")
    found = estimate_run(run)
    assert metadata.folder_size(tmp_path / "small" / "checkpoints") == pytest.approx(
        found["disk"]["checkpoints"], rel=0.05
    )
    assert taken["disk"] == pytest.approx(sum(found["disk"].values()), rel=0.1)


def test_the_estimate_stands_beside_the_truth(made, described):
    printed, taken = made[2], described["resources"]
    assert "what the run would take" in printed
    total = sum((described["estimate"]["memory"] | described["estimate"]["process"]).values())
    assert f"memory: the process takes {tables._format_bytes(total)} at the peak (base 20.0 MB, " in printed
    beside = printed[printed.index("the estimate beside the truth") :]
    steps = next(line for line in beside.splitlines() if line.startswith("│ steps") and " s " not in line)
    assert [cell.strip() for cell in steps.split("│")[2:6]] == [str(taken["steps"])] * 3 + ["1.00"]
    process = next(line for line in beside.splitlines() if line.startswith("│ process"))
    assert [cell.strip() for cell in process.split("│")[2:6]] == [
        tables._format_bytes(total), "", tables._format_bytes(taken["resident"]), f"{total / taken['resident']:.2f}"
    ]  # fmt: skip
    assert {"reading", "evaluations", "steps", "router", "checkpoints", OTHER} <= taken["seconds"].keys()


def test_a_run_that_is_finished_is_estimated_beside_it(made, described, capsys):
    assert estimate.main([str(made[0]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["resources"] == described["resources"]
    assert phase(found, "steps") == pytest.approx(
        {**phase(described["estimate"], "steps"), "seconds": pytest.approx(0, abs=1e9)}
    )
    assert [each["amount"] for each in found["as_decided"]] == [each["amount"] for each in found["phases"]]


def test_a_base_of_four_bits(short_skills, tmp_path, capsys):
    """Weights are counted as they are held, and operations as of the full base."""
    full = write(tmp_path / "full", config_of("gemma3"))
    (tmp_path / "new.yaml").write_text(NEW.replace("DATA", str(short_skills)))
    found = {}
    for folder in (full, quantised(full, tmp_path / "packed", 4)):
        assert estimate.main([str(tmp_path / "new.yaml"), "--model.base", str(folder), "--json"]) == 0
        found[folder.name] = json.loads(capsys.readouterr().out.splitlines()[-1])
    weights = (full / "model.safetensors").stat().st_size
    assert found["full"]["memory"]["base"] == pytest.approx(weights, rel=0.02)
    assert found["packed"]["memory"]["base"] < 0.3 * weights
    assert phase(found["packed"], "steps")["flops"] == phase(found["full"], "steps")["flops"]
    assert not (tmp_path / "runs").exists()
