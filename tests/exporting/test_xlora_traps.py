"""Where PEFT's X-LoRA computes something else without a word, and what an export does about each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.exporting.mixtures import (
    GATE,
    change_arrays,
    change_json,
    export,
    gap,
    in_peft,
    ours,
    random_run,
    runtime_of,
    theirs,
    tokens_of,
)

pytestmark = pytest.mark.export
PROJECTION = "base_model.model.model.layers.1.self_attn.q_proj."


@pytest.fixture(scope="module")
def mixture(base, tmp_path_factory):
    """Three experts, two a token, final states; read-only."""
    run = random_run(base)
    rows = tokens_of(base, 1, 60)
    folder = export(run, tmp_path_factory.mktemp("mixture") / "folder")
    return SimpleNamespace(run=run, folder=folder, rows=rows, expected=ours(run, rows, 2, 0.7)[0])


@pytest.fixture
def copy(mixture, tmp_path) -> Path:
    return Path(shutil.copytree(mixture.folder, tmp_path / "copy"))


def in_runtime(folder: Path) -> Any:
    return runtime_of(folder).load(folder)[0]


def test_a_logit_of_zero_is_chosen_too(base, tmp_path):
    """PEFT takes a logit of exactly 0.0 for one that was not among the k largest."""
    run, rows = random_run(base), tokens_of(base, 1, 60)
    run.model.router.rows[1].weight = mx.zeros(base.args.hidden_size)
    run.model.router.rows[1].bias = mx.zeros(1)
    expected, gates = ours(run, rows, 2, 0.7)
    assert 0.2 < (gates[..., 1] > 0).mean() < 1
    folder = export(run, tmp_path / "folder")
    assert gap(theirs(in_peft(base, folder, 4), rows), expected) < 1e-4
    assert gap(theirs(in_runtime(folder), rows), expected) < 1e-4
    change_arrays(folder, "adapter_model.safetensors", lambda a: a.update({f"{GATE}bias": a[f"{GATE}bias"] - 1}))
    assert gap(theirs(in_runtime(folder), rows), expected) < 1e-4
    assert gap(theirs(in_peft(base, folder, 4), rows), expected) > 0.1


def test_biases_stay_where_no_logit_is_always_zero(mixture, copy):
    arrays: Any = mx.load(str(copy / "adapter_model.safetensors"))
    assert np.allclose(arrays[f"{GATE}bias"], mixture.run.model.router.gate().bias / 0.7)


@pytest.mark.parametrize("tied", [(1, 2), (0, 3), (0, 1, 2, 3)])
def test_of_equal_logits_exactly_k_are_chosen(base, tmp_path, monkeypatch, tied):
    """Rows of the gate that are the same: two experts a token all the same, and in the runtime those that MLX chooses."""
    from peft.tuners.xlora.layer import XLoraLayer

    run, rows = random_run(base), tokens_of(base, 1, 60)
    first = run.model.router.rows[tied[0]]
    for expert_id in tied[1:]:
        run.model.router.rows[expert_id].weight, run.model.router.rows[expert_id].bias = first.weight, first.bias
    expected, gates = ours(run, rows, 2, 0.7)
    folder = export(run, tmp_path / "folder")
    model = in_runtime(folder)
    assert gap(theirs(model, rows), expected) < 1e-4
    assert gap(model.gates.numpy(), gates) < 1e-5
    assert ((gates > 0).sum(-1) == 2).all()
    assert ((model.gates.numpy() > 0).sum(-1) == 2).all()
    split = (gates[..., list(tied)] > 0).sum(-1)
    assert ((split > 0) & (split < len(tied))).any()  # somewhere a choice was made between equals
    chosen = []
    plain = XLoraLayer.get_maybe_topk_scalings
    monkeypatch.setattr(XLoraLayer, "get_maybe_topk_scalings", lambda *a: chosen.append(plain(*a)) or chosen[-1])
    theirs(in_peft(base, folder, 4), rows)
    scalings = chosen[-1].numpy()
    assert ((scalings > 0).sum(-1) == 2).all()
    assert gap(scalings.max(-1), gates.max(-1)) < 1e-5  # the same weights, of experts that are as good


def test_twelve_experts_keep_their_order(base, tmp_path):
    """'10' comes after '9', not after '1'."""
    run, rows = (
        random_run(base, [1 + number % 3 for number in range(12)], projections=("q_proj", "v_proj")),
        tokens_of(base, 1, 80),
    )
    expected, gates = ours(run, rows, 2, 0.7)
    assert set(range(13)) == set(np.flatnonzero(gates.reshape(-1, 13).any(0)))
    folder = export(run, tmp_path / "folder")
    assert gap(theirs(in_peft(base, folder, 13), rows), expected) < 1e-4
    assert gap(theirs(in_runtime(folder), rows), expected) < 1e-4
    assert list(json.loads((folder / "adapter_config.json").read_text())["adapters"]) == [str(c) for c in range(13)]
    for expert_id, record in enumerate(run.pool.records, 1):
        stated = json.loads((folder / str(expert_id) / "adapter_config.json").read_text())
        assert (stated["r"], stated["lora_alpha"]) == (record.rank, record.alpha)


def test_paths_inside_the_folder_are_not_the_folders(base, mixture, tmp_path, monkeypatch):
    """What the JSON calls '0' PEFT looks for in the working directory; full paths, and the runtime, work anywhere."""
    relative = {str(expert_id): str(expert_id) for expert_id in range(4)}
    assert json.loads((mixture.folder / "adapter_config.json").read_text())["adapters"] == relative
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it would look there next
    with pytest.raises(ValueError, match="Can't find 'adapter_config"):
        in_peft(base, mixture.folder, 4, relative)
    assert gap(theirs(in_peft(base, mixture.folder, 4), mixture.rows), mixture.expected) < 1e-4
    shutil.copytree(mixture.folder, tmp_path / "moved" / "here")
    monkeypatch.chdir(tmp_path / "moved")
    assert gap(theirs(runtime_of(Path("here")).load("here")[0], mixture.rows), mixture.expected) < 1e-4


def moved(name: str, other: str):
    return lambda arrays: arrays.update({other: arrays.pop(name)})


KEYS = {
    "gate-missing": ("adapter_model.safetensors", lambda a: a.pop(f"{GATE}weight"), f"'{GATE}weight' is missing", None),
    "gate-misspelt": (
        "adapter_model.safetensors",
        moved(f"{GATE}weight", f"{GATE}wieght"),
        rf"'{GATE}w(eight' is missing|ieght' is not expected)",
        None,
    ),
    "factor-missing": (
        "2/adapter_model.safetensors",
        lambda a: a.pop(f"{PROJECTION}lora_B.weight"),
        "q_proj.lora_B.weight' is missing",
        None,
    ),
    "factor-misspelt": (
        "2/adapter_model.safetensors",
        moved(f"{PROJECTION}lora_A.weight", f"{PROJECTION}lora_a.weight"),
        r"q_proj.lora_(A.weight' is missing|a.weight' is not expected)",
        "unexpected keys",
    ),
}


@pytest.mark.parametrize("kind", KEYS)
def test_a_wrong_key_is_named(base, mixture, copy, kind):
    """PEFT computes something else without a word, but for a factor that it does not know."""
    name, change, message, refusal = KEYS[kind]
    change_arrays(copy, name, change)
    runtime = runtime_of(copy)
    with pytest.raises(runtime.FolderError, match=message):
        runtime.load(copy)
    if refusal is None:
        assert gap(theirs(in_peft(base, copy, 4), mixture.rows), mixture.expected) > 0.1
    else:
        with pytest.raises(ValueError, match=refusal):
            in_peft(base, copy, 4)


@pytest.mark.parametrize("name", ["r", "lora_alpha"])
def test_a_missing_rank_or_alpha_is_no_default(base, mixture, copy, name):
    """PEFT would take 8 for either."""
    change_json(copy, "3/adapter_config.json", lambda config: config.pop(name))
    runtime = runtime_of(copy)
    with pytest.raises(runtime.FolderError, match="r or lora_alpha"):
        runtime.load(copy)
    if name == "lora_alpha":
        assert gap(theirs(in_peft(base, copy, 4), mixture.rows), mixture.expected) > 0.01
