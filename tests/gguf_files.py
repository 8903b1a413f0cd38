"""Small GGUF files of every supported architecture, written as llama.cpp's converter writes them, and the model inside."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
import gguf
import mlx.core as mx
import numpy as np
import sentencepiece
from mlx.utils import tree_flatten
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from dylora_mlx import assets
from tests.bases import config_of, random_model

Q = gguf.GGMLQuantizationType
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
"""Names of a block's modules in a GGUF file, by mlx-lm's; post_attention_layernorm differs between architectures."""
ARCHITECTURES = {"gemma3_text": "gemma3", "llama": "llama", "qwen3": "qwen3"}
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


class Made(NamedTuple):
    """A GGUF file and what it holds."""

    path: Path
    model: Any
    """mlx-lm's model with the weights that the file has after quantisation."""
    config: dict[str, Any]


def gguf_name(name: str, architecture: str) -> str:
    """Return a weight's name in a GGUF file, from mlx-lm's."""
    outside = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in outside or name == "lm_head.weight":
        return outside.get(name, "output.weight")
    _, _, layer, *module, kind = name.split(".")
    after = "post_attention_norm" if architecture == "gemma3" else "ffn_norm"
    return f"blk.{layer}.{ {**NAMES, 'post_attention_layernorm': after}['.'.join(module)] }.{kind}".replace(" ", "")


