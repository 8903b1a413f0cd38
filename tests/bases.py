"""Small bases of every supported family, with random weights, in mlx-lm's folder layout; also quantised by mlx_lm.convert."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.utils import _get_classes

from dylora_mlx import assets

SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "vocab_size": 4096, "rms_norm_eps": 1e-6, "max_position_embeddings": 512, "bos_token_id": 2,
    "eos_token_id": 1, "rope_theta": 10000.0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "query_pre_attn_scalar": 32,
        "sliding_window": 16, "sliding_window_pattern": 2, "tie_word_embeddings": True,
    },
    "llama": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_scaling": LLAMA3, "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "llama-sliding": {
        "model_type": "llama", "sliding_window": 16, "attention_bias": True, "mlp_bias": True, "head_dim": None,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "tie_word_embeddings": True,
    },
    "llama-neighbours": {"model_type": "llama", "rope_traditional": True, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
}  # fmt: skip
"""Config entries of each family, or variant of one, in addition to SHAPE."""
MAIN = ("gemma3", "llama", "qwen3")
"""The supported families, without variants."""


def config_of(kind: str, **changes: Any) -> dict[str, Any]:
    """Return the config.json of a family or variant."""
    return {**SHAPE, **CONFIGS[kind], **changes}


def random_model(config: dict[str, Any], size: float = 0.15) -> Any:
    """Return mlx-lm's model of a config, with seeded random weights of standard deviation `size`."""
    model_class, args_class = _get_classes(config)
    model, rng = model_class(args_class.from_dict(config)), np.random.default_rng(3)
    # Gemma's RMSNorm adds 1 to its weight.
    norm_weight = 0.0 if config["model_type"].startswith("gemma3") else 1.0

    def random_array(name: str, value: mx.array) -> mx.array:
        normal = rng.normal(0, 1, value.shape).astype(np.float32)
        return mx.array(norm_weight + 0.2 * normal if "norm" in name else size * normal)

    model.update(tree_map_with_path(random_array, model.parameters()))
    return model


def write(folder: Path, config: dict[str, Any], dtype: mx.Dtype = mx.float32, size: float = 0.15) -> Path:
    """Write a folder with config.json, model.safetensors and the embedded base's tokenizer; return it."""
    folder.mkdir(parents=True)
    weights = dict(tree_flatten(random_model(config, size).parameters()))
    if config.get("tie_word_embeddings"):
        weights.pop("lm_head.weight", None)
    cast_weights = {name: value.astype(dtype) for name, value in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), cast_weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps({n: v for n, v in config.items() if v is not None}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(assets.BASE / name, folder / name)
    return folder


def quantised(folder: Path, out: Path, bits: int, group: int = 32, mode: str = "affine") -> Path:
    """Quantise the model of a folder with `mlx_lm.convert -q`; return the new folder."""
    from mlx_lm import convert

    convert(str(folder), str(out), quantize=True, q_bits=bits, q_group_size=group, q_mode=mode)
    return out
