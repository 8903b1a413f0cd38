"""Convert the weights of a GGUF file to Hugging Face names and layouts, and write them as one safetensors file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from dylora_mlx.errors import UserError
from dylora_mlx.model.gguf import rope
from dylora_mlx.model.gguf.config import EMBEDDING, HEAD
from dylora_mlx.model.gguf.reader import GGUFFile
from dylora_mlx.model.gguf.tensors import quant_type, read_rows
from dylora_mlx.system import console

DType = Literal["float32", "bfloat16", "float16"]
CODES: dict[DType, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Name of each dtype in a safetensors header."""
EXACT: dict[str, DType] = {"BF16": "bfloat16", "F16": "float16"}
"""dtype that holds a tensor of each unquantised 16-bit type exactly."""
PROJECTIONS = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip
"""Names of a block's linear layers in a GGUF file, by mlx-lm's."""
VISION = ("v.", "mm.")
"""Beginnings of the names of a vision tower's tensors, which Ollama keeps in the same file. A text model has none."""

Transform = Callable[[np.ndarray], np.ndarray]


class Weight(NamedTuple):
    """A weight of the model: its source tensor and the transforms that convert it."""

    source: str
    """Name in the file."""
    shape: tuple[int, ...]
    whole: Transform | None = None
    """Transform that needs the whole tensor, because it reorders rows; None for no change."""
    rows: Transform | None = None
    """Transform of values that works on any subset of rows; None for no change."""


def weights(file: GGUFFile, config: dict[str, Any]) -> dict[str, Weight]:
    """Return the model's weights, by their names in Hugging Face's model.

    Args:
        file: the file.
        config: its config.json.

    Raises UserError for a tensor that is missing, differs in shape from the config, or does not belong to a model
    of this architecture.
    """
    model_weights = dict(_expected(config))
    used = {weight.source for weight in model_weights.values()}
    for name, weight in model_weights.items():
        entry = file.tensors.get(weight.source)
        if entry is None:
            raise UserError(
                f"{file.path}: the tensor {weight.source} is missing, so this is a damaged file or a variant that cannot be "
                "a base"
            )
        if entry.shape != weight.shape:
            raise UserError(
                f"{file.path}: the tensor {weight.source} has shape {list(entry.shape)}, but {name} of this model has "
                f"{list(weight.shape)}"
            )
    ignored = VISION if config["model_type"] == "gemma3_text" else ()
    unused = [n for n in file.tensors if n not in used and n != rope.FACTORS and not n.startswith(ignored)]
    if unused:
        raise UserError(
            f"{file.path}: {len(unused)} tensors such as {unused[0]} belong to no {config['architectures'][0]}, so this is "
            "a variant that cannot be a base"
        )
    return model_weights


def _expected(config: dict[str, Any]) -> Iterator[tuple[str, Weight]]:
    """Yield the name and the source of every weight that a model of this config has."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim, heads, kv_heads = (config[k] for k in ("head_dim", "num_attention_heads", "num_key_value_heads"))
    gemma, is_llama = config["model_type"] == "gemma3_text", config["model_type"] == "llama"
    norm: Transform | None = _minus_one if gemma else None
    yield "model.embed_tokens.weight", Weight(EMBEDDING, (vocab, hidden))
    yield "model.norm.weight", Weight("output_norm.weight", (hidden,), rows=norm)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", Weight(HEAD, (vocab, hidden))
    norms = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    if gemma:
        norms |= {"pre_feedforward_layernorm": "ffn_norm", "post_attention_layernorm": "post_attention_norm"}
        norms |= {"post_feedforward_layernorm": "post_ffw_norm"}
    linear = {
        "self_attn.q_proj": (heads * head_dim, hidden), "self_attn.k_proj": (kv_heads * head_dim, hidden),
        "self_attn.v_proj": (kv_heads * head_dim, hidden), "self_attn.o_proj": (hidden, heads * head_dim),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    reordered = reordered_heads(config)
    biased = {"self_attn": config.get("attention_bias"), "mlp": config.get("mlp_bias")}
    for layer in range(config["num_hidden_layers"]):
        start, block = f"model.layers.{layer}", f"blk.{layer}"
        for name, source in norms.items():
            yield f"{start}.{name}.weight", Weight(f"{block}.{source}.weight", (hidden,), rows=norm)
        if not is_llama:
            for name in ("q_norm", "k_norm"):
                yield f"{start}.self_attn.{name}.weight", Weight(f"{block}.attn_{name}.weight", (head_dim,), rows=norm)
        for name, (outputs, inputs) in linear.items():
            part, _, projection = name.partition(".")
            source = PROJECTIONS[projection]
            whole = halves_first(reordered[projection]) if projection in reordered else None
            yield f"{start}.{name}.weight", Weight(f"{block}.{source}.weight", (outputs, inputs), whole)
            if biased[part]:
                yield f"{start}.{name}.bias", Weight(f"{block}.{source}.bias", (outputs,), whole)


def reordered_heads(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the heads of the projections whose rows llama.cpp's converter reorders: queries and keys of a Llama.

    llama.cpp rotates neighbouring dimensions of a Llama's head, and the two halves of any other's.
    """
    if config["model_type"] != "llama":
        return {}
    return {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}


