"""Targets of what others export: adapters of PEFT and mlx-lm, X-LoRA folders, manifests, safetensors headers, bases."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
import mlx.core as mx

from dylora_mlx.adapters import mlx_lm, peft, xlora
from dylora_mlx.config import Source
from dylora_mlx.errors import UserError
from dylora_mlx.exporting.folder import FORMAT, MANIFEST, read_arrays
from dylora_mlx.importing import adapters
from dylora_mlx.importing.run import _check_sizes, _config, read_mixture
from dylora_mlx.model.base.load import fingerprint, load_base
from dylora_mlx.model.routing.router import Gate
from dylora_mlx.system.files import sha256
from fuzzing import made
from fuzzing.target import Made, target

PATTERNS = {
    "rank_pattern": {"model.layers.0.self_attn.q_proj": 2},
    "alpha_pattern": {"v_proj": 8, "^model\\.layers\\.0\\.self_attn\\.q_proj": 3.0},
    "use_rslora": True,
}
CONFIG_JSON = {
    "model_type": "gemma3_text", "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8, "num_attention_heads": 1,
    "head_dim": 4, "vocab_size": 16, "num_key_value_heads": 1, "query_pre_attn_scalar": 4, "sliding_window": 8,
    "sliding_window_pattern": 2, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 64,
    "quantization": {"group_size": 32, "bits": 4},
}  # fmt: skip


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def save(path: Path, arrays: dict[str, mx.array]) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(path), arrays, metadata={"format": "pt"})
    return path.read_bytes()


def held(place: Path) -> None:
    """Read an adapter as an expert of a run. What is let through must be a finite expert."""
    found = adapters.to_expert(adapters.read_adapter(place), made.SHAPES, place)
    assert found.rank >= 1
    for factors in found.layers[0].values():
        assert mx.isfinite(factors.lora_a).all().item()
        assert mx.isfinite(found.scale * factors.lora_b).all().item()


def peft_folder(place: Path) -> None:
    own = made.expert()
    save(place / "adapter_model.safetensors", peft.weights(own))
    (place / adapters.CONFIG).write_bytes(as_json(peft.config(own, "some/base")))


@target("peft-config", "json", 3)
def peft_config(place: Path) -> Made:
    """adapter_config.json of a PEFT LoRA (share/adapters)."""
    peft_folder(place)
    path = place / adapters.CONFIG
    plain = json.loads(path.read_bytes())
    full = plain | PATTERNS | dict.fromkeys(adapters.PLAIN) | {"init_lora_weights": True, "layers_to_transform": None}

    def run(data: bytes) -> None:
        path.write_bytes(data)
        held(place)

    return [as_json(plain), as_json(full)], run


@target("peft-weights", "safetensors", 2)
def peft_weights(place: Path) -> Made:
    """adapter_model.safetensors of a PEFT LoRA (share/adapters)."""
    peft_folder(place)
    path = place / "adapter_model.safetensors"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        held(place)

    return [path.read_bytes()], run


@target("mlx-config", "json", 2)
def mlx_config(place: Path) -> Made:
    """adapter_config.json of an mlx-lm adapter (share/adapters)."""
    own, path = made.expert(), place / adapters.CONFIG
    save(place / "adapters.safetensors", mlx_lm.weights(own))

    def run(data: bytes) -> None:
        path.write_bytes(data)
        held(place)

    return [as_json(mlx_lm.config(own, "some/base"))], run


@target("mlx-weights", "safetensors", 2)
def mlx_weights(place: Path) -> Made:
    """adapters.safetensors of an mlx-lm adapter (share/adapters)."""
    own, path = made.expert(), place / "adapters.safetensors"
    (place / adapters.CONFIG).write_bytes(as_json(mlx_lm.config(own, "some/base")))
    seed = save(path, mlx_lm.weights(own))

    def run(data: bytes) -> None:
        path.write_bytes(data)
        held(place)

    return [seed], run


@target("safetensors", "safetensors", 4)
def safetensors(place: Path) -> Made:
    """Any safetensors file: the header is checked against the file before anything is allocated (share/folder)."""
    path = place / "a.safetensors"
    arrays = {
        "a": mx.arange(6).reshape(2, 3),
        "b": mx.ones((4,), mx.bfloat16),
        "c": mx.array(1.0),
        "d": mx.zeros((0, 3)),
    }

    def run(data: bytes) -> None:
        path.write_bytes(data)
        for value in read_arrays(path).values():
            assert all(size >= 0 for size in value.shape)
            assert value.nbytes <= len(data)

    return [save(path, arrays), save(path, {"model.layers.0.x": mx.ones((3, 3))})], run


def mixture(place: Path) -> dict[str, Any]:
    """An X-LoRA folder of the base and two experts; what dylora.json says of it."""
    pool = [xlora.null_expert(made.SHAPES), made.expert(2, 1), made.expert(1, 2)]
    gate = Gate(mx.random.normal((3, made.DIMS), key=mx.random.key(0)), mx.zeros((3,)))
    save(place / "adapter_model.safetensors", xlora.classifier(gate, 1.0, 2))
    (place / adapters.CONFIG).write_bytes(as_json(xlora.config(made.DIMS, 3, 2, "some/base")))
    for expert_id, own in enumerate(pool):
        save(place / str(expert_id) / "adapter_model.safetensors", peft.weights(own))
        (place / str(expert_id) / adapters.CONFIG).write_bytes(as_json(peft.config(own, "some/base")))
    names, skills = ["base", "sql", "flask"], [["python"], ["sql"], ["flask"]]
    experts = [
        {"name": name, "skills": held, "rank": own.rank, "alpha": own.alpha}
        for name, held, own in zip(names, skills, pool, strict=True)
    ]
    files = sorted(path for path in place.rglob("*") if path.is_file())
    return {
        "format": FORMAT, "kind": "xlora", "dylora_mlx": "0", "router_layer": "final", "top_k": 2, "experts": experts,
        "base": {"name": "some/base", "fingerprint": "0" * 64, "hidden_size": made.DIMS, "layers": 1}, "first_layer": 0,
        "sources": [{"name": n, "source": f"{n}.jsonl", "limit": 5} for n in names[1:]], "projections": ["q_proj", "v_proj"],
        "base_skill": {"name": "python", "source": "packaged/python"},
        "splits": {"validation_fraction": 0.1, "test_fraction": 0.1, "seed": 0},
        "sha256": {path.relative_to(place).as_posix(): sha256(path) for path in files},
    }  # fmt: skip


TEXTS = [Source(name="sql", source="packaged/sql"), Source(name="flask", source="packaged/flask")]


def adopted(place: Path, texts: list[Source]) -> None:
    """All that is done with a folder before its base is loaded and the run is written."""
    found = read_mixture(place, texts)
    own = replace(made.base(), name="some/base")
    _check_sizes(found, own, place)
    config = _config(found, own, place)
    assert config.growth.top_k >= 1
    for expert_id, adapter in enumerate(found.experts):
        if adapter is not None:
            adapters.to_expert(adapter, made.SHAPES, place / str(expert_id))
    assert len(found.names) == len(found.skills) == len(found.experts) == found.weight.shape[0]


@target("xlora-manifest", "json", 1)
def xlora_manifest(place: Path) -> Made:
    """dylora.json of an exported mixture (share/folder, share/adopt_run)."""
    said = mixture(place)
    path = place / MANIFEST

    def run(data: bytes) -> None:
        path.write_bytes(data)
        adopted(place, [])

    return [as_json(said), as_json(said | {"kind": "runtime", "router_layer": 0})], run


@target("xlora-config", "json", 1)
def xlora_config(place: Path) -> Made:
    """adapter_config.json of PEFT's X-LoRA (share/adopt_run)."""
    mixture(place)
    path = place / adapters.CONFIG
    sparse = path.read_bytes()
    dense = json.loads(sparse) | {"enable_softmax": True, "enable_softmax_topk": False, "top_k_lora": None}

    def run(data: bytes) -> None:
        path.write_bytes(data)
        adopted(place, TEXTS)

    return [sparse, as_json(dense | {"softmax_temperature": 0.5})], run


