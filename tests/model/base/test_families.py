"""Every model family, full and quantised: mlx-lm's forward, packing, gradients, checkpointing and cached decoding."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from dylora_mlx.errors import UserError
from dylora_mlx.growth.pool import ExpertRecord, Pool
from dylora_mlx.model.base import families
from dylora_mlx.model.base.load import Base, load_base
from dylora_mlx.model.decoder import attention, decode_block, packed_attention
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.kernels import chunked_loss, numerics
from dylora_mlx.model.kernels.quantized import weight_rows as quantised_rows
from dylora_mlx.model.routing.router import Routing
from tests.bases import CONFIGS, LLAMA3, MAIN, config_of, quantised, random_model, write
from tests.tiny import ALL, DENSE, alone, close, decode_cache_of, documents_of, flat

BITS = {"": 0, "-4bit": 4, "-8bit": 8}
KINDS = [*CONFIGS, *(f"{kind}{bits}" for kind in MAIN for bits in ("-4bit", "-8bit"))]
LENGTH = 45


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> Callable[[str], Base]:
    """Return a function from a kind (as llama-4bit) to its base. Each base is written and loaded once."""
    home = tmp_path_factory.mktemp("bases")

    @cache
    def load(kind: str) -> Base:
        plain, bits = kind.removesuffix("-4bit").removesuffix("-8bit"), kind[-4:-3]
        folder = home / plain
        if not folder.is_dir():
            write(folder, config_of(plain))
        return load_base(str(quantised(folder, home / kind, int(bits)) if kind != plain else folder), "float32")

    return load


@pytest.fixture(params=KINDS)
def base(request, loaded) -> Base:
    return loaded(request.param)


def pool_of(base: Base, grad_checkpoint: bool = False, router_layer: int | str = "final") -> RoutedDecoder:
    """Return a decoder with two experts on all projections, filled so that they change the output."""
    pool, rng = Pool(RoutedDecoder(base, list(ALL), router_layer, grad_checkpoint)), np.random.default_rng(0)
    for number, rank in enumerate((2, 3)):
        pool.add(ExpertRecord(f"skill_{number}", rank, 4.0, 0), mx.random.key(number))
        for factors in (f for layer in pool.model.experts[number].layers for f in layer.values()):
            factors.lora_b = mx.array(rng.normal(0, 0.1, factors.lora_b.shape).astype(np.float32))
    for row in pool.model.router.rows:
        row.weight = mx.array(rng.normal(0, 0.3, row.weight.shape).astype(np.float32))
    return pool.model


def tokens_of(length: int, batch: int = 1) -> mx.array:
    return mx.array(np.random.default_rng(1).integers(3, 4096, (batch, length)).astype(np.int32))


@pytest.mark.parametrize("form", ["documents", "masks"])
def test_rows_of_one_document_equal_mlx_lm(base, form):
    model, tokens, segments = pool_of(base), tokens_of(LENGTH, 2), np.ones((2, LENGTH), np.int32)
    attn_layout = (packed_attention.find_documents if form == "documents" else attention.cheapest_masks)(
        segments, model.window
    )
    logits, expected = model.logits(model.base_states(tokens, attn_layout)), base.model(tokens)
    assert close(logits, expected, 2e-5)
    assert mx.std(expected).item() > 0.5


@pytest.mark.parametrize("router_layer", ["final", 2])
@pytest.mark.parametrize("form", ["documents", "masks"])
def test_packed_rows_equal_documents_one_by_one(base, form, router_layer):
    model = pool_of(base, router_layer=router_layer)
    segments = np.array([[1] * 30 + [2] * 4 + [3] * 11, [1] * 7 + [0] + [2] * 20 + [0] * 17], np.int32)
    tokens = tokens_of(45, 2)
    make_layout = (
        packed_attention.find_documents if form == "documents" else lambda s, w: attention.packed_masks(mx.array(s), w)
    )
    packed = model(tokens, make_layout(segments, model.window), DENSE)
    for r, span in documents_of(segments):
        document_tokens = tokens[r : r + 1, span]
        single = model(document_tokens, alone(document_tokens.shape[1], window=model.window), DENSE)
        for ours, theirs in zip(packed, single, strict=True):
            assert close(ours[r, span], theirs[0], 5e-5)
    naive = model(tokens, alone(45, 2, model.window), DENSE)
    assert mx.abs(naive.hidden - packed.hidden)[0, 34:].max() > 0.1


@pytest.mark.parametrize("on_cpu", [True, False], ids=["turns", "ropes"])
@pytest.mark.parametrize("chunks", [[5, 1, 1, LENGTH - 7], [LENGTH - 3, 1, 1, 1]], ids=["early", "late"])
def test_cached_decoding_equals_the_full_pass(monkeypatch, base, chunks, on_cpu):
    monkeypatch.setattr(numerics, "on_cpu", lambda: on_cpu)
    model, tokens, routing = pool_of(base), tokens_of(LENGTH, 2), Routing(1, mx.array(0.5))
    full = model(tokens, alone(LENGTH, 2, model.window), routing)
    kv_cache, begin, parts = decode_cache_of(model, 2), 0, []
    for length in chunks:
        attn_layout = model.decode_layout(length, kv_cache)
        if isinstance(attn_layout, decode_block.DecodePosition):
            assert (attn_layout.full is not None) == (on_cpu and model.family.rope_half)
        parts.append(model(tokens[:, begin : begin + length], attn_layout, routing, cache=kv_cache))
        begin += length
    for name, expected in full._asdict().items():
        assert close(mx.concatenate([getattr(p, name) for p in parts], axis=1), expected, 1e-4), name


def gradients(model: RoutedDecoder, attn_layout: attention.AttentionLayout) -> tuple[float, dict[str, np.ndarray]]:
    """Return a loss over the states of LENGTH tokens, through the chunked loss head, and its gradients by name."""
    tokens = tokens_of(LENGTH)

    def loss(tokens: mx.array) -> mx.array:
        hidden = model(tokens, attn_layout, DENSE).hidden
        return chunked_loss.token_losses(model.head, hidden[0, :-1], tokens[0, 1:], 512, differentiable=True).mean()

    value, gradient_tree = nn.value_and_grad(model, loss)(tokens)
    return value.item(), flat(gradient_tree)


def gradients_agree(gradients: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> bool:
    """Return whether all gradients agree, relative to the largest entry of each expected one."""
    largest = {name: max(np.abs(gradient).max(), 1e-3) for name, gradient in expected.items()}
    return gradients.keys() == expected.keys() and all(
        np.abs(gradients[name] - gradient).max() < tolerance * largest[name] for name, gradient in expected.items()
    )


def test_only_experts_and_router_have_gradients(base):
    """Both attention layouts give the same gradients.

    So does gradient checkpointing, which keeps only each block's input.
    """
    model, segments = pool_of(base), np.ones((1, LENGTH), np.int32)
    value, expected = gradients(model, packed_attention.find_documents(segments, model.window))
    assert {name.split(".")[0] for name in expected} == {"experts", "router"}
    assert all(np.abs(gradient).max() > 0 for name, gradient in expected.items() if name.startswith("experts"))
    by_masks = gradients(model, attention.cheapest_masks(segments, model.window))
    checkpointed = gradients(
        pool_of(base, grad_checkpoint=True), packed_attention.find_documents(segments, model.window)
    )
    for other, tolerance in ((by_masks, 1e-3), (checkpointed, 1e-5)):
        assert close(other[0], value, 1e-5)
        assert gradients_agree(other[1], expected, tolerance)


# Quantised bases.


def dequantised(base: Base) -> Base:
    """Return the base with the same numbers in full matrices."""
    plain = random_model(json.loads((base.folder / "config.json").read_text()))
    modules = dict(base.model.named_modules())
    weights = {}
    for name, value in tree_flatten(base.model.parameters()):
        owner, _, part = name.rpartition(".")
        if part == "weight" and isinstance(modules[owner], (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            value = quantised_rows(modules[owner], mx.arange(value.shape[0]))
        if part not in ("scales", "biases"):
            weights[name] = value
    if "lm_head" not in base.model:
        plain.pop("lm_head", None)
        plain.tie_word_embeddings = True
    plain.load_weights(list(weights.items()))
    plain.freeze()
    return Base(plain, base.tokenizer, base.name, base.folder, base.fingerprint)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", MAIN)
def test_a_quantised_base_equals_its_dequantised_copy(loaded, kind, bits):
    base = loaded(f"{kind}-{bits}bit")
    assert base.is_quantized
    assert isinstance(base.model.model.embed_tokens, nn.QuantizedEmbedding)
    assert base.model.model.layers[0].self_attn.q_proj.weight.dtype == mx.uint32
    assert base.model.model.layers[0].self_attn.q_proj.scales.dtype == base.dtype == mx.float32
    model, plain = pool_of(base), pool_of(dequantised(base))
    assert model.shapes == plain.shapes == pool_of(loaded(kind)).shapes
    attn_layout = packed_attention.find_documents(np.ones((1, LENGTH), np.int32), model.window)
    (value, quantised_gradients), (expected_value, expected) = (
        gradients(model, attn_layout),
        gradients(plain, attn_layout),
    )
    assert close(value, expected_value, 1e-4)
    assert gradients_agree(quantised_gradients, expected, 2e-3)
    full = pool_of(loaded(kind))(tokens_of(LENGTH), attn_layout, DENSE).hidden
    difference = mx.abs(model(tokens_of(LENGTH), attn_layout, DENSE).hidden - full).mean() / mx.abs(full).mean()
    assert 1e-4 < difference < (0.9 if bits == 4 else 0.1)


@pytest.mark.parametrize("kind", [f"{kind}-{bits}bit" for kind in MAIN for bits in (4, 8)])
@pytest.mark.parametrize("tile", [512, 700, 5000])
def test_chunked_loss_on_a_quantised_head(loaded, kind, tile):
    layer = chunked_loss.output_layer(loaded(kind).model)
    hidden, targets = mx.random.normal((9, 64), key=mx.random.key(0)), tokens_of(9)[0]

    def tiled(h: mx.array) -> mx.array:
        return chunked_loss.token_losses(layer, h, targets, tile, differentiable=True).sum()

    def untiled(h: mx.array) -> mx.array:
        return nn.losses.cross_entropy(chunked_loss.output_logits(layer, h), targets).sum()

    (value, gradient), (expected_value, expected) = mx.value_and_grad(tiled)(hidden), mx.value_and_grad(untiled)(hidden)
    assert close(value, expected_value, 1e-5)
    assert close(gradient, expected, 1e-4)


def test_every_quantisation_has_its_own_fingerprint(loaded):
    prints = {kind: loaded(kind).fingerprint for kind in KINDS}
    assert len(set(prints.values())) == len(KINDS)


def test_other_group_sizes_bits_and_modes(tmp_path):
    """Load projections of 6 bits in groups of 64, and mxfp4, whose scales are bytes."""
    folder = write(tmp_path / "full", config_of("llama"))
    for name, bits, group, mode in (("six", 6, 64, "affine"), ("mxfp4", 4, 32, "mxfp4")):
        base = load_base(str(quantised(folder, tmp_path / name, bits, group, mode)), "float32")
        model, tokens = pool_of(base), tokens_of(LENGTH)
        assert base.projection_shape(0, "down_proj") == (96, 64), name
        logits = model.logits(model.base_states(tokens, alone(LENGTH, window=model.window)))
        assert close(logits.astype(mx.float32), base.model(tokens).astype(mx.float32), 2e-2), name
        value, grads = gradients(model, alone(LENGTH, window=model.window))
        assert np.isfinite(value)
        assert all(np.isfinite(gradient).all() for gradient in grads.values())


def test_bfloat16_keeps_packed_weights(loaded):
    base = load_base(str(loaded("qwen3-4bit").folder), "bfloat16")
    layer = base.projection(0, "q_proj")
    assert (layer["weight"].dtype, layer["scales"].dtype, layer["biases"].dtype) == (
        mx.uint32,
        mx.bfloat16,
        mx.bfloat16,
    )
    out = pool_of(base)(tokens_of(20), alone(20, window=families.family_of(base.args).window), DENSE)
    assert (out.hidden.dtype, out.router_logits.dtype) == (mx.bfloat16, mx.float32)


# Options in configs.


def test_nested_rotary_options(tmp_path):
    """transformers 5 nests the rotary options. mlx-lm alone would use the defaults for a nested Llama config."""
    nested = {**LLAMA3, "rope_theta": 500000.0}
    flat_config = config_of("llama")
    config = {n: v for n, v in flat_config.items() if n not in ("rope_theta", "rope_scaling")} | {
        "rope_parameters": nested
    }
    nested_base = load_base(str(write(tmp_path / "nested", config)), "float32")
    flat_base = load_base(str(write(tmp_path / "flat", flat_config)), "float32")
    tokens = tokens_of(LENGTH)
    assert mx.array_equal(nested_base.model(tokens), flat_base.model(tokens))
    gemma = {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    }
    assert families.rope_settings(gemma) == {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": gemma["rope_parameters"]["full_attention"],
    }
    assert families.rope_settings(gemma | {"rope_theta": 5.0, "rope_local_base_freq": 6.0}).keys() == {"rope_scaling"}
    assert families.rope_settings({}) == {}


@pytest.mark.parametrize(("stated", "expected"), [(7, 7), (None, 1)], ids=["config", "EOS"])
def test_bos_of_a_tokenizer_without_one(tmp_path, stated, expected):
    folder = write(tmp_path / "b", config_of("qwen3", bos_token_id=stated))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "bos_token"}))
    assert load_base(str(folder)).tokenizer.bos_token_id == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, r"a 'mistral' model, but the base must be one of model_type gemma3_text, llama"),
        ({"model_type": "gemma3", "text_config": {}}, r"with vision.*dylora convert-base \S+ --out"),
        ({"rope_parameters": 5}, "could not be loaded"),
        ({"layer_types": 5}, "could not be loaded"),
    ],
)
def test_an_unsupported_base_is_refused(tmp_path, changes, message):
    folder = write(tmp_path / "b", config_of("llama"))
    config = json.loads((folder / "config.json").read_text())
    (Path(folder) / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message):
        load_base(str(folder))
