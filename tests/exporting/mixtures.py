"""Runs of random experts, their exported folders, and the same mixtures in MLX, PEFT and the PyTorch runtime."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from dylora_mlx.config import Config, GrowthConfig, ModelConfig, Source
from dylora_mlx.exporting import formats
from dylora_mlx.exporting.folder import MANIFEST, write_folder
from dylora_mlx.growth.library import Library
from dylora_mlx.growth.pool import ExpertRecord, Pool
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder.attention import packed_masks
from dylora_mlx.model.routing.router import Routing
from dylora_mlx.run.build import make_decoder
from dylora_mlx.run.run_folder import OpenedRun
from dylora_mlx.system.files import sha256

ROOT = Path(__file__).parents[2]
PROJECTIONS = ("q_proj", "v_proj", "o_proj", "down_proj")
GATE = "base_model.internal_xlora_classifier.layers.0."


SCRIPTS = ("tools", "tools/benchmarks", "tools/dev", "tools/docs", "tests/stress")
"""Folders of scripts."""


def tool(name: str) -> Any:
    """A script, by its name without a suffix, as a module."""
    return loaded(next(path for folder in SCRIPTS if (path := ROOT / folder / f"{name}.py").is_file()), name)


def loaded(path: Path, name: str) -> Any:
    """A Python file as a module of this name, new each time."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def runtime_of(folder: Path) -> Any:
    """The runtime that lies in a folder."""
    return loaded(folder / "dylora_torch.py", "dylora_torch")


def random_run(
    base: Base,
    ranks: Sequence[int] = (4, 3, 8),
    router_layer: int | str = "final",
    projections: Sequence[str] = PROJECTIONS,
    top_k: int = 2,
    temperature: float = 0.7,
    seed: int = 0,
    context: float = 0.0,
) -> OpenedRun:
    """Experts skill_0, skill_1, ... that move logits a lot, and gates that differ from token to token."""
    skills = [Source(name=f"skill_{number}", source="packaged/sql", limit=40) for number in range(len(ranks))]
    growth = GrowthConfig(top_k=top_k, final_temperature=temperature, base_skill=None)
    model = ModelConfig(projections=list(projections), router_layer=router_layer, document_mean_weight=context)  # pyright: ignore
    config = Config(skills=skills, model=model, growth=growth)
    pool = Pool(make_decoder(config, base))
    rng = np.random.default_rng(seed)
    for number, rank in enumerate(ranks):
        expert_id = pool.add(ExpertRecord(f"skill_{number}", rank, 0.5 + number + rank, 0), mx.random.key(number))
        for factors in (f for layer in pool.model.experts[expert_id - 1].layers for f in layer.values()):
            factors.lora_b = mx.array(rng.normal(0, 0.4, factors.lora_b.shape).astype(np.float32))
    for row in pool.model.router.rows:
        row.weight = mx.array(rng.normal(0, 0.1, row.weight.shape).astype(np.float32))
        row.bias = mx.array(rng.normal(0, 0.3, 1).astype(np.float32))
    return OpenedRun(config, base, pool.model, pool, Library(base.fingerprint), Path("nowhere"))


def export(run: OpenedRun, out: Path, kind: str = "xlora", top_k: int | str | None = "run") -> Path:
    """Write a run's mixture to a folder."""
    made = formats.export_mixture(run, formats.mixture_routing(run, top_k), kind)
    write_folder(out, made.content, made.manifest)
    return out


def ours(run: OpenedRun, rows: np.ndarray, top_k: int | None, temperature: float, expert_id: int | None = None) -> Any:
    """Logits [B, L, V] and gates [B, L, E] in MLX of rows of token ids; column: where every token goes."""
    inputs = mx.array(rows.astype(np.int32))
    where = packed_masks(mx.ones(inputs.shape, mx.int32), run.model.window)
    gates = None
    if expert_id is not None:
        fixed = (mx.arange(len(run.pool) + 1) == expert_id).astype(mx.float32)
        gates = mx.broadcast_to(fixed, (*inputs.shape, len(run.pool) + 1))
    found = run.model(inputs, where, Routing(top_k, mx.array(temperature)), gates=gates)
    return np.array(run.model.logits(found.hidden)), np.array(found.gates)


def theirs(model: Any, rows: np.ndarray, **options: Any) -> np.ndarray:
    """Logits of a PyTorch model in one pass without caches."""
    import torch

    with torch.no_grad():
        return (
            model(input_ids=torch.from_numpy(rows.astype(np.int64)), use_cache=False, **options).logits.float().numpy()
        )


def transformers_base(base: Base) -> Any:
    """The base in transformers, with the embedding's scale as MLX has it."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    scale = torch.tensor(base.args.hidden_size**0.5, dtype=torch.bfloat16).float()
    model.get_input_embeddings().embed_scale.fill_(scale)
    return model.eval()


def in_peft(base: Base, folder: Path, expert_ids: int, adapters: dict[str, str] | None = None) -> Any:
    """A folder in PEFT's X-LoRA, loaded as its card says. adapters: other paths than the card's."""
    from peft import PeftModel, XLoraConfig

    plain = transformers_base(base)
    plain.config.use_cache = False
    config: Any = XLoraConfig.from_pretrained(str(folder))
    config.adapters = adapters or {str(expert_id): f"{folder}/{expert_id}" for expert_id in range(expert_ids)}
    return PeftModel.from_pretrained(plain, str(folder), config=config).eval()


def tokens_of(base: Base, *shape: int, seed: int = 0) -> np.ndarray:
    """Random token ids."""
    return np.random.default_rng(seed).integers(4, base.args.vocab_size, shape)


def change_arrays(folder: Path, name: str, change: Callable[[dict[str, mx.array]], Any]) -> None:
    """Change the weights of a file, and write its hash anew: only the numbers are wrong then."""
    arrays: Any = mx.load(str(folder / name))
    mx.eval(arrays)
    change(arrays)
    (folder / name).unlink()
    mx.save_safetensors(str(folder / name), arrays, metadata={"format": "pt"})
    sign(folder, name)


def change_json(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file, and write its hash anew."""
    found = json.loads((folder / name).read_text())
    change(found)
    (folder / name).write_text(json.dumps(found))
    if name != MANIFEST:
        sign(folder, name)


def sign(folder: Path, name: str) -> None:
    """The hash of a file as it is now, in the manifest."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["sha256"][name] = sha256(folder / name)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def gap(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference."""
    assert one.shape == other.shape
    return float(np.abs(one - other).max())
