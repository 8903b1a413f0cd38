"""Documents as people read them: their parts are the tokens and masks that training uses."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dylora_mlx.config import Source
from dylora_mlx.data import encoding, formatting, inspect, rendering
from dylora_mlx.data.encoding import Document
from dylora_mlx.data.inspect import Bin, Part
from dylora_mlx.data.records import Record
from dylora_mlx.model.base.tokenizer import RenderingTokenizer
from tests.data.chat_templates import TEMPLATES
from tests.data.test_rendering import MULTI, SYSTEM, llama2_tokenizer, special_tokenizer

SOURCE = Source(name="s", source="s.jsonl")
GEMMA_MULTI = [
    ("<bos><start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\n", False),
    ("Hello!<end_of_turn>", True),
    ("\n<start_of_turn>user\nAdd 2 and 2.<end_of_turn>\n<start_of_turn>model\n", False),
    ("It is 4.<end_of_turn><eos>", True),
]


def documents_of(row: dict, tokenizer, source: Source = SOURCE) -> list[Document]:
    return formatting.encode_record(Record(row, "s.jsonl, line 1"), source, tokenizer)[1]


def only(row: dict, tokenizer, source: Source = SOURCE) -> list[Part]:
    """Return the parts of a record that is one document."""
    [document] = documents_of(row, tokenizer, source)
    return inspect.parts(document, tokenizer)


@pytest.mark.parametrize(
    ("row", "source", "expected"),
    [
        ({"text": "SELECT 1;"}, SOURCE, [("<bos>", False), ("SELECT 1;<eos>", True)]),
        ({"text": "<bos>SELECT 1;<eos>"}, SOURCE, [("<bos>", False), ("SELECT 1;<eos>", True)]),
        ({"prompt": "a: ", "completion": "b"}, SOURCE, [("<bos>a: ", False), ("b<eos>", True)]),
        ({"prompt": "a: ", "completion": "b"}, replace(SOURCE, mask_prompt=False), [("<bos>", False), ("a: b<eos>", True)]),
        ({"prompt": "grüße ", "completion": "🙂é"}, SOURCE, [("<bos>grüße ", False), ("🙂é<eos>", True)]),
        ({"prompt": "x\n\n", "completion": "\n  y "}, SOURCE, [("<bos>x\n\n", False), ("\n  y <eos>", True)]),
        ({"q": "Q", "a": {"n": 0}}, replace(SOURCE, prompt="{q}=", completion="{a}"), [("<bos>Q=", False), ('{"n": 0}<eos>', True)]),
        ({"messages": MULTI}, SOURCE, GEMMA_MULTI),
    ],
)  # fmt: skip
def test_parts_of_each_form(tokenizer, row, source, expected):
    assert only(row, tokenizer, source) == [Part(*part) for part in expected]


def test_a_turn_without_weight_is_context(tokenizer):
    messages = [MULTI[0], {**MULTI[1], "weight": 0}, *MULTI[2:]]
    context, answer = only({"messages": messages}, tokenizer)
    assert context == Part("".join(text for text, _ in GEMMA_MULTI[:3]), False)
    assert answer == Part(*GEMMA_MULTI[3])


def test_markers_that_are_tokens_stay_visible():
    tokenizer = RenderingTokenizer(special_tokenizer(), TEMPLATES["chatml"])
    assert only({"messages": MULTI[:2]}, tokenizer) == [
        Part("<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n", False),
        Part("Hello!<|im_end|><eos>", True),
    ]


def test_a_rewriting_template_gives_a_document_for_each_answer():
    tokenizer = RenderingTokenizer(special_tokenizer(), TEMPLATES["qwen3"])
    first, second = documents_of({"messages": [SYSTEM, *MULTI]}, tokenizer)
    assert [part.text for part in inspect.parts(first, tokenizer) if part.learned] == [
        "<think>\n\n</think>\n\nHello!<|im_end|><eos>"
    ]
    assert [part.text for part in inspect.parts(second, tokenizer) if part.learned] == [
        "<think>\n\n</think>\n\nIt is 4.<|im_end|><eos>"
    ]


def test_json_has_the_ids_and_the_mask_of_the_document(tokenizer):
    [document] = documents_of({"prompt": "Say é: ", "completion": "🙂"}, tokenizer)
    found = json.loads(json.dumps(inspect.to_json("qa", "test", document, tokenizer)))
    prompt = [tokenizer.bos_token_id, *tokenizer.encode_text("Say é: ")]
    answer = [*tokenizer.encode_text("🙂"), tokenizer.eos_token_id]
    assert found == {
        "skill": "qa", "split": "test", "text": "<bos>Say é: 🙂<eos>", "ids": prompt + answer,
        "learned": [0] * len(prompt) + [1] * len(answer),
        "segments": [{"text": "<bos>Say é: ", "learned": False}, {"text": "🙂<eos>", "learned": True}],
    }  # fmt: skip


TOKENIZERS = {
    "embedded": None,
    "llama2": RenderingTokenizer(llama2_tokenizer(), TEMPLATES["mistral"]),
    "special": RenderingTokenizer(special_tokenizer(), TEMPLATES["gemma3"]),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(max_size=40), data=st.data())
@settings(max_examples=60, deadline=None)
def test_parts_joined_are_the_decoded_text_whatever_the_mask(name, tokenizer, text, data):
    """Also where a mask changes within a character of several tokens, which rendering never makes."""
    chosen = TOKENIZERS[name] or tokenizer
    ids = [chosen.bos_token_id, *chosen.encode_text(text), chosen.eos_token_id]
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))
    parts = inspect.parts(Document(np.array(ids, np.int32), mask), chosen)
    assert "".join(part.text for part in parts) == inspect.decode(ids, chosen)
    assert [part.learned for part in parts] == [
        bool(mask[0]),
        *(b for a, b in itertools.pairwise(mask.tolist()) if a != b),
    ]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    prompt=st.text("ab 🙂é\n", max_size=12),
    completion=st.text("ab 🙂é\n", min_size=1, max_size=12),
)
@settings(max_examples=60, deadline=None)
def test_what_is_shown_as_learned_is_the_completion(name, tokenizer, prompt, completion):
    chosen = TOKENIZERS[name] or tokenizer
    if name == "llama2":  # it has no token for these, and a blank at the beginning is its own mark of one
        prompt, completion = (
            part.translate(dict.fromkeys(map(ord, "🙂é"), "b")) for part in (f"a{prompt}", completion)
        )
    [document] = [
        encoding.encode(text, chosen)
        for text in rendering.render(rendering.PromptCompletion(prompt, completion), chosen, "")
    ]
    *before, last = inspect.parts(document, chosen)
    eos = inspect.decode([chosen.eos_token_id], chosen)
    assert last.learned
    assert last.text == completion + eos
    assert [part.learned for part in before] == [False]


def test_the_histogram_has_a_border_at_the_row():
    assert inspect.histogram([5, 10, 11, 640, 641, 1280, 1281], 640) == [
        Bin(1, 10, 2), Bin(11, 15, 1), Bin(16, 20, 0), Bin(21, 30, 0), Bin(31, 40, 0), Bin(41, 60, 0), Bin(61, 80, 0),
        Bin(81, 120, 0), Bin(121, 160, 0), Bin(161, 240, 0), Bin(241, 320, 0), Bin(321, 480, 0), Bin(481, 640, 1),
        Bin(641, 1280, 2), Bin(1281, 1920, 1),
    ]  # fmt: skip
    assert inspect.histogram([70], 64) == [Bin(65, 128, 1)]
    assert inspect.histogram([], 64) == []


@given(st.lists(st.integers(1, 100_000), min_size=1), st.integers(16, 5000))
def test_every_length_is_in_one_bin(lengths, max_seq_length):
    bins = inspect.histogram(lengths, max_seq_length)
    assert [found.documents for found in bins] == [sum(low <= n <= high for n in lengths) for low, high, _ in bins]
    assert sum(found.documents for found in bins) == len(lengths)
    assert all(b.low == a.high + 1 for a, b in itertools.pairwise(bins))
    assert bins[0].documents
    assert bins[-1].documents
