"""A GGUF file of every architecture and quantisation computes what the model computes that it was written from."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map_with_path
from mlx_lm.utils import load_model

from dylora_mlx.errors import UserError
from dylora_mlx.model.base.load import load_base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.gguf.convert import convert
from dylora_mlx.model.gguf.reader import GGUFFile
from dylora_mlx.model.gguf.tensors import read_tensor
from tests import gguf_files
from tests.bases import LLAMA3, MAIN, random_model
from tests.gguf_files import Q, spm, write_gguf
from tests.tiny import alone, close

TOKENS = mx.array([[2, *range(50, 90)]])
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8}
"""Shapes whose rows are whole blocks of the K quantisations, 256 values."""
SMALL_BLOCKS = (Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1)
LARGE_BLOCKS = (Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.IQ4_XS)


VARIANTS = [
    ("llama", {"tie_word_embeddings": True, "rope_scaling": None}),
    ("llama", {"rope_scaling": LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 128}}),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}),
    ("llama", {"rope_scaling": None, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_scaling": None, "num_key_value_heads": 4, "head_dim": 16}),
    ("qwen3", {"tie_word_embeddings": False}),
    ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}}),
    ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 1e6}),
    ("gemma3", {"sliding_window_pattern": 3, "head_dim": 16, "query_pre_attn_scalar": 16}),
    ("gemma3", {"num_hidden_layers": 62, "query_pre_attn_scalar": 16}),  # 64 / 4 heads: the scale of 27B
]
"""Kinds and changes of their configs."""


@pytest.mark.parametrize("kind", MAIN)
def test_logits_of_mixed_quantisations(tmp_path, kind):
    made = write_gguf(tmp_path / "m.gguf", kind, SMALL_BLOCKS, tokenizer=spm() if kind == "gemma3" else None)
    loaded = load_base(str(made.path), "float32")
    model = RoutedDecoder(loaded, ["q_proj"], "final")
    found = model.logits(model.base_states(TOKENS, alone(41, window=model.window)))
    assert mx.array_equal(loaded.model(TOKENS), made.model(TOKENS))
    assert close(found, made.model(TOKENS), 2e-5)
    assert mx.std(found).item() > 0.5
    assert loaded.name == str(made.path)


@pytest.mark.parametrize("kind", MAIN)
def test_logits_of_k_quantisations(tmp_path, kind):
    made = write_gguf(tmp_path / "m.gguf", kind, LARGE_BLOCKS, **WIDE)
    found = load_base(str(made.path), "float32").model(TOKENS)
    assert mx.array_equal(found, made.model(TOKENS))
    assert mx.std(found).item() > 0.01


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_variants(tmp_path, kind, changes):
    made = write_gguf(tmp_path / "m.gguf", kind, (Q.F16,), **changes)
    loaded = load_base(str(made.path), "float32")
    assert close(loaded.model(TOKENS), made.model(TOKENS), 2e-5)
    args = loaded.args
    assert (args.rope_scaling or None) == (made.config.get("rope_scaling") or None)


@pytest.mark.export
@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_transformers_reads_the_config_alike(tmp_path, kind, changes):
    from dylora_mlx.exporting import torch_models

    torch = torch_models.import_torch()
    made = write_gguf(tmp_path / "m.gguf", kind, (Q.F16,), **changes)
    convert(made.path, tmp_path / "out")
    theirs = torch_models.load_torch_base(torch, tmp_path / "out", made.config["hidden_size"])
    with torch.no_grad():
        found = theirs(torch.tensor(np.array(TOKENS))).logits.numpy()
    assert np.abs(found - np.array(made.model(TOKENS))).max() < 2e-4


def test_q4_k_by_hand(tmp_path):
    """Q4_K from its description: 8 blocks of 32 with 6-bit scales and minima, four bits a value, low nibbles first."""
    made = write_gguf(tmp_path / "m.gguf", "llama", (Q.Q4_K,), **WIDE)
    file = GGUFFile(made.path)
    entry = file.tensors["blk.0.ffn_gate.weight"]
    raw = np.fromfile(made.path, np.uint8, 144, offset=entry.offset)  # the first 256 values
    scale, minimum = raw[:4].view(np.float16).astype(np.float32)
    packed, nibbles, values = raw[4:16].astype(int), raw[16:], []
    for block in range(8):
        if block < 4:
            factor, offset = packed[block] & 63, packed[block + 4] & 63
        else:
            factor = (packed[block + 4] & 15) | ((packed[block - 4] >> 6) << 4)
            offset = (packed[block + 4] >> 4) | ((packed[block] >> 6) << 4)
        bits = nibbles[block // 2 * 32 :][:32]
        bits = bits & 15 if block % 2 == 0 else bits >> 4
        values += [scale * factor * bit - minimum * offset for bit in bits.astype(np.float32)]
    assert np.allclose(read_tensor(file, "blk.0.ffn_gate.weight")[0], values, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ((Q.BF16,), "float32"),  # the norms of these random models need more than 16 bits
        ((Q.Q8_0,), "float32"),
        ((Q.F16, Q.BF16), "float32"),
    ],
)
def test_the_weights_are_exact_by_default(tmp_path, types, expected):
    made = write_gguf(tmp_path / "m.gguf", "qwen3", types)
    convert(made.path, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == (expected, expected)


@pytest.mark.parametrize(("kind", "dtype"), [(Q.BF16, "bfloat16"), (Q.F16, "float16")])
def test_a_16_bit_file_stays_16_bit_if_its_norms_are(tmp_path, monkeypatch, kind, dtype):
    def with_plain_norms(config):
        model = random_model(config)
        model.update(tree_map_with_path(lambda n, v: mx.ones_like(v) if "norm" in n else v, model.parameters()))
        return model

    monkeypatch.setattr(gguf_files, "random_model", with_plain_norms)
    made = write_gguf(tmp_path / "m.gguf", "qwen3", (kind,))
    convert(made.path, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype
    assert mx.array_equal(load_base(str(tmp_path / "out"), "float32").model(TOKENS), made.model(TOKENS))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0), ("bfloat16", 2**-8), ("float16", 2**-11)])
def test_a_chosen_dtype_rounds_to_the_nearest(tmp_path, dtype, tolerance):
    made = write_gguf(tmp_path / "m.gguf", "gemma3", (Q.Q8_0,))
    convert(made.path, tmp_path / "out", dtype)
    stored = mx.load(str(tmp_path / "out/model.safetensors"))
    assert {str(value.dtype) for value in stored.values()} == {f"mlx.core.{dtype}"}
    exact = dict(made.model.parameters()["model"]["embed_tokens"])["weight"]
    assert mx.array_equal(stored["model.embed_tokens.weight"], exact.astype(getattr(mx, dtype)))
    assert mx.abs(stored["model.norm.weight"] - made.model.model.norm.weight).max().item() <= tolerance
    assert load_model(tmp_path / "out")[0](TOKENS).shape == (1, 41, made.config["vocab_size"])


def test_gemma_of_ollama(tmp_path):
    """Names that Ollama's converter has, a cap that it wrote by mistake, and a vision tower in the same file."""
    theirs = {
        "gemma3.rope.freq_base": None, "gemma3.rope.global.freq_base": 5e5, "gemma3.rope.local.freq_base": 2e4,
        "gemma3.final_logit_softcapping": 30.0, "gemma3.attention.sliding_window_pattern": [True, False, True, False],
    }  # fmt: skip
    made = write_gguf(
        tmp_path / "sha256-0123", "gemma3", (Q.Q8_0,), spm(), theirs, rope_theta=5e5, rope_local_base_freq=2e4
    )
    loaded = load_base(str(made.path), "float32")
    assert close(loaded.model(TOKENS), made.model(TOKENS), 2e-5)
    assert (loaded.args.rope_theta, loaded.args.rope_local_base_freq, loaded.name) == (5e5, 2e4, str(made.path))


