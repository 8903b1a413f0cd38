"""Every format of a trained run, beside MLX: it passes as it is written, and does not when a number in it is changed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx import export as export_command
from dylora_mlx.errors import UserError
from dylora_mlx.export import parse
from dylora_mlx.exporting import refit_router as refit
from dylora_mlx.exporting import verify
from dylora_mlx.exporting import write as exporting_write
from dylora_mlx.exporting.plan import ExportPlan
from dylora_mlx.exporting.refit_router import refit_router
from dylora_mlx.exporting.write import open_for_export, write_export
from dylora_mlx.model.decoder.attention import packed_masks
from dylora_mlx.model.routing import router
from tests.exporting.mixtures import (
    GATE,
    change_arrays,
    export,
    gap,
    in_peft,
    ours,
    random_run,
    theirs,
    tokens_of,
)

pytestmark = pytest.mark.export
BLEND = "requests=0.6,sql=0.5"
FORMATS = {
    "experts": [],
    "gguf-lora": [],
    "xlora": [],
    "xlora dense": ["--top-k", "dense"],
    "xlora 2": ["--top-k", "2"],
    "runtime": [],
    "blend": ["--weights", BLEND],
    "merged": ["--expert", "sql"],
    "merged blend": ["--weights", BLEND],
}
CHECKS = {
    "experts": ["expert_1 in PEFT", "expert_2 in PEFT"],
    "gguf-lora": [f"expert_{number} of the GGUF file in transformers" for number in (1, 2)],
    "xlora": [
        "the mixture in PEFT's X-LoRA",
        "the mixture in the PyTorch runtime",
        "the same, token by token with caches",
    ],
    "runtime": ["the mixture in the PyTorch runtime", "the same, token by token with caches"],
    "blend": ["the blend in PEFT"],
    "merged": ["the full model as stored", "the full model in transformers, beside mlx-lm"],
}


@pytest.fixture(scope="module")
def run(finished):
    return open_for_export(finished, "float32")


@pytest.fixture(scope="module")
def exported(run, finished, tmp_path_factory):
    """A function that exports the run in a format, once."""
    made, home = {}, tmp_path_factory.mktemp("exported")

    def export_once(name: str) -> Any:
        if name not in made:
            line = [str(finished), "--out", str(home / name), "--format", name.split()[0], *FORMATS[name]]
            plan = ExportPlan(run, parse(line))
            write_export(finished, plan.export, home / name)
            made[name] = plan
        return made[name]

    return export_once


@pytest.fixture(autouse=True)
def shorter(monkeypatch) -> None:
    for name, value in {"DOCUMENTS": 1, "LENGTH": 64, "DECODED": 6}.items():
        monkeypatch.setattr(verify, name, value)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_mlxs_logits(exported, name):
    plan = exported(name)
    found = list(plan.verify())
    assert [check.name for check in found] == CHECKS[name.split()[0]]
    for check in found:
        assert check.worst < 1e-4
        assert check.gates_differ == 0
        assert check.passed
    if plan.routing is not None:
        assert all(check.positions > 50 for check in found)
        assert plan.routing.top_k == {"xlora": 1, "xlora dense": None, "xlora 2": 2, "runtime": 1}[name]


def moved(key: str, by: float):
    """Add to one weight of a file, whose name ends like this."""

    def change(arrays: dict[str, mx.array]) -> None:
        name = next(name for name in sorted(arrays) if name.endswith(key))
        arrays[name] = (arrays[name].astype(mx.float32) + by).astype(arrays[name].dtype)

    return change


def gates_swapped(arrays: dict[str, mx.array]) -> None:
    weight = arrays[f"{GATE}weight"]
    arrays[f"{GATE}weight"] = weight[mx.array([1, 0, *range(2, len(weight))])]


def change_gguf(path: Path, change: Callable[[dict[str, mx.array]], None]) -> None:
    """Change the float32 tensors of a GGUF file in place."""
    stored = {entry.name: entry.data for entry in gguf.GGUFReader(path, "r+").tensors}
    arrays = {name: mx.array(np.array(data)) for name, data in stored.items()}
    change(arrays)
    for name, data in stored.items():
        data[:] = np.array(arrays[name])


CHANGES = {
    "experts": ("expert_2/adapter_model.safetensors", moved("lora_B.weight", 0.05)),
    "gguf-lora": ("expert_2.gguf", moved("lora_b", 0.05)),
    "xlora": ("adapter_model.safetensors", gates_swapped),
    "runtime": ("2/adapter_model.safetensors", moved("lora_B.weight", 0.05)),
    "blend": ("adapter_model.safetensors", moved("lora_A.weight", 0.05)),
    "merged": ("model.safetensors", moved("layers.1.self_attn.q_proj.weight", 0.05)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_number_is_found(exported, tmp_path, monkeypatch, name):
    plan = exported(name)
    out, (file, change) = Path(shutil.copytree(plan.out, tmp_path / "copy")), CHANGES[name]
    (change_gguf(out / file, change) if file.endswith(".gguf") else change_arrays(out, file, change))
    monkeypatch.setattr(plan, "out", out)
    found = list(plan.verify())
    good = {
        "expert_1 in PEFT",
        CHECKS["gguf-lora"][0],
        "the full model in transformers, beside mlx-lm",
    }  # not what was changed
    assert {check.name for check in found if check.passed} == good & {check.name for check in found}
    if plan.routing is not None and change is gates_swapped:
        assert all(check.gates_differ > 0 for check in found)


def test_the_command_fails_where_verification_does(finished, tmp_path, capsys, monkeypatch):
    write = write_export

    def wrongly(run, made, out):
        write(run, made, out)
        change_arrays(out, "expert_2/adapter_model.safetensors", moved("lora_B.weight", 0.05))

    monkeypatch.setattr(exporting_write, "write_export", wrongly)
    line = [str(finished), "--out", str(tmp_path / "out"), "--verify"]
    assert export_command.command(line) == 1
    out, err = capsys.readouterr()
    assert re.search(r"expert_1 in PEFT: largest logit difference \S+ \(adapters move logits by up to \S+\): ok\n", out)
    assert re.search(r"expert_2 in PEFT: .*: FAILED\n", out)
    assert "does not reproduce the run within 0.001" in err


def test_an_expert_that_does_nothing_is_no_proof():
    """Equal logits say nothing where the adapters do not move them."""
    assert verify.VerificationResult("x", 0.0, 0.5).passed
    assert not verify.VerificationResult("x", 0.0, 0.005).passed
    assert not verify.VerificationResult("x", 0.002, 0.5).passed
    assert not verify.VerificationResult("x", float("nan"), 0.5).passed


@pytest.fixture(scope="module")
def tapped(base, tmp_path_factory):
    """A mixture whose router taps layer 3, with another gate for final states in an X-LoRA folder."""
    run = random_run(base, router_layer=3)
    home = tmp_path_factory.mktemp("tapped")
    line = ["nowhere", "--out", str(home / "folder"), "--format", "xlora", "--refit-router"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refit, "POSITIONS", 2048)
        plan = ExportPlan(run, parse(line))
    write_export(home, plan.export, home / "folder")
    return SimpleNamespace(run=run, plan=plan)


def test_a_router_refitted_to_final_states(tapped, base):
    """An exact X-LoRA folder of the new gate; how well it agrees with the run's own is another matter."""
    found = list(tapped.plan.verify())
    assert [check.name for check in found] == CHECKS["xlora"]
    assert all(check.worst < 1e-4 and check.passed for check in found)
    how, rows = tapped.plan.routing, tokens_of(base, 1, 50)
    assert (how.router_layer, how.top_k, how.temperature) == ("final", 2, 1.0)
    final = random_run(base, router_layer="final")
    for row, weight, bias in zip(final.model.router.rows, how.gate.weight, how.gate.bias, strict=True):
        row.weight, row.bias = weight, bias[None]
    final.model.experts[:] = [
        _deeper(run_expert, own) for run_expert, own in zip(tapped.run.model.experts, final.model.experts, strict=True)
    ]
    assert gap(theirs(in_peft(base, tapped.plan.out, 4), rows), ours(final, rows, 2, 1.0)[0]) < 1e-4