def _minus_one(values: np.ndarray) -> np.ndarray:
    """Subtract the 1 that llama.cpp's converter adds to Gemma's norm weights, because llama.cpp's norm does not add it."""
    return values - np.float32(1)


def halves_first(heads: int) -> Transform:
    """Return a function that reorders each head's rows from neighbouring rotary pairs to pairs of its two halves."""

    def reorder(values: np.ndarray) -> np.ndarray:
        pairs = values.reshape(heads, -1, 2, *values.shape[1:])
        return np.swapaxes(pairs, 1, 2).reshape(values.shape)

    return reorder


def neighbours_first(heads: int) -> Transform:
    """Return the inverse of `halves_first`, the order of a GGUF file."""

    def reorder(values: np.ndarray) -> np.ndarray:
        halves = values.reshape(heads, 2, -1, *values.shape[1:])
        return np.swapaxes(halves, 1, 2).reshape(values.shape)

    return reorder


def exact_dtype(file: GGUFFile, model_weights: dict[str, Weight]) -> DType:
    """Return the narrowest dtype that holds every weight exactly: float32 for a quantised file."""
    kinds = {quant_type(file, weight.source).name for weight in model_weights.values()}
    dtypes: set[DType] = {EXACT.get(kind, "float32") for kind in kinds - {"F32"}}
    if len(dtypes) != 1 or (dtype := dtypes.pop()) == "float32":
        return "float32"
    # In a 16-bit file the norms are float32, but usually hold no more than 16 bits.
    norms = (w for w in model_weights.values() if quant_type(file, w.source).name == "F32")
    exact = all((_decode(_encode(rows, dtype), dtype) == rows).all() for w in norms for rows in _rows(file, w))
    return dtype if exact else "float32"


def write_weights(path: Path, file: GGUFFile, model_weights: dict[str, Weight], dtype: DType) -> None:
    """Write a safetensors file, piece by piece, so that only one piece is in memory at a time.

    Raises UserError as `tensors.read_rows` does, or for values beyond float16; OSError for a disk that is full.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin, size = 0, 4 if dtype == "float32" else 2
    for name in sorted(model_weights):
        end = begin + size * math.prod(model_weights[name].shape)
        header[name] = {"dtype": CODES[dtype], "shape": list(model_weights[name].shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # readers map the data, which must be aligned
    with path.open("wb") as output:
        output.write(len(text).to_bytes(8, "little") + text)
        for name in console.track(sorted(model_weights), f"converting {file.path.name}", len(model_weights)):
            for rows in _rows(file, model_weights[name]):
                if dtype == "float16" and np.abs(rows).max() > np.finfo(np.float16).max:
                    raise UserError(
                        f"{file.path}: {name} has values beyond float16; choose --dtype bfloat16 or float32"
                    )
                output.write(_encode(rows, dtype).tobytes())


def _rows(file: GGUFFile, weight: Weight) -> Iterator[np.ndarray]:
    """Yield a weight's values, float32, in pieces of whole rows."""
    pieces = read_rows(file, weight.source)
    if weight.whole is not None:
        pieces = iter([weight.whole(np.concatenate(list(pieces)).reshape(weight.shape))])
    for rows in pieces:
        yield rows if weight.rows is None else weight.rows(rows)


def _encode(values: np.ndarray, dtype: DType) -> np.ndarray:
    """Round float32 values to a dtype, to nearest, ties to even. bfloat16 is returned as its 16 bits."""
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype("<f2")
    if dtype == "float32":
        return values.astype("<f4", copy=False)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _decode(values: np.ndarray, dtype: DType) -> np.ndarray:
    return (values.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else values.astype(np.float32)