def test_gemma_with_vision_of_ollama_has_the_published_scaling(tmp_path):
    left_out = dict.fromkeys(("gemma3.rope.freq_base", "gemma3.attention.layer_norm_rms_epsilon"))
    vision = {"gemma3.vision.block_count": 27, **left_out}
    scaling = {"rope_type": "linear", "factor": 8.0}
    made = write_gguf(tmp_path / "m.gguf", "gemma3", (Q.F16,), spm(), vision, rope_theta=1e6)
    args = load_base(str(made.path), "float32").args
    assert (args.rope_scaling, args.rope_theta, args.rms_norm_eps) == (scaling, 1e6, 1e-6)


def test_gemma_without_a_window_is_global(tmp_path):
    made = write_gguf(tmp_path / "m.gguf", "gemma3", (Q.F16,), metadata={"gemma3.attention.sliding_window": None},
                      sliding_window_pattern=1, rope_theta=1e6)  # fmt: skip
    loaded = load_base(str(made.path), "float32")
    assert loaded.family.is_global == (True,) * 4
    assert close(loaded.model(TOKENS), made.model(TOKENS), 2e-5)


def test_llama_3_scaling_is_found_for_published_shapes(tmp_path):
    published = {"rope_theta": 500000.0, "head_dim": 128, "max_position_embeddings": 131072}
    for factor in (8.0, 32.0):
        scaling = LLAMA3 | {"factor": factor, "original_max_position_embeddings": 8192}
        made = write_gguf(tmp_path / f"{factor}.gguf", "llama", (Q.F16,), rope_scaling=scaling, **published)
        convert(made.path, tmp_path / f"{factor}")
        assert json.loads((tmp_path / f"{factor}/config.json").read_text())["rope_scaling"] == scaling


