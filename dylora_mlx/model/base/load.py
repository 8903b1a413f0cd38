"""Load a frozen base through mlx-lm, and its tokenizer once that is needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from dylora_mlx import assets
from dylora_mlx.config import ATTENTION
from dylora_mlx.errors import UserError
from dylora_mlx.model.base import families
from dylora_mlx.model.base.families import Family
from dylora_mlx.model.base.tokenizer import Tokenizer, tokenizer_error
from dylora_mlx.system.files import is_number, tensor_offsets

SAMPLED_BYTES = 1 << 16
"""Bytes of each tensor that the fingerprint reads."""


@dataclass(frozen=True)
class Base:
    """A frozen base: mlx-lm's model of one of our families, its tokenizer, and what identifies it.

    name: as others can load it (a path or a hub id); fingerprint: sha256 over the config and a part of every weight,
    which checkpoints and libraries are bound to.
    """

    model: Any
    tokenizer: Any
    name: str
    folder: Path
    fingerprint: str

    @property
    def args(self) -> Any:
        return self.model.args

    @cached_property
    def family(self) -> Family:
        return families.family_of(self.args)

    @cached_property
    def tokenizer_hash(self) -> str:
        """sha256 over the tokenizer's own file; empty if the folder has none."""
        found = [self.folder / name for name in ("tokenizer.json", "tokenizer.model") if (self.folder / name).is_file()]
        return hashlib.sha256(found[0].read_bytes()).hexdigest() if found else ""

    @property
    def dtype(self) -> mx.Dtype:
        return self.model.model.norm.weight.dtype

    @cached_property
    def context_length(self) -> int:
        """Tokens that the base was made to read at a time."""
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        stated = config.get("max_position_embeddings")
        return int(stated) if is_number(stated) and stated >= 1 else 32768

    @property
    def is_quantized(self) -> bool:
        """Whether any of the projections is held in fewer bits, as mlx-lm quantises them."""
        return any(isinstance(module, nn.QuantizedLinear) for module in self.model.modules())

    def projection(self, layer: int, name: str) -> nn.Module:
        """The linear layer `name` (such as q_proj) of block `layer`."""
        block = self.model.model.layers[layer]
        return (block.self_attn if name in ATTENTION else block.mlp)[name]

    def projection_shape(self, layer: int, name: str) -> tuple[int, int]:
        """(inputs, outputs) of a projection, quantised or not."""
        linear: Any = self.projection(layer, name)
        outputs, inputs = linear.weight.shape
        return (inputs * 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else inputs), outputs


def load_base(name: str, dtype: Literal["auto", "float32", "bfloat16"] = "auto") -> Base:
    """Load `embedded`, a local folder or a hub id; weights are frozen and cast to `dtype`.

    Raises UserError when the folder or repository is missing, gated, unreachable, without weights, or a model of no
    family that we know. The tokenizer is loaded, and checked, when it is first used.
    """
    folder = locate_base(name)
    config = _read_config(folder, name)
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no weights (model*.safetensors) in this folder")
    _check_layers(folder, files, config.get("num_hidden_layers"))
    if not list(folder.glob("tokenizer.*")):
        raise UserError(f"{folder}: no tokenizer (tokenizer.json or tokenizer.model) in this folder")
    from mlx_lm.utils import load_model

    try:
        model, _ = load_model(folder, model_config=families.rope_settings(config))
        families.family_of(model.args)
    except Exception as error:  # of a damaged config or weights: mlx-lm raises many types
        raise tokenizer_error(folder, error) from error
    _cast(model, _resolve_dtype(dtype))
    model.freeze()
    model.eval()
    # All of it: rotary frequencies are no parameters, and what is lazy belongs to the thread that made it.
    mx.eval(model)
    shown = str(folder) if name != "embedded" and Path(name).exists() else name
    return Base(model, Tokenizer(folder), shown, folder, fingerprint(folder, config))


def _check_layers(folder: Path, files: Sequence[Path], stated: object) -> None:
    """Before the model is made: whole files, and no more layers than they hold tensors."""
    try:
        count = sum(len(tensor_offsets(path)) for path in files)
    except UserError as error:
        raise tokenizer_error(folder, error) from error
    if isinstance(stated, (int, float)) and stated > count:  # also whole numbers beyond any float
        raise UserError(f"{folder}: config.json says {str(stated)[:12]} layers, the weights hold {count} tensors")


def _resolve_dtype(dtype: str) -> mx.Dtype:
    if dtype == "auto":
        # bfloat16 matrix products on MLX's CPU backend do not reach the fast BLAS.
        return mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.bfloat16
    return {"float32": mx.float32, "bfloat16": mx.bfloat16}[dtype]


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """What is packed in fewer bits stays as it is; an affine quantisation's scales and biases are cast like any weight."""

    def cast(value: mx.array) -> mx.array:
        return value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) else value

    model.update(tree_map(cast, model.parameters()))


def locate_base(name: str) -> Path:
    """The folder of `embedded`, a local folder or a hub id, downloaded if need be. Raises UserError as `load` does."""
    if name == "embedded":
        return assets.BASE
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"{name}: no such folder; model.base is embedded, a folder, or a hub id such as google/gemma-3-270m"
        )
    return _download(name)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.jinja", "model*.safetensors", "tokenizer*"]))
    except GatedRepoError as error:
        raise UserError(
            f"{name}: this model is gated; accept its licence at https://huggingface.co/{name} and run `hf auth login`, "
            "or give the path of a local copy in model.base"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{name}: no such model on the hub, or no access; check the name or run `hf auth login`"
        ) from error
    except Exception as error:  # connection, proxy, disk: many types, one remedy
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise UserError(
            f"{name}: cannot be downloaded ({reason}); check the connection or give a local path in model.base"
        ) from error


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no config.json, so not a model folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind == "gemma3":
        raise UserError(
            f"{name}: a Gemma 3 model with vision (model_type gemma3); dylora text-base {name} --out FOLDER takes its text "
            "model out, give that folder in model.base"
        )
    if not isinstance(kind, str) or kind not in families.FAMILIES:
        known = ", ".join(families.FAMILIES)
        raise UserError(f"{name}: a '{kind}' model, but the base must be one of model_type {known}")
    if config.get("model_file") is not None:  # older mlx-lm would run it
        raise UserError(
            f"{name}: its config names code of its own (model_file), which is never run; give a plain model"
        )
    return config


def fingerprint(folder: Path, config: dict[str, Any]) -> str:
    """sha256 over the architecture, each weight file's name and header, and the beginning of every tensor in it.

    The first tensors alone would not do: a fine-tuned model often keeps the embedding, which comes first. Raises UserError
    for a file that is no safetensors file.
    """
    digest = hashlib.sha256()
    volatile = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
    digest.update(json.dumps({k: v for k, v in config.items() if k not in volatile}, sort_keys=True).encode())
    for path in sorted(folder.glob("model*.safetensors")):
        digest.update(path.name.encode())
        places = tensor_offsets(path)
        with path.open("rb") as file:
            digest.update(file.read(int.from_bytes(file.read(8), "little")))
            for begin, end in places.values():
                file.seek(begin)
                digest.update(file.read(min(end - begin, SAMPLED_BYTES)))
    return digest.hexdigest()
