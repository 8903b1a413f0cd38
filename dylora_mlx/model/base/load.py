"""Load a frozen base model through mlx-lm, with a tokenizer that is loaded on first use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from dylora_mlx import assets
from dylora_mlx.config import ATTENTION, MLP
from dylora_mlx.errors import UserError
from dylora_mlx.model.base import device, families
from dylora_mlx.model.base.device import StepShape
from dylora_mlx.model.base.families import Family
from dylora_mlx.model.base.tokenizer import Tokenizer, tokenizer_error
from dylora_mlx.model.gguf.convert import cached_folder
from dylora_mlx.model.gguf.reader import is_gguf
from dylora_mlx.system import console
from dylora_mlx.system.files import is_number, tensor_offsets

SAMPLED_BYTES = 1 << 16
"""Bytes that the fingerprint reads from the start of each tensor."""


@dataclass(frozen=True)
class Base:
    """A frozen base: mlx-lm's model of a supported family, its tokenizer, and its identity."""

    model: Any
    """mlx-lm's model."""
    tokenizer: Any
    """A `Tokenizer`; None for a base that was built without one."""
    name: str
    """Name under which others can load the base: a path, a hub id, or `embedded`."""
    folder: Path
    """Folder of the model's files; for a GGUF file the one that it was converted to."""
    fingerprint: str
    """sha256 over the config and a part of every weight. Checkpoints and libraries are bound to it."""

    @property
    def args(self) -> Any:
        """mlx-lm's model arguments."""
        return self.model.args

    @cached_property
    def family(self) -> Family:
        """The model's family."""
        return families.family_of(self.args)

    @cached_property
    def tokenizer_hash(self) -> str:
        """sha256 of the tokenizer's main file; empty if the folder has none."""
        files = [self.folder / name for name in ("tokenizer.json", "tokenizer.model") if (self.folder / name).is_file()]
        return hashlib.sha256(files[0].read_bytes()).hexdigest() if files else ""

    @property
    def dtype(self) -> mx.Dtype:
        """dtype of the unquantised weights."""
        return self.model.model.norm.weight.dtype

    @cached_property
    def context_length(self) -> int:
        """Context length in tokens, the config's max_position_embeddings; 32768 if it states none."""
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        max_positions = config.get("max_position_embeddings")
        return int(max_positions) if is_number(max_positions) and max_positions >= 1 else 32768

    @property
    def is_quantized(self) -> bool:
        """Whether any linear layer is quantised by mlx-lm."""
        return any(isinstance(module, nn.QuantizedLinear) for module in self.model.modules())

    def step_shape(self, rows: int, length: int) -> StepShape:
        """Return what a training step of micro-batches [rows, length] needs, for `device.set_memory_limits`."""
        widest = max(outputs for _, outputs in (self.projection_shape(0, name) for name in ATTENTION + MLP))
        return StepShape(self.args.num_hidden_layers, rows * length * widest * self.dtype.size)

    def projection(self, layer: int, name: str) -> nn.Module:
        """Return the linear layer `name`, for example q_proj, of block `layer`."""
        block = self.model.model.layers[layer]
        return (block.self_attn if name in ATTENTION else block.mlp)[name]

    def projection_shape(self, layer: int, name: str) -> tuple[int, int]:
        """Return (inputs, outputs) of a projection, quantised or not."""
        linear: Any = self.projection(layer, name)
        outputs, inputs = linear.weight.shape
        # Quantised weights are packed into 32-bit words along the inputs.
        return (inputs * 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else inputs), outputs


def load_base(
    name: str, dtype: Literal["auto", "float32", "bfloat16"] = "auto", chat_template: str | None = None
) -> Base:
    """Load the base `embedded`, a local folder, a GGUF file or a hub id; the weights are frozen and cast to `dtype`.

    `auto` selects float32 on a CPU and bfloat16 on a GPU. The tokenizer is loaded and checked on its first use. It has
    `chat_template`, Jinja text, in place of its own chat template, if that is given.

    Raises UserError if the folder or repository is missing, gated, unreachable or without weights, or if the model
    belongs to no supported family.
    """
    folder = locate_base(name)
    config = _read_config(folder, name)
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no weights (model*.safetensors) in this folder")
    _check_layers(folder, files, config.get("num_hidden_layers"))
    _check_tokenizer(folder)
    from mlx_lm.utils import load_model

    try:
        # Lazily: the weights of the file and the cast ones are never held at once.
        model, _ = load_model(folder, lazy=True, model_config=families.rope_settings(config))
        families.family_of(model.args)
        _cast(model, _resolve_dtype(dtype))
        # Evaluate the whole module, not only its parameters: RoPE frequencies are not parameters, and a lazy array
        # belongs to the thread that created it.
        mx.eval(model)
    except Exception as error:  # mlx-lm raises many types for a damaged config or weights
        raise tokenizer_error(folder, error) from error
    model.freeze()
    model.eval()
    device.release_freed_memory()  # buffers in the dtype of the file
    display_name = str(folder) if name != "embedded" and Path(name).is_dir() else name
    return Base(model, Tokenizer(folder, chat_template), display_name, folder, fingerprint(folder, config))


