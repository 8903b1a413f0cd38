"""The PyTorch runtime asks with the ids that MLX asks with, under chat templates of all families."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dylora_mlx.data import encoding, rendering
from dylora_mlx.model.base.tokenizer import RenderingTokenizer
from tests.data.chat_templates import TEMPLATES
from tests.data.test_rendering import CHATS, LLAMA2, SPECIAL

pytestmark = pytest.mark.export


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("huggingface", [SPECIAL, LLAMA2], ids=["special markers", "llama 2"])
def test_prompt_ids_are_mlxs(huggingface, name, chat):
    from dylora_mlx.exporting import dylora_torch

    messages = CHATS[chat][:-1]
    tokenizer = RenderingTokenizer(huggingface, TEMPLATES[name])
    huggingface.chat_template = TEMPLATES[name]
    model = SimpleNamespace(prompt={"kind": "chat", "bos_token_id": tokenizer.bos_token_id})
    expected = encoding.prompt_ids(rendering.chat_prompt(messages, tokenizer), tokenizer, special=False)
    assert dylora_torch.encode_prompt(model, huggingface, messages) == expected.tolist()
    if len(messages) == 2 and messages[0]["role"] == "system":
        asked = dylora_torch.encode_prompt(model, huggingface, messages[1]["content"], system=messages[0]["content"])
        assert asked == expected.tolist()


@pytest.mark.parametrize("text", ["Hello", " Hello", "<bos>Hello", ""])
def test_plain_prompts_are_mlxs(text):
    from dylora_mlx.exporting import dylora_torch

    tokenizer = RenderingTokenizer(SPECIAL)
    model = SimpleNamespace(prompt={"kind": "prompt", "bos_token_id": tokenizer.bos_token_id})
    expected = encoding.prompt_ids(text, tokenizer).tolist()
    assert dylora_torch.encode_prompt(model, SPECIAL, text) == expected
    assert dylora_torch.encode_prompt(model, SPECIAL, text, raw=True) == expected
