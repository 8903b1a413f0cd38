"""Folders that are not what they should be, and bases that are not the experts': the runtime says what and where."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tests.exporting.mixtures import change_arrays, change_json, export, random_run, runtime_of, sign

pytestmark = pytest.mark.export
A = "base_model.model.model.layers.4.mlp.down_proj.lora_A.weight"


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> Path:
    return export(random_run(base), tmp_path_factory.mktemp("whole") / "folder")


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "folder"))


def cut(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


def cut_and_sign(folder: Path) -> None:
    cut(folder, "adapter_model.safetensors")
    sign(folder, "adapter_model.safetensors")


def flip(folder: Path) -> None:
    data = bytearray((folder / "1/adapter_model.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "1/adapter_model.safetensors").write_bytes(bytes(data))


def listed(name: str):
    return lambda folder: change_json(folder, "dylora.json", lambda m: m["sha256"].update({name: "0" * 64}))


def said(**changes: Any):
    return lambda folder: change_json(folder, "dylora.json", lambda m: m.update(changes))


def narrower(folder: Path) -> None:
    change_arrays(folder, "2/adapter_model.safetensors", lambda a: a.update({A: a[A][:, 1:]}))


def lower(folder: Path) -> None:
    change_arrays(folder, "2/adapter_model.safetensors", lambda a: a.update({A: a[A][1:]}))


DAMAGE = {
    "no-manifest": (lambda f: (f / "dylora.json").unlink(), "dylora.json: missing; give a folder"),
    "no-json": (lambda f: (f / "dylora.json").write_text("{"), "dylora.json: not readable as JSON"),
    "a-list": (lambda f: (f / "dylora.json").write_text("[]"), "dylora.json: not a JSON object"),
    "newer": (said(format=2), "format 2, this file reads 1"),
    "blend": (said(kind="blend"), "a 'blend' export, not a mixture"),
    "no-hashes": (said(sha256=None), "lists no files"),
    "unlisted": (
        lambda f: change_json(f, "dylora.json", lambda m: m["sha256"].pop("1/adapter_model.safetensors")),
        "lists no '1/adapter_model.safetensors'",
    ),
    "outside": (listed("../secret"), r"'\.\./secret' leads out of the folder"),
    "absolute": (listed("/etc/hostname"), "'/etc/hostname' leads out of the folder"),
    "lost": (lambda f: (f / "3/adapter_model.safetensors").unlink(), "3/adapter_model.safetensors: missing from the folder"),
    "truncated": (lambda f: cut(f, "3/adapter_model.safetensors"), "3/adapter_model.safetensors: damaged or changed"),
    "flipped": (flip, "1/adapter_model.safetensors: damaged or changed"),
    "runtime-changed": (lambda f: cut(f, "dylora_torch.py"), "dylora_torch.py: damaged or changed"),
    "no-safetensors": (cut_and_sign, "adapter_model.safetensors: not a safetensors file"),
    "other-inputs": (narrower, "down_proj' has 639 inputs and 256 outputs, the base's has 640 and 256"),
    "other-rank": (lower, r"down_proj.lora_A.weight' has shape \(2, 640\), not \(3, 640\)"),
    "other-alpha": (
        lambda f: change_json(f, "2/adapter_config.json", lambda c: c.update(lora_alpha=1)),
        "r or lora_alpha is not that of dylora.json",
    ),
    "a-layer-less": (
        lambda f: change_json(f, "dylora.json", lambda m: m["base"].update(layers=5)),
        "layers.5.*is not expected",
    ),
    "another-base": (
        lambda f: change_json(f, "dylora.json", lambda m: m["base"].update(fingerprint="0" * 64)),
        "not the base that these experts were trained on",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(whole, folder, kind):
    runtime = runtime_of(whole)
    damage, message = DAMAGE[kind]
    runtime.Folder(folder)
    damage(folder)
    with pytest.raises(runtime.FolderError, match=message) as error:
        runtime.load(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value) or kind == "another-base"


WRONG = [None, "x", -1, 99, 1.5, [], {}, [{}], [1]]


@pytest.mark.parametrize(
    "place",
    [(name,) for name in ("kind", "base", "router_layer", "experts", "projections", "first_layer", "sha256")]
    + [("base", name) for name in ("name", "fingerprint", "hidden_size", "layers")],
    ids="-".join,
)
def test_no_manifest_is_a_traceback(whole, folder, place):
    """Every part of a manifest, missing or of a type that it should not have."""
    runtime = runtime_of(whole)
    text = (folder / "dylora.json").read_text()
    for value in ("missing", *WRONG):
        manifest = json.loads(text)
        part = manifest["base"] if len(place) == 2 else manifest
        if value == "missing":
            del part[place[-1]]
        else:
            part[place[-1]] = value
        (folder / "dylora.json").write_text(json.dumps(manifest))
        with pytest.raises(runtime.FolderError):
            runtime.load(folder)


@pytest.mark.parametrize("value", ["missing", "x", 0, 5, 1.5, []])
def test_experts_a_token_must_be_a_number_of_them(whole, folder, value):
    runtime = runtime_of(whole)
    change_json(folder, "dylora.json", lambda m: m.pop("top_k") if value == "missing" else m.update(top_k=value))
    with pytest.raises(runtime.FolderError, match="top_k"):
        runtime.load(folder)


def other_base(base, folder: Path) -> None:
    """The same architecture with one weight moved."""
    weights: Any = mx.load(str(base.folder / "model.safetensors"))
    name = next(iter(weights))
    weights[name] = weights[name] + 1
    shutil.copytree(base.folder, folder)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})


def test_another_base_is_refused(base, whole, tmp_path):
    runtime = runtime_of(whole)
    place = tmp_path / "base"
    with pytest.raises(runtime.FolderError, match="no such base on this machine"):
        runtime.load(whole, base=str(place))
    other_base(base, place)
    with pytest.raises(runtime.FolderError, match="not the base that these experts were trained on"):
        runtime.load(whole, base=str(place))
    (place / "model.safetensors").write_bytes(b"\0" * 4)
    with pytest.raises(runtime.FolderError, match=r"not the base|damaged"):
        runtime.load(whole, base=str(place))
    (place / "config.json").write_text("{")
    with pytest.raises(runtime.FolderError, match="damaged, its config or weights cannot be read"):
        runtime.load(whole, base=str(place))
    (place / "config.json").unlink()
    with pytest.raises(runtime.FolderError, match=r"no config\.json"):
        runtime.load(whole, base=str(place))


def test_the_base_may_lie_elsewhere(base, whole, tmp_path):
    """Found by its fingerprint, whatever it is called."""
    shutil.copytree(base.folder, tmp_path / "base")
    model, _ = runtime_of(whole).load(whole, base=str(tmp_path / "base"))
    assert model.names == ["base", "skill_0", "skill_1", "skill_2"]


def test_fingerprints_are_the_runs(base, whole):
    assert runtime_of(whole).fingerprint(base.folder) == base.fingerprint
