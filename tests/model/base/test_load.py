"""Loading bases: the embedded base agrees with mlx-lm, fingerprints detect changes, and damage is named."""

from __future__ import annotations

import copy as copying
import gc
import json
import shutil

import mlx.core as mx
import mlx_lm
import mlx_lm.utils
import pytest
from mlx.utils import tree_flatten

from dylora_mlx import assets
from dylora_mlx.errors import UserError
from dylora_mlx.model.base import load
from dylora_mlx.model.base.load import _resolve_dtype, fingerprint, load_base
from tests.tiny import close, flat


@pytest.fixture
def copy(tmp_path):
    """Return the folder of a writable copy of the embedded base."""
    folder = tmp_path / "base"
    shutil.copytree(assets.BASE, folder)
    return folder


def change_config(folder, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def fingerprint_of(folder) -> str:
    return fingerprint(folder, json.loads((folder / "config.json").read_text()))


def test_the_embedded_base_loads_frozen(base):
    assert (base.name, base.folder) == ("embedded", assets.BASE)
    assert flat(base.model.trainable_parameters()) == {}
    assert base.dtype == mx.float32
    assert base.tokenizer.decode(base.tokenizer.encode("def f(x):")[1:]) == "def f(x):"
    assert base.fingerprint == fingerprint_of(assets.BASE)


def test_mlx_lm_loads_the_same_folder(base):
    theirs, tokenizer = mlx_lm.load(str(assets.BASE))[:2]
    text = "def add(a, b):\n    return a + b"
    assert tokenizer.encode(text) == base.tokenizer.encode(text)
    theirs.set_dtype(mx.float32)
    tokens = mx.array([tokenizer.encode(text)])
    assert close(theirs(tokens), base.model(tokens), 1e-5)


@pytest.mark.parametrize(("dtype", "expected"), [("float32", mx.float32), ("bfloat16", mx.bfloat16)])
def test_dtype_can_be_chosen(dtype, expected, capsys):
    """bfloat16 on a CPU is one warning in a process."""
    load._warn_of_slow_dtype.cache_clear()
    model = [load_base("embedded", dtype) for _ in range(2)][1].model
    assert capsys.readouterr().err.count("bfloat16 on a CPU takes about six times as long") == (dtype == "bfloat16")
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == expected
    assert model.model.embed_tokens.weight.dtype == expected


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_weights_are_held_once(dtype, size):
    """The file is in bfloat16: neither its arrays nor buffers of their sizes stay beside the cast ones."""
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load_base("embedded", dtype).model
    arrays = dict(tree_flatten(model.parameters())).values()
    weights, largest = sum(array.size for array in arrays) * size, max(array.size for array in arrays) * 2
    assert mx.get_active_memory() - before == pytest.approx(weights, rel=0.01)
    assert mx.get_peak_memory() - before <= 1.01 * weights + largest
    assert mx.get_cache_memory() == 0


def test_dtype_auto_follows_the_device(monkeypatch):
    for device, expected in ((mx.cpu, mx.float32), (mx.gpu, mx.bfloat16)):
        monkeypatch.setattr(mx, "default_device", lambda device=device: mx.Device(device))
        assert _resolve_dtype("auto") == expected


def test_shapes_of_projections(base):
    args = base.args
    assert base.projection_shape(0, "q_proj") == (args.hidden_size, args.num_attention_heads * args.head_dim)
    assert base.projection_shape(1, "down_proj") == (args.intermediate_size, args.hidden_size)


def test_shapes_of_quantised_projections(base):
    quantised = base.projection(0, "down_proj").to_quantized(group_size=64, bits=4)
    inputs = quantised.weight.shape[1] * 32 // quantised.bits
    assert (inputs, quantised.weight.shape[0]) == base.projection_shape(0, "down_proj")


def test_fingerprint_follows_the_weights(copy):
    assert fingerprint_of(copy) == fingerprint_of(assets.BASE)
    path = copy / "model.safetensors"
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    data = 8 + int.from_bytes(content[:8], "little")
    for part in ("layers.0.self_attn.q_proj", "layers.5.mlp.up_proj", "layers.3.self_attn.k_proj", "model.norm"):
        name = next(name for name in header if part in name)
        begin, end = (data + offset for offset in header[name]["data_offsets"])
        path.write_bytes(content[:begin] + bytes(byte ^ 1 for byte in content[begin:end]) + content[end:])
        assert fingerprint_of(copy) != fingerprint_of(assets.BASE), name
    path.write_bytes(content)
    assert fingerprint_of(copy) == fingerprint_of(assets.BASE)


def test_fingerprint_follows_the_architecture_only(copy):
    change_config(copy, transformers_version="9.9", _name_or_path="elsewhere")
    assert fingerprint_of(copy) == fingerprint_of(assets.BASE)
    change_config(copy, sliding_window=7)
    assert fingerprint_of(copy) != fingerprint_of(assets.BASE)


def test_a_local_folder_loads(copy, base):
    loaded = load_base(str(copy), "float32")
    assert (loaded.name, loaded.fingerprint) == (str(copy), base.fingerprint)
    tokens = mx.array([[2, 50, 60, 70]])
    assert mx.array_equal(loaded.model(tokens), base.model(tokens))


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def no_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text("{")


def another_model(folder):
    change_config(folder, model_type="mistral")


def truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_weights, "no weights"),
        (no_tokenizer, "no tokenizer"),
        (no_config, "no config.json"),
        (broken_config, "not a readable JSON"),
        (another_model, "'mistral' model"),
        (truncated_weights, "could not be loaded"),
    ],
)
def test_a_damaged_folder_is_named(copy, damage, message):
    damage(copy)
    with pytest.raises(UserError, match=message):
        load_base(str(copy))


def test_the_tokenizer_is_loaded_when_it_is_first_used(monkeypatch):
    loads = []
    load = mlx_lm.utils.load_tokenizer
    monkeypatch.setattr(
        mlx_lm.utils, "load_tokenizer", lambda *args, **options: loads.append(args) or load(*args, **options)
    )
    tokenizer = load_base("embedded").tokenizer
    assert len(tokenizer.content_hash) == 64
    assert copying.copy(tokenizer).folder == tokenizer.folder
    assert loads == []
    assert tokenizer.decode(tokenizer.encode("x = 1", add_special_tokens=False)) == "x = 1"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (2, 1)
    assert tokenizer.chat_template is None
    assert loads == [(assets.BASE,)]
    with pytest.raises(AttributeError, match="nosuch"):
        _ = tokenizer.nosuch


def test_a_tokenizer_without_eos_is_named_at_its_first_use(copy):
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "eos_token"}))
    tokenizer = load_base(str(copy)).tokenizer
    with pytest.raises(UserError, match="the tokenizer has no EOS token"):
        tokenizer.encode("x")


def test_a_damaged_tokenizer_is_named_at_its_first_use(copy):
    (copy / "tokenizer.json").write_text("{")
    tokenizer = load_base(str(copy)).tokenizer
    with pytest.raises(UserError, match=r"base: the base could not be loaded \("):
        tokenizer.encode("x")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_base(str(tmp_path / "nowhere"))