@target("xlora-weights", "safetensors", 1)
def xlora_weights(place: Path) -> Made:
    """The classifier of an X-LoRA (share/adopt_run)."""
    mixture(place)
    path = place / "adapter_model.safetensors"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        adopted(place, TEXTS)

    return [path.read_bytes()], run


if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):

    @target("runtime-manifest", "json", 0.5)
    def runtime_manifest(place: Path) -> Made:
        """dylora.json, as the PyTorch runtime beside it reads it (share/dylora_torch)."""
        from dylora_mlx.exporting import dylora_torch

        said = mixture(place)
        path = place / MANIFEST

        def run(data: bytes) -> None:
            path.write_bytes(data)
            try:
                found = dylora_torch.Folder(place)
                assert found.rank_scale().shape[0] == len(found.names)
            except dylora_torch.FolderError as error:
                raise UserError(str(error)) from error

        return [as_json(said), as_json(said | {"kind": "runtime", "router_layer": 0})], run


@target("base-config", "json", 1)
def base_config(place: Path) -> Made:
    """config.json of a base's folder: the first look, and what mlx-lm makes of it (model/base)."""
    save(place / "model.safetensors", _flat(made.base().model.parameters()))
    (place / "tokenizer.json").write_text("{}")
    path = place / "config.json"
    plain = {name: value for name, value in CONFIG_JSON.items() if name != "quantization"}

    def run(data: bytes) -> None:
        path.write_bytes(data)
        found = load_base(str(place))
        assert found.context_length >= 1
        assert found.projection_shape(0, "q_proj")[0] >= 1

    return [as_json(plain), as_json(CONFIG_JSON)], run


@target("base-weights", "safetensors", 2)
def base_weights(place: Path) -> Made:
    """What a base is known by, from its weights' header (model/base)."""
    seed = save(place / "model.safetensors", _flat(made.base().model.parameters()))
    path = place / "model.safetensors"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        assert len(fingerprint(place, {"model_type": "gemma3_text"})) == 64

    return [seed], run


def _flat(tree: Any) -> dict[str, mx.array]:
    from mlx.utils import tree_flatten

    return dict(tree_flatten(tree))
