"""Bases from other sources: a quantised folder, and the hub with its possible errors."""

from __future__ import annotations

import json
import shutil

import httpx
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from mlx.utils import tree_flatten

from dylora_mlx import assets
from dylora_mlx.errors import UserError
from dylora_mlx.model.base.load import load_base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from tests.tiny import alone, close


def test_embedded_predicts_python(base):
    """The trained weights are far better than chance, which is log 4096 = 8.3 nats."""
    text = "import os\n\n\ndef read(path):\n    with open(path) as file:\n        return file.read()\n"
    tokens = mx.array([[base.tokenizer.bos_token_id, *base.tokenizer.encode(text, add_special_tokens=False)]])
    loss = nn.losses.cross_entropy(base.model(tokens[:, :-1]), tokens[:, 1:]).mean().item()
    assert loss < 4.5


def test_a_quantised_folder_loads(base, tmp_path):
    folder = shutil.copytree(assets.BASE, tmp_path / "copy")
    model = load_base("embedded", "bfloat16").model
    nn.quantize(model, group_size=64, bits=8)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization": {"group_size": 64, "bits": 8}}))
    loaded = load_base(str(folder), "float32")
    assert isinstance(loaded.projection(2, "q_proj"), nn.QuantizedLinear)
    assert loaded.projection_shape(2, "down_proj") == (640, 256)
    assert loaded.dtype == mx.float32
    assert loaded.fingerprint != base.fingerprint
    tokens = mx.array(np.random.default_rng(0).integers(3, 4096, (1, 12)))
    decoder = RoutedDecoder(loaded, ["q_proj"], "final")
    states = decoder.base_states(tokens, alone(12, window=128))
    assert close(decoder.logits(states), loaded.model(tokens), 1e-4)
    full_precision = RoutedDecoder(base, ["q_proj"], "final").base_states(tokens, alone(12, window=128))
    assert mx.abs(states - full_precision).mean() < 0.1 * mx.abs(full_precision).mean()


def hub_error(kind: type) -> Exception:
    return kind("no", response=httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co")))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (hub_error(GatedRepoError), r"gated; accept its licence at https://huggingface\.co/some/model"),
        (hub_error(RepositoryNotFoundError), "no such model on the hub"),
        (ConnectionError("proxy\nrefused"), r"cannot be downloaded \(proxy\)"),
    ],
    ids=["gated", "missing", "offline"],
)
def test_hub_errors_name_the_remedy(monkeypatch, error, words):
    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match=words):
        load_base("some/model")


def test_a_base_from_the_hub_is_named_by_its_id(monkeypatch, base):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_args, **_options: str(assets.BASE))
    loaded = load_base("some/model", "float32")
    assert loaded.name == "some/model"
    assert loaded.fingerprint == base.fingerprint


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "a/b/c", "~/no such folder", "/"])
def test_a_path_is_not_looked_up_on_the_hub(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    with pytest.raises(UserError, match=r"no such folder|no config\.json"):
        load_base(name)
