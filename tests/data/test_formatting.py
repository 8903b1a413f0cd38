"""Formatting: what a record becomes, and which of its tokens are learned."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from dylora_mlx import assets
from dylora_mlx.config import Source
from dylora_mlx.data import formatting
from dylora_mlx.data.records import Record
from dylora_mlx.data.skills import PRESETS
from dylora_mlx.errors import UserError
from dylora_mlx.model.base.tokenizer import Tokenizer

PLAIN = Source(name="s", source="s.jsonl")
CHAT = [
    {"role": "user", "content": "Add two numbers."},
    {"role": "assistant", "content": "a + b"},
    {"role": "user", "content": "Now three."},
    {"role": "assistant", "content": "a + b + c"},
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ raise_exception('tools are not allowed') }}{% endif %}"
    "[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
)
FORGETFUL = "{{ bos_token }}{% for m in messages %}{{ loop.revindex }} {{ m['content'] }}\n{% endfor %}"


def templated(template: str) -> Tokenizer:
    return Tokenizer(assets.BASE, chat_template=template)


@pytest.fixture(scope="module")
def chat_tokenizer():
    """The embedded tokenizer with a chat template that writes the BOS itself."""
    return templated(TEMPLATE)


def encode(row, tokenizer, source=PLAIN):
    """The document, once its frame is checked: one BOS first and not learned, one EOS last and learned."""
    _, ((tokens, learn),) = formatting.encode_record(Record(row, "s.jsonl, line 3"), source, tokenizer)
    assert len(tokens) == len(learn)
    assert tokens[0] == tokenizer.bos_token_id
    assert tokens[-1] == tokenizer.eos_token_id
    assert (tokens == tokenizer.bos_token_id).sum() == 1
    assert (tokens == tokenizer.eos_token_id).sum() == 1
    assert not learn[0]
    assert learn[-1]
    return tokens, learn


def text_of(tokens, tokenizer) -> str:
    return tokenizer.decode(list(map(int, tokens)))


def inner(row, tokenizer, source=PLAIN) -> tuple[str, str]:
    """The whole text between BOS and EOS, and the learned part of it."""
    tokens, learn = encode(row, tokenizer, source)
    return text_of(tokens[1:-1], tokenizer), text_of(tokens[1:-1][learn[1:-1]], tokenizer)


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_text_is_learned_whole(tokenizer, mask_prompt):
    source = replace(PLAIN, mask_prompt=mask_prompt)
    text = "def f(x):\n    return x + 1\n"
    tokens, learn = encode({"text": text}, tokenizer, source)
    assert tokens[1:-1].tolist() == tokenizer.encode(text, add_special_tokens=False)
    assert learn[1:].all()


def test_a_completion_is_learned_and_its_prompt_is_not(tokenizer):
    row = {"prompt": "Say hello.\n", "completion": 'print("hello")\n'}
    assert inner(row, tokenizer) == ('Say hello.\nprint("hello")\n', 'print("hello")\n')
    everything = replace(PLAIN, mask_prompt=False)
    assert inner(row, tokenizer, everything) == ('Say hello.\nprint("hello")\n',) * 2


def test_the_prompt_is_tokenised_by_itself(tokenizer):
    row = {"prompt": "ret", "completion": "urn x"}
    tokens, learn = encode(row, tokenizer)
    alone = tokenizer.encode("ret", add_special_tokens=False)
    assert tokens[1 : 1 + len(alone)].tolist() == alone
    assert not learn[: 1 + len(alone)].any()
    assert learn[1 + len(alone) :].all()


def test_chat_without_a_template_uses_gemmas_markers(tokenizer):
    whole, learned = inner({"messages": CHAT}, tokenizer)
    assert whole == (
        "<start_of_turn>user\nAdd two numbers.<end_of_turn>\n<start_of_turn>model\na + b<end_of_turn>\n"
        "<start_of_turn>user\nNow three.<end_of_turn>\n<start_of_turn>model\na + b + c<end_of_turn>"
    )
    assert learned == "a + b<end_of_turn>a + b + c<end_of_turn>"


def test_chat_with_a_template_learns_all_assistant_turns_and_writes_one_bos(chat_tokenizer):
    whole, learned = inner({"messages": CHAT}, chat_tokenizer)
    assert whole == "[user] Add two numbers.\n[assistant] a + b\n[user] Now three.\n[assistant] a + b + c"
    assert learned == " a + b a + b + c", "the header is the prompt's, although this template has no generation prompt"


def test_chat_is_learned_whole_when_asked(tokenizer, chat_tokenizer):
    source = replace(PLAIN, mask_prompt=False)
    for either in (tokenizer, chat_tokenizer):
        whole, learned = inner({"messages": CHAT}, either, source)
        assert learned == whole


def test_chat_from_a_named_column(tokenizer):
    source = replace(PLAIN, messages="conversation")
    assert inner({"text": "not this", "conversation": CHAT}, tokenizer, source) == inner({"messages": CHAT}, tokenizer)
    with pytest.raises(UserError, match="line 3: found no text"):
        encode({"text": "not this"}, tokenizer, source)


def test_an_answer_without_content_is_not_learned(tokenizer, chat_tokenizer):
    messages = [CHAT[0], {"role": "assistant", "content": None}]
    for either in (tokenizer, chat_tokenizer):
        assert formatting.encode_record(Record({"messages": messages}, "s.jsonl, line 3"), PLAIN, either) == (
            "chat",
            [],
        )
        whole, learned = inner({"messages": [*messages, *CHAT[2:]]}, either)
        assert "None" not in whole
        assert learned.strip().startswith("a + b + c")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "a list of messages is needed"),
        ("hello", "a list of messages is needed"),
        ([CHAT[0], {"role": "assistant"}], "message 2: role and content are needed"),
        ([CHAT[0], "hello"], "message 2: role and content are needed"),
    ],
)
def test_malformed_messages_are_named(tokenizer, messages, reason):
    with pytest.raises(UserError, match=f"line 3, messages.*{reason}"):
        encode({"messages": messages}, tokenizer)


def test_a_template_that_rewrites_earlier_turns_gives_a_document_for_each_answer():
    tokenizer = templated(FORGETFUL)
    _, documents = formatting.encode_record(Record({"messages": CHAT}, "s.jsonl, line 3"), PLAIN, tokenizer)
    texts = [text_of(tokens[1:-1], tokenizer) for tokens, _ in documents]
    assert texts == ["1 Add two numbers.\na + b", "3 Add two numbers.\n2 a + b\n1 Now three.\na + b + c"]
    learned = [text_of(tokens[1:-1][mask[1:-1]], tokenizer) for tokens, mask in documents]
    assert learned == ["a + b", "a + b + c"]


def test_a_template_that_refuses_a_message_is_one_line(chat_tokenizer):
    messages = [{"role": "tool", "content": "Meanwhile."}, CHAT[1]]
    with pytest.raises(UserError, match=r"line 3, message 1: .*tools are not allowed") as caught:
        encode({"messages": messages}, chat_tokenizer)
    assert "\n" not in str(caught.value)


def test_templates_fill_columns_and_lists(tokenizer):
    source = replace(PLAIN, prompt="{task_id}: {text}\n", completion="{code}\n{tests}\n")
    row = {"task_id": 7, "text": "Add.", "code": "f = {text}", "tests": ["assert f", "assert g"]}
    assert inner(row, tokenizer, source) == (
        "7: Add.\nf = {text}\nassert f\nassert g\n",
        "f = {text}\nassert f\nassert g\n",
    )


def test_templates_understand_nothing_but_columns():
    row = {"a": "x", "b": None}
    assert (
        formatting.fill_template("{a} {b}| {} {a!r} {a.real} {{a}} {0}", row, "here") == "x | {} {a!r} {a.real} {x} {0}"
    )


def test_a_text_template_wins_over_usual_columns(tokenizer):
    source = replace(PLAIN, text="# {content}")
    row = {"content": "real", "text": "other", "prompt": "p", "completion": "c"}
    assert inner(row, tokenizer, source) == ("# real", "# real")


def test_a_missing_column_is_named_with_those_there_are(tokenizer):
    source = replace(PLAIN, text="{content}")
    with pytest.raises(UserError, match=r"^s.jsonl, line 3: no column 'content', there are body, title$"):
        encode({"body": "b", "title": "t"}, tokenizer, source)


def test_a_record_of_no_known_form_is_named(tokenizer):
    with pytest.raises(
        UserError, match=r"line 3: found no text, prompt and completion, messages, .* in the columns body"
    ):
        encode({"body": "b"}, tokenizer)


def test_an_empty_document_is_named_by_its_record(tokenizer):
    records = [Record({"text": text}, f"s.jsonl, line {n}") for n, text in enumerate(("x = 1", ""), 1)]
    with pytest.raises(UserError, match=r"^s.jsonl, line 2: the document is empty$"):
        list(formatting.encode_records(records, PLAIN, tokenizer))


@pytest.mark.parametrize(
    ("preset", "row", "whole", "learned"),
    [
        (
            "mbpp",
            {
                "task_id": 1,
                "text": "Add two.",
                "code": "def f(a):\n    return a + 2",
                "test_list": ["assert f(1) == 3"],
            },
            '"""\nAdd two.\n"""\ndef f(a):\n    return a + 2\n',
            "def f(a):\n    return a + 2\n",
        ),
        (
            "code_alpaca",
            {"instruction": "Sum a list.", "input": "[1, 2]", "output": "print(sum([1, 2]))"},
            "Sum a list.\n[1, 2]\nprint(sum([1, 2]))\n",
            "print(sum([1, 2]))\n",
        ),
        (
            "code_alpaca",
            {"instruction": "Print 1.", "input": "", "output": "print(1)"},
            "Print 1.\n\nprint(1)\n",
            "print(1)\n",
        ),
    ],
)
def test_presets_read_their_data_sets(tokenizer, preset, row, whole, learned):
    assert inner(row, tokenizer, replace(PLAIN, **PRESETS[preset])) == (whole, learned)


ALPACA = [
    {"instruction": "Sum a list.", "input": "[1, 2]", "output": "sum([1, 2])"},
    {"instruction": "Print 1.", "input": "", "output": "print(1)"},
    {"instruction": "Print 1.", "output": 1, "text": "Below is an instruction."},
    {"instruction": "Print 1.", "input": None, "output": "1", "id": 7},
]
TURNS = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
SHAREGPT = [
    {"conversations": TURNS},
    {"conversations": TURNS[1:], "system": "Be brief.", "id": "x"},
    {"conversations": json.dumps(TURNS)},
    {"conversations": [{"from": "user", "value": "1"}, {"from": "chatgpt", "value": "2"}], "text": "unused"},
]


@pytest.mark.parametrize(
    ("preset", "row"), [*(("alpaca", row) for row in ALPACA), *(("sharegpt", row) for row in SHAREGPT)]
)
@pytest.mark.parametrize("mask_prompt", [True, False])
def test_the_presets_of_usual_forms_read_what_is_read_without(tokenizer, preset, row, mask_prompt):
    plain = replace(PLAIN, mask_prompt=mask_prompt)
    named = replace(plain, preset=preset, **PRESETS[preset])
    assert formatting.read_sample(row, named, "here") == formatting.read_sample(row, plain, "here")
    assert inner(row, tokenizer, named) == inner(row, tokenizer, plain)


def test_a_preset_chooses_among_the_forms_of_a_record(tokenizer):
    row = {"text": "a", "messages": [{"role": "user", "content": "b"}], **ALPACA[0], **SHAREGPT[0]}
    alpaca, sharegpt = (replace(PLAIN, preset=name, **PRESETS[name]) for name in ("alpaca", "sharegpt"))
    assert inner(row, tokenizer, alpaca) == ("Sum a list.\n[1, 2]\nsum([1, 2])\n", "sum([1, 2])\n")
    assert inner(row, tokenizer, sharegpt) == inner(SHAREGPT[0], tokenizer)


def test_records_of_another_form_than_the_preset_are_refused(tokenizer):
    alpaca, sharegpt = (replace(PLAIN, preset=name, **PRESETS[name]) for name in ("alpaca", "sharegpt"))
    with pytest.raises(UserError, match="preset alpaca needs instruction and output, found the columns text"):
        formatting.read_sample({"text": "a"}, alpaca, "here")
    with pytest.raises(UserError, match=r"found no .* in the columns text"):
        formatting.read_sample({"text": "a"}, sharegpt, "here")
    with pytest.raises(UserError, match="turn 1: from is 'alien', and must be one of human"):
        formatting.read_sample({"conversations": [{"from": "alien", "value": "x"}]}, sharegpt, "here")
