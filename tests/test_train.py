"""Whole runs, small: what they leave behind, and that going on after a stop changes nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from dylora_mlx import train
from dylora_mlx.config.load import load_config
from dylora_mlx.growth.phases import final_schedule
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.run import loop, run_folder
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.skill import learn
from tests.conftest import FEW, SMALL, start

LOGGED = [
    "train_loss",
    "lm_loss",
    "load_balance_loss",
    "z_loss",
    "rehearsal_loss",
    "grad_norm",
    "grad_norm_expert_1",
    "tokens_per_second",
    "routing_entropy",
    "expert_usage_0",
    "expert_usage_1",
    "num_experts",
    "temperature",
    "top_k",
    "trainable_params",
    "trainable_percent",
    "total_flos",
    "learning_rate",
    "peak_memory_gb",
    "compilations",
]


def records(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def test_decides_as_expected_and_says_why(finished):
    decisions = records(finished, "decisions.jsonl")
    assert [(d["skill"], d["action"], d["expert"]) for d in decisions] == [
        ("requests", "create", 1),
        ("sql", "create", 2),
        ("requests_more", "refine", 1),
    ]
    for decision in decisions:
        needed = {"skill", "action", "expert", "similarities", "interval", "threshold", "samples", "tokens", "reason"}
        assert needed <= decision.keys()
        low, high = decision["interval"]
        assert -1 <= low <= high <= 1


def test_logs_every_name(finished):
    logged = records(finished, "metrics.jsonl")
    names = set().union(*logged)
    domains = ("python", "requests", "sql", "requests_more")
    assert set(LOGGED) | {f"eval_{d}_loss" for d in domains} <= names
    assert {"padding_fraction", "packed_sequence_length_histogram"} <= names
    assert {"similarity_scores_on_creation", "novelty_threshold"} <= names
    steps = [r for r in logged if "train_loss" in r]
    assert len(steps) == 12, "the known skill refines its expert"
    assert all(np.isfinite(r["train_loss"]) and r["grad_norm"] > 0 and r["total_flos"] > 0 for r in steps)
    assert [r["total_flos"] for r in steps] == sorted(r["total_flos"] for r in steps)
    phases = [r["phase"] for r in steps]
    assert phases == ["dense", "annealing", "mature", "mature"] * 3
    assert [r["top_k"] for r in steps] == [2, 2, 1, 1, 3, 2, 1, 1, 3, 2, 1, 1]


def test_learns_and_keeps(finished):
    results = json.loads((finished / "results.json").read_text())
    base, *after = results["matrix"]
    assert after[0]["requests"] < base["requests"] - 0.02
    assert after[1]["sql"] < base["sql"] - 0.02
    assert after[2]["requests_more"] < after[1]["requests_more"]  # its expert goes on training
    allowed = load_config(finished / "config.yaml").growth.epsilon
    assert after[2]["requests"] <= after[1]["requests"] + allowed, "or the refinement would have been undone"
    assert after[2]["sql"] <= after[1]["sql"] + 0.02
    assert set(results["test"]) == {"python", "requests", "sql", "requests_more"}


def test_leaves_a_readable_folder(finished):
    final = finished / "checkpoints" / "final"
    for name in (
        "router.safetensors",
        "pool.json",
        "library/entry_0.memory.safetensors",
        "optimizer.safetensors",
        "trainer.json",
    ):
        assert (final / name).is_file()
    manifest = json.loads((final / "MANIFEST.json").read_text())["sha256"]
    for name, digest in manifest.items():
        assert hashlib.sha256((final / name).read_bytes()).hexdigest() == digest
    assert json.loads((finished / "run.json").read_text())["status"] == "finished"
    assert not (finished / "features").exists(), "only kept while a skill is learned"
    config = load_config(finished / "config.yaml")
    assert config.skills[1].rank == 4
    assert config.growth.base_skill is not None
    assert config.growth.base_skill.limit == 40


def test_opens_as_it_was_trained(finished):
    run = run_folder.open_run(finished, "float32")
    assert [(r.skill, r.rank, r.alpha, r.phase, r.frozen) for r in run.pool.records] == [
        ("requests", 8, 16.0, "frozen", True),
        ("sql", 4, 4.0, "frozen", True),
    ]
    assert [(e.skill, e.expert) for e in run.library.entries] == [
        ("python", 0),
        ("requests", 1),
        ("sql", 2),
        ("requests_more", 1),
    ]
    saved = mx.load(str(finished / "checkpoints/final/experts/expert_2/adapters.safetensors"))
    assert isinstance(run.model.experts[1], Expert)
    assert mx.array_equal(
        saved["model.layers.1.self_attn.q_proj.lora_b"], run.model.experts[1].layers[1]["q_proj"].lora_b
    )
    assert final_schedule(run.config.growth).top_k == 1


def test_experts_load_in_mlx_lm(finished):
    from mlx_lm import load

    run = run_folder.open_run(finished, "float32")
    path = finished / "checkpoints/final/experts/expert_1"
    model, _ = load(str(run.base.folder), adapter_path=str(path))
    tokens = mx.array([[2, 300, 401, 502, 777, 123]])
    bare, _ = load(str(run.base.folder))
    assert mx.max(mx.abs(model(tokens) - bare(tokens))).item() > 1e-3


def timeless(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    """Records without what depends on the machine's mood, or counts from the start of a process."""
    clock = ("tokens_per_second", "peak_memory_gb", "cache_memory_gb", "compilations", "seconds")
    return [{k: v for k, v in r.items() if k not in clock} for r in records(run, name)]


