"""Non-finite updates are skipped, counted and saved; too many in a row stop the run at its last good state."""

from __future__ import annotations

import itertools
import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from dylora_mlx import train
from dylora_mlx.config import TrainingConfig
from dylora_mlx.training import health
from dylora_mlx.training.step.step import Step
from tests.conftest import start

STREAM = """
skills: [{name: sql, source: SQL}]
growth: {base_skill: null}
data: {max_seq_length: 256}
training: {grad_accumulation_steps: 1, max_steps: 6, steps_per_eval: 3, memory_tokens: 128, save_every: 2}
log: {steps_per_report: 1}
"""


def poison_steps(monkeypatch, bad: set[int]) -> list[int]:
    """Make the gradients of some steps, counted from 1, not finite; return a list with one item per step."""
    original, calls = Step.__call__, []

    def call(self, batches, *rest):
        calls.append(1)
        if len(calls) in bad:
            batches = [batch._replace(weights=batch.weights * mx.inf) for batch in batches]
        return original(self, batches, *rest)

    monkeypatch.setattr(Step, "__call__", call)
    return calls


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_nonfinite_update_is_skipped(short_skills, tmp_path, monkeypatch, capsys):
    calls, after = poison_steps(monkeypatch, {2, 4}), []
    check = health.skip_nonfinite_update

    def spied(run, outcome, batches, step, snapshot):
        check(run, outcome, batches, step, snapshot)
        after.append([mx.array(value) for value in dict(tree_flatten(run.model.trainable_parameters())).values()])

    monkeypatch.setattr(health, "skip_nonfinite_update", spied)
    assert train.main(start(tmp_path, STREAM.replace("SQL", str(short_skills / "sql")))) == 0
    assert len(calls) == 6
    same = [all(mx.array_equal(a, b).item() for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(after)]
    assert same == [True, False, True, False, False], "updates 2 and 4 changed nothing"
    assert all(mx.isfinite(value).all().item() for value in after[-1])
    folder = tmp_path / "small"
    assert [r["skipped_update"] for r in records(folder) if "skipped_update" in r] == [1, 2]
    saved = sorted(path.name for path in (folder / health.SKIPPED_FOLDER).iterdir())
    assert saved == ["step-000002.safetensors", "step-000004.safetensors"]
    batch = mx.load(str(folder / health.SKIPPED_FOLDER / saved[0]))
    assert isinstance(batch, dict)
    assert batch["0.inputs"].dtype == mx.int32
    err = " ".join(capsys.readouterr().err.split())
    assert "step 2: loss" in err
    assert "the update is left out" in err
    trainer = json.loads((folder / "checkpoints" / "final" / "trainer.json").read_text())
    assert (trainer["skipped"], trainer["skipped_in_row"]) == (2, 0)


def test_too_many_in_a_row_end_the_run(short_skills, tmp_path, monkeypatch, capsys):
    poison_steps(monkeypatch, {3, 4, 5, 6})
    text = STREAM.replace("SQL", str(short_skills / "sql")).replace("max_steps: 6", "max_steps: 6, max_skipped: 3")
    assert train.main(start(tmp_path, text)) == 1
    err = " ".join(capsys.readouterr().err.split())
    assert "failed: 3 updates in a row were not finite" in err
    assert "Traceback" not in err
    assert "training.learning_rate" in err
    folder = tmp_path / "small"
    assert (folder / "checkpoints" / "step-000002").is_dir()
    monkeypatch.undo()
    assert train.main(["--resume", str(folder)]) == 0, "without the cause it continues from the last good state"


def test_the_number_of_saved_batches_is_limited(tmp_path):
    from types import SimpleNamespace

    run = SimpleNamespace(folder=tmp_path, state=SimpleNamespace(step=0))
    batch = SimpleNamespace(inputs=mx.zeros((1, 2)), targets=mx.zeros(2), weights=mx.zeros(2))
    for step in range(health.MAX_KEPT_BATCHES):
        run.state.step = step
        assert health._save_batch(run, [batch]).endswith(f"step-{step + 1:06d}.safetensors")
    assert health._save_batch(run, [batch]).startswith(f"not saved, {health.MAX_KEPT_BATCHES} are in")
    assert len(list((tmp_path / health.SKIPPED_FOLDER).iterdir())) == health.MAX_KEPT_BATCHES


def test_max_skipped_is_validated():
    with pytest.raises(ValueError, match="max_skipped: 0 is not at least 1"):
        TrainingConfig(max_skipped=0)
