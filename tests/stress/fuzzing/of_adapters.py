"""Fuzz targets for files from elsewhere: PEFT and mlx-lm adapters, X-LoRA folders, manifests, safetensors headers, bases."""

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
from fuzzing import samples
from fuzzing.target import Harness, target

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


def read_as_expert(work_dir: Path) -> None:
    """Read an adapter as an expert of a run. An adapter that is accepted must give a finite expert."""
    expert = adapters.to_expert(adapters.read_adapter(work_dir), samples.SHAPES, work_dir)
    assert expert.rank >= 1
    for factors in expert.layers[0].values():
        assert mx.isfinite(factors.lora_a).all().item()
        assert mx.isfinite(expert.scale * factors.lora_b).all().item()


def peft_folder(work_dir: Path) -> None:
    """Write a PEFT adapter to the folder."""
    expert = samples.expert()
    save(work_dir / "adapter_model.safetensors", peft.weights(expert))
    (work_dir / adapters.CONFIG).write_bytes(as_json(peft.config(expert, "some/base")))


@target("peft-config", "json", 3)
def peft_config(work_dir: Path) -> Harness:
    """adapter_config.json of a PEFT LoRA (importing/adapters)."""
    peft_folder(work_dir)
    path = work_dir / adapters.CONFIG
    plain = json.loads(path.read_bytes())
    full = (
        plain
        | PATTERNS
        | dict.fromkeys(adapters.UNSUPPORTED_OPTIONS)
        | {"init_lora_weights": True, "layers_to_transform": None}
    )

    def run(data: bytes) -> None:
        path.write_bytes(data)
        read_as_expert(work_dir)

    return [as_json(plain), as_json(full)], run


@target("peft-weights", "safetensors", 2)
def peft_weights(work_dir: Path) -> Harness:
    """adapter_model.safetensors of a PEFT LoRA (importing/adapters)."""
    peft_folder(work_dir)
    path = work_dir / "adapter_model.safetensors"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        read_as_expert(work_dir)

    return [path.read_bytes()], run


@target("mlx-config", "json", 2)
def mlx_config(work_dir: Path) -> Harness:
    """adapter_config.json of an mlx-lm adapter (importing/adapters)."""
    expert, path = samples.expert(), work_dir / adapters.CONFIG
    save(work_dir / "adapters.safetensors", mlx_lm.weights(expert))

    def run(data: bytes) -> None:
        path.write_bytes(data)
        read_as_expert(work_dir)

    return [as_json(mlx_lm.config(expert, "some/base"))], run


@target("mlx-weights", "safetensors", 2)
def mlx_weights(work_dir: Path) -> Harness:
    """adapters.safetensors of an mlx-lm adapter (importing/adapters)."""
    expert, path = samples.expert(), work_dir / "adapters.safetensors"
    (work_dir / adapters.CONFIG).write_bytes(as_json(mlx_lm.config(expert, "some/base")))
    seed = save(path, mlx_lm.weights(expert))

    def run(data: bytes) -> None:
        path.write_bytes(data)
        read_as_expert(work_dir)

    return [seed], run


@target("safetensors", "safetensors", 4)
def safetensors(work_dir: Path) -> Harness:
    """Any safetensors file: the header is checked against the file before anything is allocated (exporting/folder)."""
    path = work_dir / "a.safetensors"
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


def mixture(work_dir: Path) -> dict[str, Any]:
    """Write an X-LoRA folder of the null expert and two experts; return the manifest for its dylora.json."""
    pool = [xlora.null_expert(samples.SHAPES), samples.expert(2, 1), samples.expert(1, 2)]
    gate = Gate(mx.random.normal((3, samples.DIMS), key=mx.random.key(0)), mx.zeros((3,)))
    save(work_dir / "adapter_model.safetensors", xlora.classifier(gate, 1.0, 2))
    (work_dir / adapters.CONFIG).write_bytes(as_json(xlora.config(samples.DIMS, 3, 2, "some/base")))
    for expert_id, expert in enumerate(pool):
        save(work_dir / str(expert_id) / "adapter_model.safetensors", peft.weights(expert))
        (work_dir / str(expert_id) / adapters.CONFIG).write_bytes(as_json(peft.config(expert, "some/base")))
    names, skills = ["base", "sql", "flask"], [["python"], ["sql"], ["flask"]]
    experts = [
        {"name": name, "skills": skill_names, "rank": expert.rank, "alpha": expert.alpha}
        for name, skill_names, expert in zip(names, skills, pool, strict=True)
    ]
    files = sorted(path for path in work_dir.rglob("*") if path.is_file())
    return {
        "format": FORMAT, "kind": "xlora", "dylora_mlx": "0", "router_layer": "final", "top_k": 2, "experts": experts,
        "base": {"name": "some/base", "fingerprint": "0" * 64, "hidden_size": samples.DIMS, "layers": 1}, "first_layer": 0,
        "sources": [{"name": n, "source": f"{n}.jsonl", "limit": 5} for n in names[1:]], "projections": ["q_proj", "v_proj"],
        "base_skill": {"name": "python", "source": "packaged/python"},
        "splits": {"validation_fraction": 0.1, "test_fraction": 0.1, "seed": 0},
        "sha256": {path.relative_to(work_dir).as_posix(): sha256(path) for path in files},
    }  # fmt: skip