def neighbours(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of Llama's queries or keys as llama.cpp's converter does: row j of a head's second half follows
    row j of its first."""
    half = weight.shape[0] // heads // 2
    order = [h * 2 * half + part * half + j for h in range(heads) for j in range(half) for part in (0, 1)]
    return weight[order]


def from_neighbours(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo `neighbours`, one row after another."""
    half = weight.shape[0] // heads // 2
    order = [h * 2 * half + part * half + j for h in range(heads) for j in range(half) for part in (0, 1)]
    result = np.empty_like(weight)
    result[order] = weight
    return result


def quantised(values: np.ndarray, kind: Any, rng: np.random.Generator) -> np.ndarray:
    """Return the bytes of a tensor in a quantisation. For types that the package cannot write they are random, with
    scales that keep the values small."""
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 256, (values.shape[0], values.shape[1] // block, size), np.uint8)
        places = {Q.Q2_K: (80, 82), Q.Q3_K: (108,), Q.Q4_K: (0, 2), Q.Q5_K: (0, 2), Q.Q6_K: (208,), Q.IQ4_XS: (0,)}
        for place in places[kind]:
            scale = rng.uniform(1e-4, 4e-4, raw.shape[:2]).astype(np.float16)
            raw[..., place : place + 2] = scale[..., None].view(np.uint8)
        return raw.reshape(values.shape[0], -1)


def write_gguf(
    path: Path,
    kind: str = "llama",
    types: tuple[Any, ...] = (Q.Q8_0,),
    tokenizer: dict[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    **changes: Any,
) -> Made:
    """Write a model with random weights, of a kind of tests.bases.CONFIGS.

    Args:
        path: the file.
        kind: the kind of model.
        types: quantisations of the matrices, in turn.
        tokenizer: metadata of the tokenizer; None for `byte_level`'s.
        metadata: metadata that is added or replaces other; None as a value leaves a key out.
        drop: names of tensors to leave out.
        changes: changes of the config.
    """
    tokenizer = byte_level("smollm") if tokenizer is None else tokenizer
    count = len(tokenizer.get("tokenizer.ggml.tokens", ()))
    config = config_of(kind, **{"vocab_size": count or 256, **changes})
    model, rng = random_model(config), np.random.default_rng(5)
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, architecture)
    values = {**hyperparameters(config, architecture), **tokenizer, **(metadata or {})}
    for key, value in values.items():
        add(writer, key, value)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    loaded, number = {}, 0
    for name, array in tree_flatten(model.parameters()):
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        stored_name, weight = gguf_name(name, architecture), np.array(array)
        reordered = heads.get(stored_name.split(".")[2] if stored_name.startswith("blk.") else "")
        reordered = reordered if architecture == "llama" else None
        stored = neighbours(weight, reordered) if reordered else weight
        if architecture == "gemma3" and name.endswith("norm.weight"):
            stored = stored + np.float32(1)
        type_used = Q.F32
        if weight.ndim == 2:
            type_used = types[number % len(types)]
            number += 1
        data = stored if type_used == Q.F32 else quantised(stored, type_used, rng)
        read = gguf.quants.dequantize(data, type_used).reshape(stored.shape)
        loaded[name] = from_neighbours(read, reordered) if reordered else read
        if architecture == "gemma3" and name.endswith("norm.weight"):
            loaded[name] = loaded[name] - np.float32(1)
        if stored_name not in drop:
            raw = None if type_used in (Q.F32, Q.F16) else type_used
            writer.add_tensor(stored_name, np.ascontiguousarray(data), raw_dtype=raw)
    if config.get("rope_scaling", {}) and config["rope_scaling"]["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    # sanitize ties Gemma's head to its embedding when there are no weights of a head.
    model.load_weights(list(model.sanitize({n: mx.array(v) for n, v in loaded.items()}).items()), strict=False)
    return Made(path, model, config)


def hyperparameters(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    """Return the metadata that describes a config."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    values = {
        "general.type": "model", "block_count": config["num_hidden_layers"], "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"], "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"], "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"], "attention.key_length": head_dim,
        "attention.value_length": head_dim, "rope.freq_base": config["rope_theta"],
    }  # fmt: skip
    if architecture == "gemma3":
        values |= {"attention.sliding_window": config["sliding_window"]}
        values |= {"attention.sliding_window_pattern": config["sliding_window_pattern"]}
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") in ("linear", "yarn"):
        values |= {"rope.scaling.type": scaling["rope_type"], "rope.scaling.factor": scaling["factor"]}
    if scaling.get("rope_type") == "yarn":
        values["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    return {
        name if "." in name and name.startswith("general") else f"{architecture}.{name}": v
        for name, v in values.items()
    }


def llama3_factors(config: dict[str, Any]) -> np.ndarray:
    """Return the factors of rope_freqs.weight, as llama.cpp's converter computes them, one by one."""
    scaling, dims = config["rope_scaling"], config["head_dim"]
    low = scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
    high = scaling["original_max_position_embeddings"] / scaling["high_freq_factor"]
    factors = []
    for i in range(0, dims, 2):
        wavelength = 2 * np.pi * config["rope_theta"] ** (i / dims)
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(scaling["factor"])
        else:
            smooth = scaling["original_max_position_embeddings"] / wavelength - scaling["low_freq_factor"]
            smooth /= scaling["high_freq_factor"] - scaling["low_freq_factor"]
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, np.float32)


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add one value of the metadata with the type that llama.cpp's converter gives it."""
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def sample_texts() -> list[str]:
    """Return the packaged skills' test texts."""
    import json

    paths = sorted(assets.SKILLS.glob("*/test.jsonl"))
    return [json.loads(line)["text"] for path in paths for line in path.read_text().splitlines()[:30]]


@cache
def trained_byte_level(pre: str) -> Tokenizer:
    """Train a byte-level BPE tokenizer whose text is split as in the published tokenizer.json of that name."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(published_split(pre))
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_texts(), trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


def published_split(pre: str) -> list[Any]:
    """Return the steps of a published pre-tokenizer: SmolLM2's, Llama 3's, Qwen3's, GPT-2's."""
    import tokenizers

    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("smollm", "gpt-2"))
    if pre in ("llama-bpe", "qwen2"):
        split = tokenizers.Regex(words % ("{1,3}" if pre == "llama-bpe" else ""))
        return [pre_tokenizers.Split(split, "isolated"), byte_level]
    return [*([pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []), byte_level]


def byte_level(pre: str, **more: Any) -> dict[str, Any]:
    """Return the metadata of `trained_byte_level`."""
    import json

    model = json.loads(trained_byte_level(pre).to_str())
    vocab = {token["content"]: token["id"] for token in model["added_tokens"]} | model["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    kinds = {"<tool>": 4, "<|endoftext|>": 3, "<|im_start|>": 3, "<|im_end|>": 3}
    prefix = "tokenizer.ggml."
    return {
        f"{prefix}model": "gpt2", f"{prefix}pre": pre, f"{prefix}tokens": tokens,
        f"{prefix}token_type": [kinds.get(token, 1) for token in tokens],
        f"{prefix}merges": [" ".join(pair) for pair in model["model"]["merges"]],
        f"{prefix}bos_token_id": vocab["<|im_start|>"], f"{prefix}eos_token_id": vocab["<|im_end|>"],
        f"{prefix}padding_token_id": vocab["<|im_end|>"], f"{prefix}add_bos_token": False, "tokenizer.chat_template": CHAT,
        **more,
    }  # fmt: skip


@cache
def trained_sentencepiece(prefix_space: bool) -> sentencepiece.SentencePieceProcessor:
    """Train SentencePiece's own BPE with bytes for unknown characters, and either a space before every text like Llama 2's, or
    whole runs of spaces like Gemma's."""
    output, spaces = BytesIO(), [] if prefix_space else ["▁▁", "▁▁▁▁"]
    special = {
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
        "pad_piece": "<pad>",
        "eos_piece": "<eos>",
        "bos_piece": "<bos>",
    }
    lines = [line for text in sample_texts() for line in text.splitlines() if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=output, model_type="bpe", vocab_size=900, byte_fallback=True, minloglevel=2,
        add_dummy_prefix=prefix_space, normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=["\n", "\n\n", "<b>", *spaces], control_symbols=["<start_of_turn>", "<end_of_turn>"], **special,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=output.getvalue())


def spm(prefix_space: bool = False, **more: Any) -> dict[str, Any]:
    """Return the metadata of `trained_sentencepiece`, as llama.cpp's converter writes it: user-defined tokens with spaces."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(trained_sentencepiece(prefix_space).serialized_model_proto())
    pieces, prefix = proto.pieces, "tokenizer.ggml."
    return {
        f"{prefix}model": "llama", f"{prefix}pre": "default",
        f"{prefix}tokens": [p.piece.replace("▁", " ") if p.type == 4 else p.piece for p in pieces],
        f"{prefix}scores": [float(p.score) for p in pieces], f"{prefix}token_type": [int(p.type) for p in pieces],
        f"{prefix}bos_token_id": 2, f"{prefix}eos_token_id": 1, f"{prefix}unknown_token_id": 3, f"{prefix}padding_token_id": 0,
        f"{prefix}add_bos_token": True, f"{prefix}add_eos_token": False, f"{prefix}add_space_prefix": prefix_space, **more,
    }  # fmt: skip
