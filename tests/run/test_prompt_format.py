"""A run is asked as its skills were learned, and says so where it is not."""

from __future__ import annotations

import numpy as np
import pytest

from dylora_mlx import assets
from dylora_mlx.data import rendering
from dylora_mlx.data.rendering import SkillFormat
from dylora_mlx.growth.feature_statistics import FeatureStatistics
from dylora_mlx.growth.library import Library, LibraryEntry
from dylora_mlx.model.base.tokenizer import Tokenizer
from dylora_mlx.run.prompt_format import choose_format, prompt_manifest

CHATML, GEMMA = rendering.builtin_template("chatml"), rendering.builtin_template("gemma")
CHAT = f"chat:{rendering.template_hash(CHATML)}"
STATISTICS = FeatureStatistics(np.eye(2), np.ones(2), 1.0)


def library(*formats: tuple[int, str]) -> Library:
    """A library with one skill for each (expert_id, format)."""
    entries = [
        LibraryEntry(f"skill_{n}", expert, np.ones((1, 2)), STATISTICS, np.ones((1, 2)), format=text)
        for n, (expert, text) in enumerate(formats)
    ]
    return Library("base", entries)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(assets.BASE, CHATML)


@pytest.mark.parametrize(
    ("formats", "expert", "kind"),
    [
        ([(0, "plain"), (1, CHAT)], None, "chat"),
        ([(0, "plain"), (1, "prompt"), (2, "prompt")], None, "prompt"),
        ([(0, "plain"), (1, "plain"), (2, CHAT)], None, "chat"),
        ([(0, "plain"), (1, "plain"), (2, CHAT)], 1, "plain"),
        ([(0, "plain"), (1, "plain"), (2, CHAT)], 2, "chat"),
        ([(0, CHAT), (1, "plain")], None, "plain"),
        ([(1, "prompt"), (2, "plain"), (3, "plain")], None, "plain"),
    ],
)
def test_prompts_have_the_form_that_was_learned(tokenizer, formats, expert, kind):
    form = choose_format(library(*formats), tokenizer, expert)
    assert form.asked.kind == kind
    assert form.note is None


@pytest.mark.parametrize("formats", [[], [(1, "")], [(1, ""), (2, "unheard of")]])
def test_a_run_that_did_not_record_it_is_asked_through_the_bases_own_template(tokenizer, formats):
    assert choose_format(library(*formats), tokenizer).is_chat
    assert not choose_format(library(*formats), Tokenizer(assets.BASE)).is_chat


@pytest.mark.parametrize(
    ("formats", "options", "note"),
    [
        (
            [(1, CHAT)],
            {"raw": True},
            "the skills were learned as chats, but this prompt is asked as raw text; leave out --raw",
        ),
        ([(1, "prompt")], {"chat": True}, "no skill was learned as a chat, but this prompt is asked as one"),
        ([(1, "chat:000000000000")], {}, "the skills were learned with another chat template than the one in use"),
        ([(1, "prompt")], {"raw": True}, None),
        ([(1, CHAT), (2, "plain")], {"raw": True}, None),
        ([], {"raw": True}, None),
    ],
)
def test_another_form_is_noted(tokenizer, formats, options, note):
    found = choose_format(library(*formats), tokenizer, **options).note
    assert found == note if note is None else (found or "").startswith(note)


def test_ids_and_stops(tokenizer):
    chat = choose_format(library((1, CHAT)), tokenizer)
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert chat.ids("Hi", tokenizer).tolist() == tokenizer.encode_text(text)
    assert chat.stops(tokenizer) == ([], ["<|im_end|>"]), "the marker is no single token of this base"
    raw = choose_format(library((1, CHAT)), tokenizer, raw=True)
    assert raw.ids("Hi", tokenizer).tolist() == [tokenizer.bos_token_id, *tokenizer.encode_text("Hi")]
    assert raw.stops(tokenizer) == ([], [])
    before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    whole = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n<|im_start|>user\n?<|im_end|>\n"
    assert chat.ids("?", tokenizer, before).tolist() == tokenizer.encode_text(whole + "<|im_start|>assistant\n")


def test_the_description_for_exports(tokenizer):
    assert prompt_manifest(library((1, CHAT)), tokenizer) == {
        "kind": "chat", "chat_template": CHATML, "bos_token_id": 2, "eos_token_ids": [1], "stop": ["<|im_end|>"],
    }  # fmt: skip
    plain = prompt_manifest(library((1, "prompt")), tokenizer)
    assert (plain["kind"], plain["chat_template"], plain["stop"]) == ("prompt", None, [])


@pytest.mark.parametrize("text", ["plain", "prompt", "chat", "chat:0123456789ab"])
def test_formats_are_written_and_read(text):
    assert str(SkillFormat.parse(text)) == text
    assert SkillFormat.parse("") is None
    assert SkillFormat.parse("table") is None
