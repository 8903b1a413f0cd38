"""Build config.json from a GGUF file's metadata, with one function per architecture.

Options are written under the names that mlx-lm and transformers both read. Missing metadata gets the value that
llama.cpp assumes, except where Ollama's converter omits it for Gemma 3 and the published models have another value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dylora_mlx.errors import UserError
from dylora_mlx.model.gguf import rope
from dylora_mlx.model.gguf.reader import GGUFFile

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
"""Names of the tensors of the embedding and, unless the embedding is also the head, of the head."""
GEMMA3_27B_LAYERS = 62
"""Layers of Gemma 3 27B, the only size whose attention is not scaled by the head's dimensions."""


def model_config(file: GGUFFile) -> dict[str, Any]:
    """Return config.json without the token ids, which belong to the tokenizer, and without the dtype.

    Raises UserError for a file that holds no model of a supported architecture, or a variant that mlx-lm cannot compute.
    """
    return ARCHITECTURES[_supported(file)](file)


def _supported(file: GGUFFile) -> str:
    """Return the file's architecture. Raises UserError for an unsupported one, and for a file that is not a model."""
    kind = file.metadata.get("general.type", "model")
    if kind == "adapter" or "adapter.type" in file.metadata:
        raise UserError(f"{file.path}: a LoRA adapter, not a model; give the GGUF file of the model itself")
    if file.architecture == "clip" or kind == "mmproj":
        raise UserError(
            f"{file.path}: a projector of images (mmproj), not a language model; give the GGUF file of the model itself"
        )
    if file.architecture not in ARCHITECTURES:
        raise UserError(
            f"{file.path}: a GGUF file of architecture {file.architecture[:40]!r}, but a base must be one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    if EMBEDDING not in file.tensors:
        raise UserError(
            f"{file.path}: holds no weights ({EMBEDDING} is missing); give the GGUF file of the model itself"
        )
    return file.architecture


def _common(file: GGUFFile) -> dict[str, Any]:
    """Return the options that all architectures have."""
    heads, hidden = file.integer("attention.head_count"), file.integer("embedding_length")
    if not heads or not hidden:
        raise UserError(
            f"{file.path}: {file.architecture_key('attention.head_count')} or {file.architecture_key('embedding_length')} is 0"
        )
    if file.integer("expert_count", 0):
        raise UserError(
            f"{file.path}: a mixture of {file.integer('expert_count')} experts; a base must be a dense model"
        )
    layers = file.integer("block_count")
    if layers > len(file.tensors):
        raise UserError(
            f"{file.path}: {file.architecture_key('block_count')} is {layers}, but the file has {len(file.tensors)} tensors"
        )
    head_dim = file.integer("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if file.integer(key, head_dim) != head_dim:
            raise UserError(
                f"{file.path}: {file.architecture_key(key)} is {file.integer(key)}, but mlx-lm's model needs it equal to the "
                f"{head_dim} dimensions of a head"
            )
    for key in ("attention.clamp_kqv", "attn_logit_softcapping", "logit_scale", "residual_scale", "embedding_scale"):
        if file.number(key, 0.0) not in (0.0, 1.0):
            raise UserError(
                f"{file.path}: {file.architecture_key(key)} is {file.number(key):g}, which mlx-lm's model does not have"
            )
    return {
        "hidden_size": hidden,
        "intermediate_size": file.integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": file.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": file.integer("context_length"),
        "vocab_size": file.tensors[EMBEDDING].shape[0],
        "tie_word_embeddings": HEAD not in file.tensors,
        "attention_dropout": 0.0,
    }


def gemma3(file: GGUFFile) -> dict[str, Any]:
    """Return the config of the text model of Gemma 3."""
    config = _common(file)
    layers, head_dim = config["num_hidden_layers"], config["head_dim"]
    # Ollama's first converter wrote a cap of 30 to every Gemma 3, although these models have none. It also had names of
    # its own for the bases of the rotary embedding, by which its files are known.
    by_ollama = file.architecture_key("rope.global.freq_base") in file.metadata
    if file.number("final_logit_softcapping", 0.0) and not by_ollama:
        raise UserError(f"{file.path}: its logits are soft-capped, which mlx-lm's Gemma 3 does not do")
    window = file.integer("attention.sliding_window", 0)
    period = _sliding_period(file, layers) if window else 1
    return config | {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": (
            config["hidden_size"] // config["num_attention_heads"] if layers == GEMMA3_27B_LAYERS else head_dim
        ),
        "rms_norm_eps": file.number("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": file.number("rope.freq_base", file.number("rope.global.freq_base", 1_000_000.0)),
        "rope_local_base_freq": file.number("rope.freq_base_swa", file.number("rope.local.freq_base", 10_000.0)),
        "rope_scaling": rope.scaling(file) or _scaling_left_out(file),
        "sliding_window": window or config["max_position_embeddings"],
        "sliding_window_pattern": period,
        "layer_types": [
            "full_attention" if layer % period == period - 1 else "sliding_attention" for layer in range(layers)
        ],
    }


def _scaling_left_out(file: GGUFFile) -> dict[str, Any] | None:
    """Return the published scaling of Gemma 3 with vision if Ollama's converter omitted it, as it does for them."""
    has_vision = file.architecture_key("vision.block_count") in file.metadata
    stated = any(file.architecture_key(key) in file.metadata for key in ("rope.freq_base", "rope.scaling.type"))
    return {"rope_type": "linear", "factor": 8.0} if has_vision and not stated else None


def _sliding_period(file: GGUFFile, layers: int) -> int:
    """Return n if every n-th layer is global and the others slide. Raises UserError for any other pattern."""
    stated = file.metadata.get(file.architecture_key("attention.sliding_window_pattern"), 6)
    if isinstance(stated, list):
        slides = [bool(entry) for entry in stated]
        period = slides.index(False) + 1 if False in slides else layers + 1
        if len(slides) != layers or any(slides[i] == (i % period == period - 1) for i in range(layers)):
            raise UserError(
                f"{file.path}: its sliding layers follow no regular pattern, which mlx-lm's Gemma 3 cannot compute"
            )
        return period
    if type(stated) is not int or stated < 1:
        raise UserError(f"{file.path}: {file.architecture_key('attention.sliding_window_pattern')} is {stated!r:.40}")
    return stated


def llama(file: GGUFFile) -> dict[str, Any]:
    """Return the config of a Llama, or of a model built like it, such as SmolLM2 or Mistral."""
    config = _common(file)
    scale = file.number("attention.scale", 0.0)
    if scale and not np.isclose(scale, config["head_dim"] ** -0.5):
        raise UserError(
            f"{file.path}: {file.architecture_key('attention.scale')} is {scale:g}, which mlx-lm's Llama does not have"
        )
    return config | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "hidden_act": "silu",
        "rms_norm_eps": file.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": file.number("rope.freq_base", 10_000.0),
        "rope_scaling": rope.scaling(file),
    }


def qwen3(file: GGUFFile) -> dict[str, Any]:
    """Return the config of a dense Qwen3."""
    return _common(file) | {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "hidden_act": "silu",
        "rms_norm_eps": file.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": file.number("rope.freq_base", 10_000.0),
        "rope_scaling": rope.scaling(file),
    }


ARCHITECTURES: dict[str, Callable[[GGUFFile], dict[str, Any]]] = {"gemma3": gemma3, "llama": llama, "qwen3": qwen3}
"""Functions that build the config, by the value of general.architecture."""
ARCHITECTURE_OF = {"gemma3_text": "gemma3", "llama": "llama", "qwen3": "qwen3"}
"""Values of general.architecture by the model_type of config.json."""
