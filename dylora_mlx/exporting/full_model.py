"""A full model with an expert folded in, as Hugging Face keeps them: the base's files, some of their tensors summed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from dylora_mlx.adapters.fuse import dequantize_weights, fuse_weights, weight_updates
from dylora_mlx.exporting import formats
from dylora_mlx.exporting.folder import FolderContent
from dylora_mlx.exporting.formats import Export
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.run.run_folder import OpenedRun
from dylora_mlx.system.files import read_json

COPIED_FILES = (
    "tokenizer",
    "special_tokens_map.",
    "added_tokens.",
    "chat_template.",
    "vocab.",
    "merges.",
    "generation_config.",
)
"""What a full model's folder has besides weights and config, by how the names begin."""


def export_full_model(run: OpenedRun, expert: Expert, said: dict[str, Any], dtype: mx.Dtype | None = None) -> Export:
    """A full model with one expert or blend folded in: every file of the base, its tensors as they are stored but for
    those that the expert changes. dtype: of all floating tensors, instead of the stored ones'.

    A quantised base is dequantised. transformers and mlx-lm both load the result.
    """
    folder, added = run.base.folder, weight_updates(expert)
    config = read_json(folder / "config.json")
    quantisation = config.pop("quantization", None)
    config.pop("quantization_config", None)
    config = explicit_config(config, run.base.args)
    if dtype is not None or quantisation:
        config["dtype"] = config["torch_dtype"] = str(dtype or mx.bfloat16).removeprefix("mlx.core.")
    content: FolderContent = {"config.json": config}
    files = sorted(folder.glob("model*.safetensors"))
    for path in files:
        content[path.name] = partial(_folded, path, files, added, quantisation, dtype)
    content |= {
        path.name: path for path in sorted(folder.iterdir()) if path.is_file() and path.name.startswith(COPIED_FILES)
    }
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content[index.name] = _index(files, quantisation)
    return Export(content, formats.base_manifest(run, "merged") | said)


def explicit_config(config: dict[str, Any], args: Any) -> dict[str, Any]:
    """A config that transformers and mlx-lm read alike: mlx-lm does not know layer_types and rope_parameters of every
    family. args: mlx-lm's, a dataclass."""
    names = ("sliding_window_pattern", "rope_theta", "rope_local_base_freq", "rope_scaling")
    known = {name: value for name, value in vars(args).items() if name in names and value is not None}
    return {**known, **{name: value for name, value in config.items() if value is not None or name not in known}}


def _folded(
    path: Path,
    files: Sequence[Path],
    added: dict[str, mx.array],
    quantisation: dict[str, Any] | None,
    dtype: mx.Dtype | None,
) -> dict[str, mx.array]:
    weights = _arrays([path])
    last = dtype or (mx.bfloat16 if quantisation else None)
    if last is None:
        return fuse_weights(weights, added)
    # In float32 until the expert is in: what is rounded is the sum.
    if quantisation:
        weights = dequantize_weights(weights, _arrays(files), quantisation, mx.float32)
    wide = {name: value.astype(mx.float32) for name, value in weights.items()}
    return {name: value.astype(last) for name, value in fuse_weights(wide, added).items()}


def _index(files: Sequence[Path], quantisation: dict[str, Any] | None) -> dict[str, Any]:
    places: dict[str, str] = {}
    for path in files:
        weights = _arrays([path])
        if quantisation:
            weights = dequantize_weights(weights, _arrays(files), quantisation, mx.bfloat16)
        places |= dict.fromkeys(sorted(weights), path.name)
    return {"metadata": {}, "weight_map": places}


def _arrays(files: Sequence[Path]) -> dict[str, mx.array]:
    """Arrays of some files; none is read before it is used."""
    found: dict[str, mx.array] = {}
    for path in files:
        weights = mx.load(str(path))
        assert isinstance(weights, dict)
        found |= weights
    return found