SOURCES = [Source(name="sql", source="packaged/sql"), Source(name="flask", source="packaged/flask")]


def import_mixture(work_dir: Path, sources: list[Source]) -> None:
    """Do everything that import-run does with a folder before it loads the base and writes the run."""
    mixture_ = read_mixture(work_dir, sources)
    base = replace(samples.base(), name="some/base")
    _check_sizes(mixture_, base, work_dir)
    config = _config(mixture_, base, work_dir)
    assert config.growth.top_k >= 1
    for expert_id, adapter in enumerate(mixture_.experts):
        if adapter is not None:
            adapters.to_expert(adapter, samples.SHAPES, work_dir / str(expert_id))
    assert len(mixture_.names) == len(mixture_.skills) == len(mixture_.experts) == mixture_.weight.shape[0]


@target("xlora-manifest", "json", 1)
def xlora_manifest(work_dir: Path) -> Harness:
    """dylora.json of an exported mixture (exporting/folder, importing/run)."""
    manifest = mixture(work_dir)
    path = work_dir / MANIFEST

    def run(data: bytes) -> None:
        path.write_bytes(data)
        import_mixture(work_dir, [])

    return [as_json(manifest), as_json(manifest | {"kind": "runtime", "router_layer": 0})], run


@target("xlora-config", "json", 1)
def xlora_config(work_dir: Path) -> Harness:
    """adapter_config.json of PEFT's X-LoRA (importing/run)."""
    mixture(work_dir)
    path = work_dir / adapters.CONFIG
    sparse = path.read_bytes()
    dense = json.loads(sparse) | {"enable_softmax": True, "enable_softmax_topk": False, "top_k_lora": None}

    def run(data: bytes) -> None:
        path.write_bytes(data)
        import_mixture(work_dir, SOURCES)

    return [sparse, as_json(dense | {"softmax_temperature": 0.5})], run


@target("xlora-weights", "safetensors", 1)
def xlora_weights(work_dir: Path) -> Harness:
    """The classifier of an X-LoRA (importing/run)."""
    mixture(work_dir)
    path = work_dir / "adapter_model.safetensors"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        import_mixture(work_dir, SOURCES)

    return [path.read_bytes()], run


if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):

    @target("runtime-manifest", "json", 0.5)
    def runtime_manifest(work_dir: Path) -> Harness:
        """dylora.json, as read by the exported PyTorch runtime (exporting/dylora_torch)."""
        from dylora_mlx.exporting import dylora_torch

        manifest = mixture(work_dir)
        path = work_dir / MANIFEST

        def run(data: bytes) -> None:
            path.write_bytes(data)
            try:
                runtime_folder = dylora_torch.Folder(work_dir)
                assert runtime_folder.rank_scale().shape[0] == len(runtime_folder.names)
            except dylora_torch.FolderError as error:
                raise UserError(str(error)) from error

        return [as_json(manifest), as_json(manifest | {"kind": "runtime", "router_layer": 0})], run


@target("base-config", "json", 1)
def base_config(work_dir: Path) -> Harness:
    """config.json of a base's folder: the first check, and loading by mlx-lm (model/base/load)."""
    save(work_dir / "model.safetensors", _flat(samples.base().model.parameters()))
    (work_dir / "tokenizer.json").write_text("{}")
    path = work_dir / "config.json"
    plain = {name: value for name, value in CONFIG_JSON.items() if name != "quantization"}

    def run(data: bytes) -> None:
        path.write_bytes(data)
        base = load_base(str(work_dir))
        assert base.context_length >= 1
        assert base.projection_shape(0, "q_proj")[0] >= 1

    return [as_json(plain), as_json(CONFIG_JSON)], run


@target("base-weights", "safetensors", 2)
def base_weights(work_dir: Path) -> Harness:
    """A base's fingerprint, from the header of its weights (model/base/load)."""
    seed = save(work_dir / "model.safetensors", _flat(samples.base().model.parameters()))
    path = work_dir / "model.safetensors"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        assert len(fingerprint(work_dir, {"model_type": "gemma3_text"})) == 64

    return [seed], run


def _flat(tree: Any) -> dict[str, mx.array]:
    from mlx.utils import tree_flatten

    return dict(tree_flatten(tree))
