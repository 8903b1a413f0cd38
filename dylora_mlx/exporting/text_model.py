"""Extract the text model of a Gemma 3 checkpoint with vision (4B and larger) as a Gemma 3 text checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from dylora_mlx.errors import UserError
from dylora_mlx.exporting.folder import FolderContent
from dylora_mlx.exporting.full_model import COPIED_FILES
from dylora_mlx.system.files import read_json, tensor_offsets

PREFIXES = {"language_model.model.": "model.", "language_model.lm_head.": "lm_head.", "model.language_model.": "model."}
"""Prefixes of text weights in mlx-lm's and transformers' vision checkpoints -> prefixes in a text checkpoint."""
SHARED = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")
"""Config fields that the text model takes from the vision model's top level."""


def text_model_content(folder: Path) -> FolderContent:
    """Return the files of the text checkpoint. Weights keep their stored values, quantised ones too; names change.

    Raises UserError for a folder that is not a Gemma 3 vision checkpoint, and for a damaged config.
    """
    config = read_json(folder / "config.json")
    if config.get("model_type") != "gemma3" or not isinstance(config.get("text_config"), dict):
        raise UserError(
            f"{folder}: a '{config.get('model_type')}' model, but only Gemma 3 with vision (model_type gemma3) has a text "
            "model to take out; other folders are given in model.base as they are"
        )
    names = {
        path: [name for name in tensor_offsets(path) if _text_model_name(name)]
        for path in sorted(folder.glob("model*.safetensors"))
    }
    if not any(names.values()):
        raise UserError(f"{folder}: no weights of a text model (language_model.*) in its model*.safetensors")
    content: FolderContent = {"config.json": _config(folder, config)}
    files = {path: stored_names for path, stored_names in names.items() if stored_names}
    for path, stored_names in files.items():
        content[path.name] = partial(_load_renamed, path, stored_names)
    if len(files) > 1:
        file_of_weight = {
            _text_model_name(name): path.name for path, stored_names in files.items() for name in stored_names
        }
        content["model.safetensors.index.json"] = {"metadata": {}, "weight_map": dict(sorted(file_of_weight.items()))}
    return content | {p.name: p for p in sorted(folder.iterdir()) if p.is_file() and p.name.startswith(COPIED_FILES)}


def _text_model_name(name: str) -> str:
    """Return a weight's name in the text checkpoint, or an empty string if the text model does not have it."""
    return next((new + name[len(old) :] for old, new in PREFIXES.items() if name.startswith(old)), "")


def _config(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the text model's config, with mlx-lm's default values written out."""
    from mlx_lm.models import gemma3, gemma3_text

    try:
        full_args = gemma3.ModelArgs.from_dict({**config, "text_config": dict(config["text_config"])})
        args = gemma3_text.ModelArgs.from_dict(full_args.text_config)
    except Exception as error:  # mlx-lm does not document what it raises for a damaged config
        raise UserError(f"{folder}: config.json has no text_config that mlx-lm can read ({error})") from error
    explicit = {name: value for name, value in vars(args).items() if value is not None}
    text_config = {**explicit, **config["text_config"], **{name: config[name] for name in SHARED if name in config}}
    text_config |= {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    for name in ("quantization", "quantization_config"):
        if isinstance(config.get(name), dict):
            text_config[name] = {
                _text_model_name(f"{key}.").rstrip(".") or key: value for key, value in config[name].items()
            }
    return text_config


def _load_renamed(path: Path, names: Sequence[str]) -> dict[str, mx.array]:
    weights = mx.load(str(path))
    assert isinstance(weights, dict)
    return {_text_model_name(name): weights[name] for name in names}
