"""Replay, distillation, expert capacity and partial freezing, each in a small run from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx import generate, train
from dylora_mlx.errors import UserError
from dylora_mlx.export import command as export_run
from dylora_mlx.exporting.folder import read_manifest
from dylora_mlx.model.decoder.attention import packed_masks
from dylora_mlx.model.routing import router
from dylora_mlx.run import run_folder
from dylora_mlx.training import summary
from dylora_mlx.training.skill import learn
from tests.conftest import start
from tests.test_train import timeless

TWO = """
skills:
  - {name: requests, source: DATA/requests}
  - {name: sql, source: DATA/sql}
growth: {base_skill: {name: python, source: DATA/python}, dense_steps: 1, anneal_steps: 1, top_k: 1, bootstrap: 100}
data: {max_seq_length: 256}
training:
  {grad_accumulation_steps: 1, epochs: 4, max_steps: 4, steps_per_eval: 2, save_every: 2, memory_tokens: 256,
   keep_checkpoints: 20}
log: {steps_per_report: 1}
"""
EVERYTHING = (
    "replay_coef: 0.5, distillation_coef: 0.5, entropy_coef: 0.02, load_balance_coef: 0.01, capacity_factor: 1.25, "
    "replay_tokens: 600"
)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def start_arguments(folder: Path, data: Path) -> list[str]:
    text = (
        TWO.replace("DATA", str(data))
        .replace("max_steps: 4", f"max_steps: 4, {EVERYTHING}")
        .replace("growth: {", "growth: {min_gate: 0.2, ")
    )
    return start(folder, text)


@pytest.fixture(scope="module")
def replayed(tmp_path_factory, short_skills) -> Path:
    folder = tmp_path_factory.mktemp("replayed")
    assert train.main(start_arguments(folder, short_skills)) == 0
    return folder / "small"


def test_every_loss_term_is_logged(replayed):
    steps = [record for record in metrics(replayed) if "train_loss" in record]
    assert len(steps) == 8
    weights = {"lm_loss": 1, "load_balance_loss": 0.01, "entropy_loss": 0.02, "z_loss": 1e-4, "rehearsal_loss": 0.5,
               "replay_loss": 0.5, "distillation_loss": 0.5}  # fmt: skip
    for record in steps:
        assert record["train_loss"] == pytest.approx(sum(w * record[name] for name, w in weights.items()), abs=1e-4)
        assert record["replay_loss"] > 1, "the base skill's text is replayed from the first skill on"
        assert record["top_k"] == 1 or record["entropy_loss"] > 0, (
            "with one expert per token only min_gate leaves entropy"
        )
    distillation = [record["distillation_loss"] for record in steps]
    assert max(distillation) > 1e-4
    assert max(distillation) < 0.5
    assert min(distillation) > -1e-4


def test_a_resumed_run_distils_from_the_same_teacher(replayed, short_skills, tmp_path, monkeypatch):
    """The second skill is stopped after its checkpoint: the distillation teacher must be restored with it."""
    train_step, calls = learn.train_step, []

    def stopping(*arguments):
        calls.append(train_step(*arguments))
        if len(calls) == 7:
            raise KeyboardInterrupt
        return calls[-1]

    monkeypatch.setattr(learn, "train_step", stopping)
    assert train.main(start_arguments(tmp_path, short_skills)) == 130
    monkeypatch.setattr(learn, "train_step", train_step)
    assert (tmp_path / "small/checkpoints/step-000006/teacher_gate.safetensors").is_file()
    assert train.main(["--resume", str(tmp_path / "small")]) == 0
    ours, theirs = (p / "checkpoints/final/MANIFEST.json" for p in (tmp_path / "small", replayed))
    assert json.loads(ours.read_text()) == json.loads(theirs.read_text())
    assert timeless(tmp_path / "small") == timeless(replayed)


def test_projections_freeze_before_the_rest(short_skills, tmp_path, capsys):
    """The loss improves no more after two steps, so q_proj freezes after two more evaluations; v_proj still trains."""
    text = "\n".join(line for line in TWO.replace("DATA", str(short_skills)).splitlines() if "sql" not in line)
    text = text.replace("max_steps: 4", "max_steps: 8, patience: 4, min_improvement: 0.02")
    text = text.replace("steps_per_eval: 2", "steps_per_eval: 1").replace("growth: {", "growth: {freeze_after: 2, ")
    text += "\nmodel: {projections: [q_proj, v_proj]}\n"
    assert train.main(start(tmp_path, text)) == 0
    out = capsys.readouterr().out
    assert "q_proj frozen at step 4: 2 evaluations without improvement" in out
    assert "stopped at step 6" in out
    records = metrics(tmp_path / "small")
    assert [r["step"] for r in records if "frozen_projections" in r] == [4]
    trainable = {r["step"]: r["trainable_params"] for r in records if "trainable_params" in r}
    assert trainable[5] < trainable[4] == trainable[3]
    record = json.loads((tmp_path / "small/results.json").read_text())["experts"][0]
    assert (record["phase"], record["frozen"], record["frozen_projections"]) == ("frozen", True, ["q_proj"])


def test_a_router_with_document_means(short_skills, tmp_path, capsys):
    """Training, generation and export use the same router input: remembered features include the document mean."""
    text = TWO.replace("DATA", str(short_skills)) + "model: {document_mean_weight: 0.6}\n"
    assert train.main(start(tmp_path, text)) == 0
    folder = tmp_path / "small"
    run = run_folder.open_run(folder, "float32")
    assert run.model.document_mean == (0.6, 0.9)
    text = json.loads((short_skills / "sql/train.jsonl").read_text().splitlines()[0])["text"]
    ids = mx.array([run.base.tokenizer.encode(text)])
    features = run.model.router_features(ids, packed_masks(mx.ones(ids.shape, mx.int32), run.model.window))
    read, memory = np.array(run.model.router_inputs(features))[0], run.library.find("sql").memory
    remembered = np.abs(read[:, None] - memory[None]).max(-1).min(1) < 1e-3
    single = np.abs(np.array(features)[0][1:, None] - memory[None]).max(-1).min(1) < 1e-3
    assert remembered.any()
    assert not single.any(), "except for a document's first token, no token is remembered without its mean"
    gates = summary.document_gates(run.model, run.config.growth, np.array(ids[0]))
    expected = router.logits(mx.array(read), run.model.router.gate()).argmax(-1)
    assert (gates.argmax(-1) == np.array(expected)).all()
    capsys.readouterr()
    assert generate.main([str(folder), "--prompt", text[:40], "--max-tokens", "5", "--json"]) == 0
    with pytest.raises(UserError, match="X-LoRA reads single tokens: use --format runtime"):
        export_run([str(folder), "--format", "xlora", "--out", str(tmp_path / "mix")])
    assert not (tmp_path / "mix").exists()
    assert export_run([str(folder), "--format", "runtime", "--out", str(tmp_path / "mix")]) == 0
    manifest = read_manifest(tmp_path / "mix")
    assert (manifest["document_mean_weight"], manifest["document_mean_decay"]) == (0.6, 0.9)
    assert "60% of them their mean over the text so far" in (tmp_path / "mix/README.md").read_text()