@pytest.mark.parametrize(
    ("kind", "metadata", "changes", "message"),
    [
        ("llama", {"llama.expert_count": 8}, {}, "a mixture of 8 experts"),
        ("llama", {"llama.rope.dimension_count": 16}, {}, "llama.rope.dimension_count is 16"),
        ("llama", {"llama.attention.scale": 0.5}, {}, "llama.attention.scale is 0.5"),
        ("llama", {"llama.attention.head_count_kv": [2, 2, 1, 2]}, {}, "head_count_kv differs between layers"),
        ("llama", {"llama.rope.scaling.type": "longrope"}, {"rope_scaling": None}, "rotary scaling 'longrope'"),
        ("qwen3", {"qwen3.rope.scaling.type": "yarn", "qwen3.rope.scaling.factor": 4.0}, {}, "original_context_length is missing"),
        ("qwen3", {"qwen3.feed_forward_length": 64}, {}, r"blk.0.ffn_gate.weight has shape \[96, 64\]"),
        ("qwen3", {"qwen3.block_count": 5}, {}, "blk.4.attn_norm.weight is missing"),
        ("qwen3", {"qwen3.block_count": 3}, {}, r"11 tensors such as blk.3.attn_\w+.weight belong to no Qwen3"),
        ("qwen3", {"qwen3.block_count": None}, {}, "qwen3.block_count is missing"),
        ("qwen3", {"qwen3.attention.head_count": 0}, {}, "is 0"),
        ("gemma3", {"gemma3.final_logit_softcapping": 30.0}, {}, "its logits are soft-capped"),
        ("gemma3", {"gemma3.attention.sliding_window_pattern": [True, False, False, True]}, {}, "no regular pattern"),
    ],
)  # fmt: skip
def test_variants_that_cannot_be_computed_are_refused(tmp_path, kind, metadata, changes, message):
    made = write_gguf(tmp_path / "m.gguf", kind, (Q.F16,), metadata=metadata, **changes)
    with pytest.raises(UserError, match=message):
        convert(made.path, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf"]


def test_rotary_factors_of_another_kind_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_files, "llama3_factors", lambda config: np.linspace(1, 9, 16, dtype=np.float32))
    made = write_gguf(tmp_path / "m.gguf", "llama", (Q.F16,))
    with pytest.raises(UserError, match=r"rope_freqs.weight are not those of Llama 3"):
        convert(made.path, tmp_path / "out")