def load_tokenizer(name: str, chat_template: str | None = None) -> Tokenizer:
    """Return the tokenizer that `load_base` gives a base, without the weights, which are not even downloaded.

    Raises UserError as `load_base` does.
    """
    folder = locate_base(name, weights=False)
    _read_config(folder, name)
    _check_tokenizer(folder)
    return Tokenizer(folder, chat_template)


def _check_tokenizer(folder: Path) -> None:
    if not list(folder.glob("tokenizer.*")):
        raise UserError(f"{folder}: no tokenizer (tokenizer.json or tokenizer.model) in this folder")


def _check_layers(folder: Path, files: Sequence[Path], num_layers: object) -> None:
    """Check, before the model is built, that the files are whole and have at least one tensor per configured layer."""
    try:
        count = sum(len(tensor_offsets(path)) for path in files)
    except UserError as error:
        raise tokenizer_error(folder, error) from error
    if isinstance(num_layers, (int, float)) and num_layers > count:  # also for integers too large for a float
        raise UserError(f"{folder}: config.json says {str(num_layers)[:12]} layers, the weights hold {count} tensors")


def _resolve_dtype(dtype: str) -> mx.Dtype:
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    if dtype == "auto":
        # On MLX's CPU backend, bfloat16 matmuls do not use the fast BLAS.
        return mx.float32 if on_cpu else mx.bfloat16
    if dtype == "bfloat16" and on_cpu:
        _warn_of_slow_dtype()
    return {"float32": mx.float32, "bfloat16": mx.bfloat16}[dtype]


@cache
def _warn_of_slow_dtype() -> None:
    """Warn once in a process."""
    console.warn("bfloat16 on a CPU takes about six times as long as float32, which model.dtype auto chooses here")


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Cast the floating-point parameters.

    Packed quantised weights stay unchanged. The scales and biases of an affine quantisation are cast like any weight.
    Arrays are read and cast one at a time, the largest first, so that the memory beyond the cast weights is small.
    """

    def cast(value: mx.array) -> mx.array:
        return value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) else value

    model.update(tree_map(cast, model.parameters()))
    for value in sorted(dict(tree_flatten(model.parameters())).values(), key=lambda value: -value.nbytes):
        mx.eval(value)
        mx.clear_cache()


def locate_base(name: str, weights: bool = True) -> Path:
    """Return the folder of `embedded`, of a local folder or of a hub id, which is downloaded if needed.

    A GGUF file is converted to a folder in the cache. Without `weights`, those of a hub id are not downloaded.

    Raises UserError as `load_base` does.
    """
    if name == "embedded":
        return assets.BASE
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if is_gguf(path):
        return cached_folder(path)
    if path.suffix == ".gguf":
        raise UserError(
            f"{name}: not a GGUF file, it begins with other bytes; download or copy it again"
            if path.exists()
            else f"{name}: no such file; check the path"
        )
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"{name}: no such folder; model.base is embedded, a folder, a GGUF file, or a hub id such as "
            "google/gemma-3-270m"
        )
    return _download(name, weights)


def _download(name: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    patterns = ["*.json", "*.jinja", "tokenizer*", *(["model*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except GatedRepoError as error:
        raise UserError(
            f"{name}: this model is gated; accept its licence at https://huggingface.co/{name} and run `hf auth login`, "
            "or give the path of a local copy in model.base"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{name}: no such model on the hub, or no access; check the name or run `hf auth login`"
        ) from error
    except Exception as error:  # errors of connection, proxy or disk have many types
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise UserError(
            f"{name}: cannot be downloaded ({reason}); check the connection or give a local path in model.base"
        ) from error


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        files = sorted(path.name for path in folder.glob("*.gguf"))
        hint = f"; give a GGUF file by its own path, such as {folder / files[0]}" if files else ""
        raise UserError(f"{folder}: no config.json, so not a model folder{hint}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file") from error
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type == "gemma3":
        raise UserError(
            f"{name}: a Gemma 3 model with vision (model_type gemma3); extract its text model with dylora convert-base "
            f"{name} --out FOLDER and give that folder in model.base"
        )
    if not isinstance(model_type, str) or model_type not in families.FAMILIES:
        known = ", ".join(families.FAMILIES)
        raise UserError(f"{name}: a '{model_type}' model, but the base must be one of model_type {known}")
    if config.get("model_file") is not None:  # older versions of mlx-lm would execute this file
        raise UserError(
            f"{name}: its config.json names custom code (model_file), which is never run; give a model without it"
        )
    return config


def fingerprint(folder: Path, config: dict[str, Any]) -> str:
    """Return a sha256 over the architecture, each weight file's name and header, and the beginning of every tensor.

    The first tensors alone are not enough: a fine-tuned model often keeps the embedding, which comes first. Raises
    UserError for a file that is not in the safetensors format.
    """
    digest = hashlib.sha256()
    volatile = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
    digest.update(json.dumps({k: v for k, v in config.items() if k not in volatile}, sort_keys=True).encode())
    for path in sorted(folder.glob("model*.safetensors")):
        digest.update(path.name.encode())
        offsets = tensor_offsets(path)
        with path.open("rb") as file:
            digest.update(file.read(int.from_bytes(file.read(8), "little")))
            for begin, end in offsets.values():
                file.seek(begin)
                digest.update(file.read(min(end - begin, SAMPLED_BYTES)))
    return digest.hexdigest()
