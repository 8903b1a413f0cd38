"""The text model of a Gemma 3 checkpoint with vision (4B and larger), in the layout of a Gemma 3 text model."""

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
"""Where weights of the text model lie, in mlx-lm's and in transformers' files, and their names in a text model."""
SHARED = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")
"""What the text model's config takes from the whole model's."""


def text_model_content(folder: Path) -> FolderContent:
    """The folder of the text model: every weight as it is stored, quantised ones too, under its new name.

    Raises UserError for a folder that is no such checkpoint, and for one whose config is damaged.
    """
    config = read_json(folder / "config.json")
    if config.get("model_type") != "gemma3" or not isinstance(config.get("text_config"), dict):
        raise UserError(
            f"{folder}: a '{config.get('model_type')}' model, but only Gemma 3 with vision (model_type gemma3) has a text "
            "model to take out"
        )
    names = {
        path: [name for name in tensor_offsets(path) if _own(name)]
        for path in sorted(folder.glob("model*.safetensors"))
    }
    if not any(names.values()):
        raise UserError(f"{folder}: no weights of a text model (language_model.*) in its model*.safetensors")
    found: FolderContent = {"config.json": _config(folder, config)}
    files = {path: held for path, held in names.items() if held}
    for path, held in files.items():
        found[path.name] = partial(_renamed, path, held)
    if len(files) > 1:
        places = {_own(name): path.name for path, held in files.items() for name in held}
        found["model.safetensors.index.json"] = {"metadata": {}, "weight_map": dict(sorted(places.items()))}
    return found | {p.name: p for p in sorted(folder.iterdir()) if p.is_file() and p.name.startswith(COPIED_FILES)}


def _own(name: str) -> str:
    """A weight's name in the text model, empty if it is not part of it."""
    return next((new + name[len(old) :] for old, new in PREFIXES.items() if name.startswith(old)), "")


def _config(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The text model's own config, with what mlx-lm takes for granted of it written out."""
    from mlx_lm.models import gemma3, gemma3_text

    try:
        whole = gemma3.ModelArgs.from_dict({**config, "text_config": dict(config["text_config"])})
        args = gemma3_text.ModelArgs.from_dict(whole.text_config)
    except Exception as error:  # what mlx-lm does not say of a damaged config
        raise UserError(f"{folder}: config.json has no text_config that mlx-lm can read ({error})") from error
    known = {name: value for name, value in vars(args).items() if value is not None}
    made = {**known, **config["text_config"], **{name: config[name] for name in SHARED if name in config}}
    made |= {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    for name in ("quantization", "quantization_config"):
        if isinstance(config.get(name), dict):
            made[name] = {_own(f"{key}.").rstrip(".") or key: value for key, value in config[name].items()}
    return made


def _renamed(path: Path, names: Sequence[str]) -> dict[str, mx.array]:
    weights = mx.load(str(path))
    assert isinstance(weights, dict)
    return {_own(name): weights[name] for name in names}
