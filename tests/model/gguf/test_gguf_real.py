"""The two published models that tools/dev/real_bases.py builds: token ids of llama.cpp, logits of transformers, sensible text.

real_bases.json has the ids that llama.cpp itself gives (llama-cpp-python 0.3.36, special tokens parsed) and logits of transformers 5.24
from the GGUF file in float64; Gemma's with the embedding scale rounded to bfloat16, as it was trained and as mlx-lm has it.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx.model.base.load import Base, load_base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from tests.exporting.mixtures import tool
from tests.tiny import alone

FOLDER: Path = tool("real_bases").default_folder()
EXPECTED: dict[str, Any] = json.loads((Path(__file__).parent / "real_bases.json").read_text(encoding="utf-8"))
NAMES = sorted(EXPECTED["bases"])
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not (FOLDER / NAMES[0]).is_dir(), reason="python tools/dev/real_bases.py builds them"),
]


@cache
def base_of(name: str) -> Base:
    """Return a base in float32, loaded once."""
    return load_base(str(FOLDER / name), "float32")


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_llama_cpps(name):
    tokenizer = base_of(name).tokenizer
    for text, ids in zip(EXPECTED["texts"], EXPECTED["bases"][name]["ids"], strict=True):
        assert tokenizer.encode_text(text) == ids, repr(text)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name):
    base, worst = base_of(name), 0.0
    model = RoutedDecoder(base, ["q_proj"], "final")
    for case in EXPECTED["bases"][name]["logits"]:
        tokens = mx.array([[base.tokenizer.bos_token_id, *base.tokenizer.encode_text(case["text"])]])
        states = model.base_states(tokens, alone(tokens.shape[1], window=model.window))
        found = np.array(model.logits(states))[0][np.ix_(case["positions"], case["tokens"])]
        worst = max(worst, np.abs(found - np.array(case["logits"])).max())
    assert worst < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_text_is_likely(name):
    """Weights that were read wrongly give a loss near that of chance, 11 to 12 nats."""
    base = base_of(name)
    text = "The capital of France is Paris, the capital of Italy is Rome, and the capital of Spain is"
    tokens = mx.array([base.tokenizer.bos_token_id, *base.tokenizer.encode_text(text)])
    logits = base.model(tokens[None])[0]
    losses = mx.logsumexp(logits[:-1], axis=-1) - mx.take_along_axis(logits[:-1], tokens[1:, None], axis=-1)[:, 0]
    assert mx.mean(losses[3:]).item() < 2
    assert base.tokenizer.decode([mx.argmax(logits[-1]).item()]) == " Madrid"


def test_ends_and_templates():
    gemma, smollm = (base_of(name).tokenizer for name in NAMES)
    assert (gemma.bos_token_id, gemma.eos_token_ids, gemma.chat_template) == (2, (1, 106), None)
    assert (smollm.bos_token_id, smollm.eos_token_ids) == (1, (2, 0))
    chat = smollm.huggingface.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_bit_for_bit_those_of_transformers(name):
    """Needs torch, and a minute for Gemma."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    file = next(base.file for base in tool("real_bases").BASES if base.name == name)
    theirs = AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=file, dtype=torch.float32).state_dict()
    ours = mx.load(str(FOLDER / name / "model.safetensors"))
    assert {*theirs} - {*ours} == {"lm_head.weight"}
    for weight, value in ours.items():
        assert np.array_equal(np.array(value), theirs[weight].numpy()), weight