def _deeper(expert: Any, own: Any) -> Any:
    """An expert of the upper layers as one of all: it does nothing below."""
    for mine, given in zip(own.layers, expert.layers, strict=True):
        for name, factors in mine.items():
            factors.lora_b = given[name].lora_b if name in given else mx.zeros_like(factors.lora_b)
            if name in given:
                factors.lora_a = given[name].lora_a
    return own


def test_a_refitted_router_agrees_with_its_original(tapped):
    """On text like the run's, more often than a gate that knows nothing would."""
    texts = [np.array(tokens)[None] for tokens in verify.verification_texts(tapped.run)]
    same = []
    for rows in texts:
        wanted = ours(tapped.run, rows, None, 0.7)[1].argmax(-1)
        masks = packed_masks(mx.ones(rows.shape, mx.int32), tapped.run.model.window)
        final = tapped.run.model.base_states(mx.array(rows), masks)
        found = np.array(router.logits(final, tapped.plan.routing.gate).argmax(-1))
        same.append((wanted == found).mean())
    assert np.mean(same) > 0.5


def test_a_router_that_reads_the_document_is_refitted_to_single_tokens(base, monkeypatch):
    monkeypatch.setattr(refit, "POSITIONS", 2048)
    found = refit_router(random_run(base, context=0.6))
    assert found.same > 0.5
    assert found.divergence < 0.5


def test_a_router_that_reads_the_document_has_no_xlora_folder(base, tmp_path):
    with pytest.raises(
        UserError, match=r"model\.document_mean_weight: 0\.6\), and X-LoRA reads single tokens: use --format runtime"
    ):
        export(random_run(base, context=0.6), tmp_path / "folder", "xlora")


def test_a_tapped_router_has_no_xlora_folder(base, tmp_path):
    with pytest.raises(
        UserError, match="reads layer 3, and X-LoRA reads final states: use --format runtime, or --refit-router"
    ):
        export(random_run(base, router_layer=3), tmp_path / "folder", "xlora")