@pytest.mark.parametrize(
    ("where", "calls"),
    [
        ("train_step", 6),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("save_checkpoint", 2),
                ("measure_base", 1),
                ("train_step", 4),
                ("finish_skill", 1),
                ("finish_skill", 3),
            )
        ),
    ],
)
def test_resume_is_bitwise_equal_to_an_uninterrupted_run(finished, tmp_path, monkeypatch, where, calls):
    """Stopped before or after the nth call of a part of the loop, and resumed from the newest checkpoint."""
    module = {"save_checkpoint": run_folder, "train_step": learn}.get(where, loop)
    part, made = getattr(module, where), []

    def stopping(*arguments, **named):
        result = part(*arguments, **named)
        made.append(where)
        if len(made) == calls:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(module, where, stopping)
    assert train.main(start(tmp_path)) == 130
    monkeypatch.setattr(module, where, part)
    assert train.main(["--resume", str(tmp_path / "small")]) == 0
    ours, theirs = (p / "checkpoints/final/MANIFEST.json" for p in (tmp_path / "small", finished))
    assert json.loads(ours.read_text()) == json.loads(theirs.read_text())
    for name in ("decisions.jsonl", "metrics.jsonl"):
        assert timeless(tmp_path / "small", name) == timeless(finished, name)


def test_refuses_to_resume_on_other_data(tmp_path, monkeypatch, capsys):
    text = SMALL.replace(f"{FEW}/sql", str(tmp_path / "sql.jsonl"))
    rows = [json.dumps({"text": f"SELECT {i} AS answer FROM numbers WHERE n = {i};" * 4}) for i in range(60)]
    (tmp_path / "sql.jsonl").write_text("\n".join(rows))
    save = run_folder.save_checkpoint

    def save_then_stop(run, name=None):
        save(run, name)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_folder, "save_checkpoint", save_then_stop)
    assert train.main(start(tmp_path, text)) == 130
    monkeypatch.setattr(run_folder, "save_checkpoint", save)
    (tmp_path / "sql.jsonl").write_text("\n".join(rows[:-1]))
    assert train.main(["--resume", str(tmp_path / "small")]) == 2
    assert "changed since the run began" in capsys.readouterr().err


def test_stops_early_and_goes_back_to_the_best_state(tmp_path, capsys, monkeypatch):
    """From the fourth step on updates are reversed and enlarged, so the state after the third is the one that is kept."""
    advance = learn.train_step

    def harmful(run, step, work, now):
        before = mx.array(run.model.experts[0].layers[-1]["v_proj"].lora_b)
        outcome = advance(run, step, work, now)
        if run.state.step >= 3:
            factors = run.model.experts[0].layers[-1]["v_proj"]
            factors.lora_b = before - 200 * (factors.lora_b - before)
        return outcome

    monkeypatch.setattr(learn, "train_step", harmful)
    text = SMALL.replace("max_steps: 4", "max_steps: 8, patience: 1").replace("steps_per_eval: 2", "steps_per_eval: 3")
    text = text.replace("epsilon: 0.1", "acceptance: always")
    text = "\n".join(line for line in text.splitlines() if "sql" not in line and "more" not in line)
    assert train.main(start(tmp_path, text)) == 0
    shown = capsys.readouterr().out
    assert "stopped at step 6" in shown
    assert "went back to step 3" in shown
    logged = {
        r["step"]: r
        for r in records(tmp_path / "small", "metrics.jsonl")
        if "eval_requests_loss" in r and "after_skill" not in r
    }
    results = json.loads((tmp_path / "small" / "results.json").read_text())
    assert results["steps"] == 6
    assert results["matrix"][1]["requests"] == pytest.approx(logged[3]["eval_requests_loss"], abs=1e-6)
    assert results["matrix"][1]["requests"] != pytest.approx(logged[6]["eval_requests_loss"], abs=1e-6)


def test_the_start_competes_with_every_later_step(tmp_path, capsys):
    """No loss counts as an improvement, so the expert is as it was before its first step, and changes nothing."""
    text = SMALL.replace("max_steps: 4", "max_steps: 8, patience: 2, min_improvement: 100.0")
    text = text.replace("steps_per_eval: 2", "steps_per_eval: 1").replace("epsilon: 0.1", "acceptance: always")
    text = "\n".join(line for line in text.splitlines() if "sql" not in line and "more" not in line)
    assert train.main(start(tmp_path, text)) == 0
    shown = capsys.readouterr().out
    assert "stopped at step 2" in shown
    assert "went back to the start" in shown
    matrix = json.loads((tmp_path / "small" / "results.json").read_text())["matrix"]
    assert matrix[1]["requests"] == pytest.approx(matrix[0]["requests"], abs=1e-3)


def test_base_is_bitwise_unchanged(finished):
    """What runs read is a copy of tests/base: as it was in the files, and in memory."""
    original, opened = Path(__file__).parent / "base/model.safetensors", run_folder.open_run(finished, "float32").base
    assert (opened.folder / original.name).read_bytes() == original.read_bytes()
    weights, held = mx.load(str(original)), dict(tree_flatten(opened.model.parameters()))
    assert isinstance(weights, dict)
    assert weights.keys() == held.keys()
    assert all(mx.array_equal(weights[name].astype(mx.float32), held[name]) for name in held)


def test_checkpoint_of_another_base_is_refused(finished, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    pool = copy / "checkpoints/final/pool.json"
    changed = json.loads(pool.read_text()) | {"base": "0" * 64}
    pool.write_text(json.dumps(changed))
    listing = copy / "checkpoints/final/MANIFEST.json"
    manifest = json.loads(listing.read_text())
    manifest["sha256"]["pool.json"] = hashlib.sha256(pool.read_bytes()).hexdigest()
    listing.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="another base"):
        run_folder.open_run(copy)
    assert checkpoint.read(copy / "checkpoints/final")["pool.json"]["base"] == "0" * 64
