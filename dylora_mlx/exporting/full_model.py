"""Export a full Hugging Face model with an expert fused into the base weights."""

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
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.base.tokenizer import PLAIN_TEMPLATE
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
"""Name prefixes of the base files that are copied unchanged: everything besides weights and config."""


def export_full_model(
    run: OpenedRun, expert: Expert, manifest: dict[str, Any], dtype: mx.Dtype | None = None
) -> Export:
    """Export the base with one expert or blend fused in. transformers and mlx-lm both load the result.

    Tensors that the expert does not change keep their stored values. A quantised base is dequantised, to bfloat16
    unless `dtype` is given.

    Args:
        run: the run.
        expert: the expert or blend to fuse.
        manifest: fields to add to the manifest.
        dtype: dtype of all exported tensors; None keeps the stored ones.
    """
    folder, updates = run.base.folder, weight_updates(expert)
    config = read_json(folder / "config.json")
    quantisation = config.pop("quantization", None)
    config.pop("quantization_config", None)
    config = explicit_config(config, run.base.args)
    if dtype is not None or quantisation:
        config["dtype"] = config["torch_dtype"] = str(dtype or mx.bfloat16).removeprefix("mlx.core.")
    content: FolderContent = {"config.json": config}
    files = sorted(folder.glob("model*.safetensors"))
    for path in files:
        content[path.name] = partial(_fused_weights, path, files, updates, quantisation, dtype)
    content |= {
        path.name: path for path in sorted(folder.iterdir()) if path.is_file() and path.name.startswith(COPIED_FILES)
    }
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content[index.name] = _weight_index(files, quantisation)
    base_manifest = formats.base_manifest(run, "merged")
    if base_manifest["prompt"] is not None:
        _add_prompt_format(content, base_manifest["prompt"], run)
    return Export(content, base_manifest | manifest)


def base_weights(base: Base) -> dict[str, mx.array]:
    """Return the weights that a full model of the base alone has, by name. They are lazy."""
    quantisation = read_json(base.folder / "config.json").get("quantization")
    files, weights = sorted(base.folder.glob("model*.safetensors")), {}
    for path in files:
        weights |= _fused_weights(path, files, {}, quantisation, None)
    return weights


def _add_prompt_format(content: FolderContent, prompt: dict[str, Any], run: OpenedRun) -> None:
    """Add the skills' prompt format: their chat template, and every token that ends an answer.

    Skills that were not learned as chats, on a base without a template, get one that passes the text on behind a BOS:
    mlx_lm.chat and chat pages would refuse the model, or make up a template.
    """
    template, own = prompt["chat_template"], run.base.tokenizer.own_template
    if template is None and own is None:
        (begin,) = run.base.tokenizer.token_texts([prompt["bos_token_id"]])
        template = PLAIN_TEMPLATE + begin + "{% for message in messages %}{{ message.content }}{% endfor %}"
    if template is not None and template != own:
        # transformers and mlx-lm read this file before the template in tokenizer_config.json.
        content["chat_template.jinja"] = template
    eos_ids = prompt["eos_token_ids"]
    if len(eos_ids) > 1:
        content["config.json"] = {**content["config.json"], "eos_token_id": eos_ids}
        path = run.base.folder / "generation_config.json"
        content[path.name] = {**(read_json(path) if path.is_file() else {}), "eos_token_id": eos_ids}


def explicit_config(config: dict[str, Any], args: Any) -> dict[str, Any]:
    """Write mlx-lm's attention and RoPE options into a config, so that transformers and mlx-lm read it alike.

    mlx-lm does not know layer_types and rope_parameters for every model family. args: mlx-lm's ModelArgs of the base.
    """
    names = ("sliding_window_pattern", "rope_theta", "rope_local_base_freq", "rope_scaling")
    known = {name: value for name, value in vars(args).items() if name in names and value is not None}
    return {**known, **{name: value for name, value in config.items() if value is not None or name not in known}}


def _fused_weights(
    path: Path,
    files: Sequence[Path],
    updates: dict[str, mx.array],
    quantisation: dict[str, Any] | None,
    dtype: mx.Dtype | None,
) -> dict[str, mx.array]:
    weights = _load_arrays([path])
    stored_dtype = dtype or (mx.bfloat16 if quantisation else None)
    if stored_dtype is None:
        return fuse_weights(weights, updates)
    # Sum in float32, so that rounding happens once, on the sum.
    if quantisation:
        weights = dequantize_weights(weights, _load_arrays(files), quantisation, mx.float32)
    float32_weights = {name: value.astype(mx.float32) for name, value in weights.items()}
    return {name: value.astype(stored_dtype) for name, value in fuse_weights(float32_weights, updates).items()}


def _weight_index(files: Sequence[Path], quantisation: dict[str, Any] | None) -> dict[str, Any]:
    file_of_weight: dict[str, str] = {}
    for path in files:
        weights = _load_arrays([path])
        if quantisation:  # for the names alone: it drops scales and biases, and being lazy it computes nothing
            weights = dequantize_weights(weights, _load_arrays(files), quantisation, mx.bfloat16)
        file_of_weight |= dict.fromkeys(sorted(weights), path.name)
    return {"metadata": {}, "weight_map": file_of_weight}


def _load_arrays(files: Sequence[Path]) -> dict[str, mx.array]:
    """Load the arrays of some files. mx.load is lazy: an array is read from disk when it is used."""
    arrays: dict[str, mx.array] = {}
    for path in files:
        weights = mx.load(str(path))
        assert isinstance(weights, dict)
        arrays |= weights
    return arrays
