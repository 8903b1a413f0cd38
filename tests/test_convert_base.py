"""dylora convert-base: the text model of a Gemma 3 with vision computes what mlx-lm's whole model does, and GGUF files
become folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model

from dylora_mlx import convert_base
from dylora_mlx.errors import UserError
from dylora_mlx.model.base.load import load_base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from tests import gguf_files
from tests.bases import config_of, quantised, random_model, write
from tests.gguf_files import Q, write_gguf
from tests.tiny import alone, close

CONFIG = {
    "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "vocab_size": 4096, "eos_token_id": [1, 106],
    "torch_dtype": "bfloat16", "vision_config": {"model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4,
    # What a published config leaves out of text_config takes mlx-lm's defaults: 8 heads of 256, 4 of keys, every sixth global.
    "text_config": {
        "model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7,
        "sliding_window": 16, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def vision(tmp_path_factory) -> Path:
    """A checkpoint with vision, in two shards, its vision tower in the first."""
    folder = write(tmp_path_factory.mktemp("vision") / "whole", CONFIG, size=0.1)
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    weights.pop("language_model.lm_head.weight")
    (folder / "model.safetensors").unlink()
    late = {name for name in weights if ".layers.6." in name}
    first = {n: v for n, v in weights.items() if n not in late} | {"vision_tower.vision_model.head": mx.ones((3, 3))}
    mx.save_safetensors(str(folder / "model-00001-of-00002.safetensors"), first, {"format": "pt"})
    mx.save_safetensors(str(folder / "model-00002-of-00002.safetensors"), {n: weights[n] for n in late})
    return folder


@pytest.mark.parametrize("bits", [None, 4])
def test_the_text_model_is_mlx_lms(vision, tmp_path, capsys, bits):
    source = vision if bits is None else quantised(vision, tmp_path / "packed", bits)
    assert convert_base.main([str(source), "--out", str(tmp_path / "text")]) == 0
    assert "give it in model.base" in capsys.readouterr().out.splitlines()[-1]
    loaded = load_base(str(tmp_path / "text"), "float32")
    assert (loaded.is_quantized, loaded.family.title, loaded.args.num_key_value_heads) == (
        bits is not None,
        "Gemma 3",
        4,
    )
    tokens = mx.array([[2, *range(50, 90)]])
    model = RoutedDecoder(loaded, ["q_proj"], "final")
    found = model.logits(model.base_states(tokens, alone(41, window=model.window)))
    theirs = load_model(source)[0]
    theirs.set_dtype(mx.float32)
    assert close(found, theirs(tokens), 2e-5)
    assert mx.std(found).item() > 0.5
    text = json.loads((tmp_path / "text" / "config.json").read_text())
    assert (text["model_type"], text["vocab_size"], text["eos_token_id"]) == ("gemma3_text", 4096, [1, 106])
    assert (text["num_attention_heads"], text["head_dim"], text["sliding_window_pattern"]) == (8, 256, 6)
    assert "vision_config" not in text


def test_the_base_says_what_to_do(vision):
    with pytest.raises(UserError, match="with vision") as raised:
        load_base(str(vision))
    line = str(raised.value)
    assert f"dylora convert-base {vision} --out FOLDER" in line


def test_names_as_transformers_saves_them(vision, tmp_path):
    other = shutil.copytree(vision, tmp_path / "other")
    for path in other.glob("model-*.safetensors"):
        weights = mx.load(str(path))
        assert isinstance(weights, dict)
        renamed = {n.replace("language_model.model.", "model.language_model."): v for n, v in weights.items()}
        mx.save_safetensors(str(path), renamed, {"format": "pt"})
    for source, name in ((vision, "a"), (other, "b")):
        assert convert_base.main([str(source), "--out", str(tmp_path / name)]) == 0
    a, b = (load_base(str(tmp_path / name), "float32").model(mx.array([[2, 9, 60]])) for name in "ab")
    assert mx.array_equal(a, b)


def no_text_config(folder: Path) -> None:
    config = {k: v for k, v in CONFIG.items() if k != "text_config"}
    (folder / "config.json").write_text(json.dumps(config))


def damaged_text_config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | {"text_config": {"num_attention_heads": 8}}))


def no_text_weights(folder: Path) -> None:
    for path in folder.glob("model-*.safetensors"):
        path.unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), {"vision_tower.x": mx.ones(3)})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_text_config, "'gemma3' model, but only"),
        (damaged_text_config, "model_type"),
        (no_text_weights, "no weights"),
    ],
)
def test_damage_is_one_line(vision, tmp_path, capsys, damage, words):
    folder = shutil.copytree(vision, tmp_path / "copy")
    damage(folder)
    assert convert_base.main([str(folder), "--out", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert words in line
    assert line.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_text_model_has_none_to_take_out(tmp_path, capsys):
    folder = write(tmp_path / "llama", config_of("llama"))
    assert convert_base.main([str(folder), "--out", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert "'llama' model, but only Gemma 3 with vision" in line
    assert "other folders are given in model.base as they are" in line
    assert convert_base.main([str(folder), "--out", str(folder)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--dtype", "bfloat16"]])
def test_a_gguf_file_becomes_a_folder(tmp_path, capsys, options):
    made = write_gguf(tmp_path / "sha256-0123", "qwen3", (Q.Q8_0, Q.Q4_0))
    assert convert_base.main([str(made.path), "--out", str(tmp_path / "out"), *options]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/out: a base; give it in model.base, to mlx-lm or to transformers\n"
    files = {path.name for path in (tmp_path / "out").iterdir()}
    weights = {"model.safetensors", "config.json", "generation_config.json", "gguf.json"}
    assert files == {*weights, "tokenizer.json", "tokenizer_config.json"}
    tokens = mx.array([[2, *range(50, 90)]])
    theirs = load_model(tmp_path / "out")[0]
    assert theirs.model.norm.weight.dtype == (mx.bfloat16 if options else mx.float32)
    theirs.set_dtype(mx.float32)
    assert close(theirs(tokens), made.model(tokens), 0.1 if options else 1e-5)
    loaded = load_base(str(tmp_path / "out"), "float32")
    assert loaded.tokenizer.decode(loaded.tokenizer.encode_text("SELECT 12")) == "SELECT 12"
    cached = load_base(str(made.path), "float32")
    assert (cached.fingerprint == loaded.fingerprint) == (not options)


def test_values_beyond_a_dtype(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gguf_files, "random_model", lambda config: random_model(config, 1e5))
    path = write_gguf(tmp_path / "m.gguf", "qwen3", (Q.F32,)).path
    assert convert_base.main([str(path), "--out", str(tmp_path / "out"), "--dtype", "float16"]) == 2
    line = capsys.readouterr().err
    assert "model.embed_tokens.weight has values beyond float16; choose --dtype bfloat16 or float32" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf"]
