"""What is asked is what was learned: prompts are prefixes of documents, and only the assistant's text is learned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from dylora_mlx import assets
from dylora_mlx.config import Source
from dylora_mlx.data import encoding, formatting, rendering
from dylora_mlx.data.messages import Chat, read_chat
from dylora_mlx.data.records import Record
from dylora_mlx.data.rendering import Plain, PromptCompletion
from dylora_mlx.errors import UserError
from dylora_mlx.model.base.tokenizer import RenderingTokenizer, Tokenizer
from tests.data.chat_templates import END, TEMPLATES

PLAIN = Source(name="s", source="s.jsonl")
SYSTEM = {"role": "system", "content": "You are terse."}
SINGLE = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello!"}]
MULTI = [*SINGLE, {"role": "user", "content": "Add 2 and 2."}, {"role": "assistant", "content": "It is 4."}]
CHATS = {
    "single": SINGLE,
    "multi": MULTI,
    "single with system": [SYSTEM, *SINGLE],
    "multi with system": [SYSTEM, *MULTI],
}
TOOLS = [{"type": "function", "function": {"name": "add_numbers", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "add_numbers", "arguments": '{"b": 4, "a": 3}'}}


def llama2_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the Llama 2 kind: blanks become ▁, and a text that begins gets one before it."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        "▁",
        *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:!?[]/<>|_{}\n'\"",
    ]
    merges = [("▁", letter) for letter in "HIAUYabth"]
    pieces += ["".join(pair) for pair in merges]
    raw = RawTokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def special_tokenizer() -> PreTrainedTokenizerFast:
    """The embedded base's tokenizer with the templates' markers as single tokens, as chat models have them."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(assets.BASE / "tokenizer.json"), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    markers = ["<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": [*markers, "<|end_header_id|>"]})
    return tokenizer


KINDS = {"plain markers": lambda t: Tokenizer(assets.BASE, t), "special markers": lambda t: RenderingTokenizer(SPECIAL, t),
         "llama 2": lambda t: RenderingTokenizer(LLAMA2, t)}  # fmt: skip
SPECIAL, LLAMA2 = special_tokenizer(), llama2_tokenizer()


@pytest.fixture(params=KINDS)
def make(request):
    """A function from a chat template to a tokenizer of each kind."""
    return KINDS[request.param]


def text_of(ids, tokenizer) -> str:
    return tokenizer.huggingface.decode([int(i) for i in ids])


def documents(chat: Chat, tokenizer) -> list[encoding.Document]:
    return [encoding.encode(text, tokenizer) for text in rendering.render(chat, tokenizer, "here")]


def learned_runs(document: encoding.Document) -> list[tuple[int, int]]:
    """Spans of learned tokens that stand side by side."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], document.loss_mask, [False]]).astype(int)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def squash(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("chat_name", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_prefixes_and_only_answers_are_learned(make, name, chat_name):
    messages, tokenizer = CHATS[chat_name], make(TEMPLATES[name])
    chat = read_chat(messages, None, False, "here")
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    docs = documents(chat, tokenizer)
    prompts = {n: rendering.chat_prompt(messages[:n], tokenizer) for n in answers}
    asked = {n: encoding.prompt_ids(prompts[n], tokenizer, special=False) for n in answers}
    # Every answer is learned once, right after the ids that generation asks with.
    runs = [(document, span) for document in docs for span in learned_runs(document)]
    assert len(runs) == len(answers)
    for number, (document, (start, end)) in zip(answers, runs, strict=True):
        assert document.tokens[:start].tolist() == asked[number].tolist(), (number, text_of(document.tokens, tokenizer))
        learned = text_of(document.tokens[start:end], tokenizer)
        thought = "<think></think>" if name == "qwen3" else ""
        marker = END[name] if END[name] != "<eos>" else tokenizer.huggingface.eos_token
        expected = thought + squash(messages[number]["content"]) + squash(marker)
        final = document is docs[-1] and end == len(document.tokens)
        eos = tokenizer.huggingface.eos_token
        assert squash(learned).removesuffix(eos) == expected.removesuffix(eos), learned
        assert not final or document.tokens[-1] in tokenizer.eos_token_ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_the_whole_text(name):
    """Where no token crosses from a prompt into an answer, one encoding of the whole text gives the same ids."""
    compared = 0
    for make_tokenizer in KINDS.values():
        tokenizer = make_tokenizer(TEMPLATES[name])
        for rendered in rendering.render(read_chat(MULTI, None, False, "here"), tokenizer, "here"):
            ids = encoding.encode(rendered, tokenizer).tokens.tolist()
            whole = tokenizer.encode_text(rendered.text)
            crossing = [p for p in rendered.asked if whole[: len(tokenizer.encode_text(rendered.text[:p]))]
                        != tokenizer.encode_text(rendered.text[:p])]  # fmt: skip
            if not crossing:
                assert ids[: len(whole)] == whole
                compared += 1
            assert squash(text_of(ids, tokenizer)).startswith(squash(tokenizer.huggingface.decode(whole)))
    assert compared, "no text without a crossing token: nothing was compared"


def test_no_space_is_inserted_where_a_turn_begins():
    tokenizer = RenderingTokenizer(LLAMA2, TEMPLATES["chatml"])
    (document,) = documents(read_chat(SINGLE, None, False, "here"), tokenizer)
    text = "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>"
    assert text_of(document.tokens, tokenizer) == text + "</s>"
    assert document.tokens[:-1].tolist() == tokenizer.encode_text(text)


@pytest.mark.parametrize("content", ["  indented", "\n\nnew line", "x ", " "])
def test_content_with_blanks_at_its_ends(make, content):
    chat = read_chat([SINGLE[0], {"role": "assistant", "content": content}], None, False, "here")
    tokenizer = make(TEMPLATES["chatml"])
    docs = documents(chat, tokenizer)
    if not content.strip():
        assert docs == []
        return
    ((start, _),) = learned_runs(docs[0])
    assert text_of(docs[0].tokens, tokenizer).startswith(
        f"<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n{content}"
    )
    asked = encoding.prompt_ids(rendering.chat_prompt([SINGLE[0]], tokenizer), tokenizer, special=False)
    assert docs[0].tokens[:start].tolist() == asked.tolist()


def test_a_template_without_bos_gets_none_and_one_with_bos_gets_one():
    for name, count in (("chatml", 0), ("gemma3", 1), ("no_prompt", 1), ("mistral", 1), ("qwen3", 0)):
        tokenizer = Tokenizer(assets.BASE, TEMPLATES[name])
        (document, *_) = documents(read_chat(SINGLE, None, False, "here"), tokenizer)
        assert (document.tokens == tokenizer.bos_token_id).sum() == count, name
        asked = encoding.prompt_ids(rendering.chat_prompt([SINGLE[0]], tokenizer), tokenizer, special=False)
        assert (asked == tokenizer.bos_token_id).sum() == count


@pytest.mark.parametrize(
    "text",
    [
        "some text",
        "<bos>some text",
        "some text<eos>",
        "<bos>some text<eos>",
        "<bos><start_of_turn>user\nHi<end_of_turn>\n",
    ],
)
def test_text_has_one_bos_and_one_eos(tokenizer, text):
    (rendered,) = rendering.render(Plain(text), tokenizer, "here")
    ids, mask = encoding.encode(rendered, tokenizer)
    assert (ids == tokenizer.bos_token_id).sum() == (ids == tokenizer.eos_token_id).sum() == 1
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert mask[1:].all()
    assert not mask[0]
    asked = encoding.prompt_ids(text.removesuffix("<eos>"), tokenizer)
    assert asked.tolist() == ids[: len(asked)].tolist()


@pytest.mark.parametrize("eos_ids", [[1, 106], [106, 1], 106])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_several_eos_tokens_end_a_text(tmp_path, file, eos_ids):
    """Gemma 3 -it: <end_of_turn> ends an answer, so no other EOS is learned after it."""
    for path in assets.BASE.glob("*.json"):
        shutil.copy(path, tmp_path)
    tokens = json.loads((tmp_path / "tokenizer.json").read_text())
    marker = next(i for i in range(106, 400) if not any(t["id"] == i for t in tokens["added_tokens"]))
    vocabulary = tokens["model"]["vocab"]
    (old,) = [piece for piece, i in vocabulary.items() if i == marker]
    merges = [m for m in tokens["model"]["merges"] if "".join(m) != old and old not in m]
    del vocabulary[old]
    tokens["model"]["merges"] = merges
    vocabulary["<end_of_turn>"] = marker
    tokens["added_tokens"].append({"id": marker, "content": "<end_of_turn>", "single_word": False, "lstrip": False,
                                   "rstrip": False, "normalized": False, "special": True})  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokens))
    wanted = [marker if i == 106 else i for i in (eos_ids if isinstance(eos_ids, list) else [eos_ids])]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | ({"eos_token_id": wanted} if file == "config.json" else {}))
    )
    if file != "config.json":
        (tmp_path / file).write_text(json.dumps({"eos_token_id": wanted}))
    tokenizer = Tokenizer(tmp_path, TEMPLATES["gemma3"])
    assert set(tokenizer.eos_token_ids) == {1, *wanted}
    assert tokenizer.stopping_at(()).eos_token_ids == {1, *wanted}
    (document,) = documents(read_chat(SINGLE, None, False, "here"), tokenizer)
    assert document.tokens[-1] == marker
    assert document.loss_mask[-1]
    assert (document.tokens == 1).sum() == 0


def test_a_token_without_an_embedding_is_refused(tmp_path):
    for path in assets.BASE.glob("*.json"):
        shutil.copy(path, tmp_path)
    tokens = json.loads((tmp_path / "tokenizer.json").read_text())
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokens["added_tokens"].append({"id": 5000, "content": "<mine>", **added})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(UserError, match=r"token '<mine>' has id .*, but the base's embedding has 4096 rows"):
        Tokenizer(tmp_path).encode_text("x")


# Tools


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
@pytest.mark.parametrize("arguments", ['{"b": 4, "a": 3}', {"b": 4, "a": 3}])
def test_tool_calls_and_tools_are_rendered(make, name, arguments):
    call = {"type": "function", "function": {"name": "add_numbers", "arguments": arguments}}
    messages = [SINGLE[0], {"role": "assistant", "tool_calls": [call]}]
    tokenizer = make(TEMPLATES[name])
    (document,) = documents(read_chat(messages, TOOLS, False, "here"), tokenizer)
    ((start, end),) = learned_runs(document)
    learned = text_of(document.tokens[start:end], tokenizer)
    assert '"name":"add_numbers"' in squash(learned)
    assert '{"b":4,"a":3}' in squash(learned), "the arguments, once, in the order of the record"
    before = text_of(document.tokens[:start], tokenizer)
    assert before.count("add_numbers") == 1
    asked = rendering.chat_prompt([SINGLE[0]], tokenizer, TOOLS)
    assert encoding.prompt_ids(asked, tokenizer, special=False).tolist() == document.tokens[:start].tolist()


@pytest.mark.parametrize(
    ("name", "tools"), [("chatml", TOOLS), ("gemma3", None), ("mistral", TOOLS), ("no_prompt", None)]
)
def test_a_template_that_cannot_write_tools_is_one_line(tokenizer, name, tools):
    messages = [
        SINGLE[0],
        {"role": "assistant", "content": "" if tools is None else "4", **({} if tools else {"tool_calls": [CALL]})},
    ]
    with pytest.raises(
        UserError, match=r"^here, message 2: the chat template does not write tool.* data.chat_template$"
    ):
        documents(read_chat(messages, tools, False, "here"), Tokenizer(assets.BASE, TEMPLATES[name]))


def test_an_answer_after_a_tool_result_is_learned(make):
    messages = [
        SINGLE[0], {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "add_numbers", "content": "7"}, {"role": "assistant", "content": "Seven."},
    ]  # fmt: skip
    tokenizer = make(TEMPLATES["llama3"])
    docs = documents(read_chat(messages, TOOLS, False, "here"), tokenizer)
    learned = "".join(text_of(document.tokens[a:b], tokenizer) for document in docs for a, b in learned_runs(document))
    assert "Seven." in learned
    assert "7" not in learned.replace("Seven", "")


# What is not learned


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"weight": 0.0}])
def test_a_turn_may_be_left_out(make, flag):
    messages = [*SINGLE, MULTI[2], {**MULTI[3], **flag}]
    for name in ("chatml", "qwen3", "gemma3"):
        tokenizer = make(TEMPLATES[name])
        (document,) = documents(read_chat(messages, None, False, "here"), tokenizer)
        learned = "".join(text_of(document.tokens[a:b], tokenizer) for a, b in learned_runs(document))
        assert "Hello!" in learned
        assert "4" not in learned
    first = [{**SINGLE[0]}, {**SINGLE[1], **flag}, *MULTI[2:]]
    (document,) = documents(read_chat(first, None, False, "here"), make(TEMPLATES["chatml"]))
    text = text_of(document.tokens, make(TEMPLATES["chatml"]))
    assert "Hello!" in text, "it is context still"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [SINGLE[0]]},
        {"messages": [SINGLE[0], SINGLE[0]]},
        {"messages": [SINGLE[0], {"role": "assistant", "content": ""}]},
        {"messages": [SINGLE[0], {"role": "assistant", "content": " \n"}]},
        {"prompt": "Hi", "completion": ""},
        {"prompt": "Hi", "response": ""},
        {"prompt": [SINGLE[0]], "completion": [{"role": "assistant", "content": ""}]},
        {"messages": [SINGLE[0], {**SINGLE[1], "weight": 0}]},
    ],
)
def test_no_end_of_text_is_learned_alone(tokenizer, row):
    kind, found = formatting.encode_record(Record(row, "here"), PLAIN, tokenizer)
    assert found == []
    assert kind in ("chat", "prompt")


@pytest.mark.parametrize(
    "content",
    [[{"type": "text", "text": "Hello"}], [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}], ["Hello"],
     [{"type": "output_text", "text": "Hello"}]],
)  # fmt: skip
def test_parts_of_text_are_text(tokenizer, content):
    whole = documents(read_chat([SINGLE[0], {"role": "assistant", "content": "Hello"}], None, False, "here"), tokenizer)
    parts = documents(read_chat([SINGLE[0], {"role": "assistant", "content": content}], None, False, "here"), tokenizer)
    assert parts[0].tokens.tolist() == whole[0].tokens.tolist()


@pytest.mark.parametrize("kind", ["image", "image_url", "audio", "input_audio", "video"])
def test_other_parts_are_refused_by_name(kind):
    content = [{"type": "text", "text": "Look"}, {"type": kind, kind: "x"}]
    with pytest.raises(UserError, match=f"^here, message 1: a part of type '{kind}'; only text can be learned"):
        read_chat([{"role": "user", "content": content}, SINGLE[1]], None, False, "here")


@pytest.mark.parametrize("role", ["Assistant", "gpt", "human", "USER", "bot", "", None, 3])
def test_unknown_roles_are_one_line(role):
    with pytest.raises(UserError, match=r"^s.jsonl, line 7, messages, message 2: the role .* is none of system, "):
        formatting.read_sample({"messages": [SINGLE[0], {"role": role, "content": "x"}]}, PLAIN, "s.jsonl, line 7")


def test_prompts_and_completions_of_messages_are_chats(tokenizer):
    row = {"prompt": [SYSTEM, *SINGLE, MULTI[2]], "completion": [MULTI[3]]}
    sample = formatting.read_sample(row, PLAIN, "here")
    assert isinstance(sample, Chat)
    assert sample.learned == [False, False, False, False, True], "the earlier answer belongs to the prompt"
    for other in (
        {"prompt": "Add 2 and 2.", "completion": [MULTI[3]]},
        {"prompt": [MULTI[2]], "completion": "It is 4."},
    ):
        mixed = formatting.read_sample(other, PLAIN, "here")
        assert mixed == Chat([MULTI[2], MULTI[3]], [False, True], None)


@pytest.mark.parametrize("turns", [
    [{"from": "human", "value": "Hi there"}, {"from": "gpt", "value": "Hello!"}],
    [{"from": "user", "value": "Hi there"}, {"from": "assistant", "value": "Hello!"}],
    SINGLE,
])  # fmt: skip
def test_sharegpt_is_read(turns):
    assert formatting.read_sample({"conversations": turns}, PLAIN, "here") == read_chat(SINGLE, None, False, "here")
    with_system = formatting.read_sample({"conversations": turns, "system": "You are terse."}, PLAIN, "here")
    assert len(with_system.messages) == 3


def test_values_of_templates_are_as_the_file_has_them():
    row = {
        "s": "a",
        "n": 3,
        "f": 2.5,
        "t": True,
        "o": {"city": "Bern", "k": None},
        "l": ["x", "y"],
        "m": [1, {"a": "ü"}],
        "z": None,
    }
    filled = formatting.fill_template("{s}|{n}|{f}|{t}|{o}|{l}|{m}|{z}", row, "here")
    assert filled == 'a|3|2.5|true|{"city": "Bern", "k": null}|x\ny|[1, {"a": "ü"}]|'


# Any conversation

CONTENT = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\x00\x02\x03\N{SECTION SIGN}"),
    min_size=1,
    max_size=20,
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3),
    st.none() | CONTENT,
    st.sampled_from(["chatml", "llama3", "gemma3", "no_prompt", "mistral", "tagged"]),
    st.sampled_from(list(KINDS)),
)
def test_any_conversation(pairs, system, name, kind):
    """No learned token outside the assistants' text and the end markers, and each prompt as it is asked."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in pairs:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    tokenizer = KINDS[kind](TEMPLATES[name])
    chat = read_chat(messages, None, False, "here")
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant" and message["content"].strip()]
    docs = documents(chat, tokenizer)
    spans = [(text, span) for text in rendering.render(chat, tokenizer, "here") for span in text.learned]
    assert len(spans) == len(answers)
    for number, (text, (start, end)) in zip(answers, spans, strict=True):
        assert text.text[:start] == rendering.chat_prompt(messages[:number], tokenizer)
        marker = END[name] if END[name] != "<eos>" else tokenizer.huggingface.eos_token
        assert squash(text.text[start:end]) in (
            squash(messages[number]["content"] + marker),
            squash(messages[number]["content"]),
        )
    for document in docs:
        for start, _ in learned_runs(document):
            prefixes = [
                encoding.prompt_ids(rendering.chat_prompt(messages[:n], tokenizer), tokenizer, special=False)
                for n in answers
            ]
            assert any(document.tokens[:start].tolist() == p.tolist() for p in prefixes)


@given(
    st.text(st.characters(exclude_categories=("Cs",)), max_size=30),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=30),
)
@settings(max_examples=60, deadline=None)
def test_any_prompt_and_completion(prompt, completion):
    tokenizer = RenderingTokenizer(SPECIAL)
    (rendered,) = rendering.render(PromptCompletion(prompt, completion), tokenizer, "here")
    ids, mask = encoding.encode(rendered, tokenizer)
    asked = encoding.prompt_ids(prompt, tokenizer)
    if completion:
        assert ids[: len(asked)].tolist() == asked.tolist()
        assert not mask[: len(asked)].any()
        assert mask[len(asked) :].all()
    else:
        assert not mask.any()


def test_builtin_templates():
    for name in rendering.BUILTIN_TEMPLATES:
        tokenizer = Tokenizer(assets.BASE, rendering.builtin_template(name))
        (document,) = documents(read_chat(MULTI, None, False, "here"), tokenizer)
        assert len(learned_runs(document)) == 2
        assert rendering.end_marker(tokenizer) == {"gemma": "<end_of_turn>", "chatml": "<|im_end|>"}[name]
    assert (Path(rendering.__file__).parent / "templates").is_dir()


# What templates leave out, and ends that stand in the data


def refused(messages, tokenizer, tools=None) -> str:
    with pytest.raises(UserError) as caught:
        documents(read_chat(messages, tools, False, "here"), tokenizer)
    return str(caught.value)


def test_tools_are_looked_for_by_what_they_change(tokenizer):
    """A name alone proves nothing: it may stand in the text anyway."""
    llama, chatml = (Tokenizer(assets.BASE, TEMPLATES[name]) for name in ("llama3", "chatml"))
    two = [CALL, {**CALL, "function": {"name": "add_numbers", "arguments": {"a": 9}}}]
    message = refused([SINGLE[0], {"role": "assistant", "content": "", "tool_calls": two}], llama, TOOLS)
    assert "message 2: the chat template does not write tool calls beyond the first" in message
    text = {"role": "assistant", "content": "I will add_numbers now.", "tool_calls": [CALL]}
    assert "does not write tool calls" in refused([SINGLE[0], text], chatml)
    asked = [{"role": "user", "content": "please add_numbers 3"}, SINGLE[1]]
    assert "does not write tools" in refused(asked, chatml, TOOLS)
    short = [{"type": "function", "function": {"name": "a", "parameters": {}}}]
    assert "does not write tools" in refused(SINGLE, chatml, short)


@pytest.mark.parametrize("role", ["system", "developer", "tool"])
def test_a_message_that_the_template_leaves_out_is_refused(role):
    template = "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
    tokenizer = Tokenizer(assets.BASE, template + "{% if add_generation_prompt %}<assistant>{% endif %}")
    message = refused([{"role": role, "content": "Be kind."}, *SINGLE], tokenizer)
    assert message.startswith(f"here, message 1: the chat template leaves out the content of the role '{role}'")


@pytest.mark.parametrize("name", ["reasoning_content", "thinking"])
def test_reasoning_that_the_template_leaves_out_is_refused(name):
    tokenizer = Tokenizer(assets.BASE, TEMPLATES["chatml"])
    for content in ("Hello!", ""):
        message = refused([SINGLE[0], {"role": "assistant", "content": content, name: "They greet me."}], tokenizer)
        assert message.startswith(f"here, message 2: the chat template does not write {name}; remove it")


def test_calls_in_openais_older_form(make):
    legacy = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    tokenizer = make(TEMPLATES["qwen3"])
    row = {"messages": [SINGLE[0], legacy], "functions": TOOLS}
    sample = formatting.read_sample(row, PLAIN, "here")
    now = read_chat([SINGLE[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}], TOOLS, False, "here")
    assert documents(sample, tokenizer)[0].tokens.tolist() == documents(now, tokenizer)[0].tokens.tolist()


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "completion": "<eos>"},
        {"prompt": "Hi", "completion": " \n"},
        {"instruction": "Hi", "output": ""},
        {"text": "<bos><eos>"},
        {"text": "  \n "},
        {"messages": [SINGLE[0], {"role": "assistant", "content": "<end_of_turn>"}]},
        {"messages": [SINGLE[0], {"role": "assistant", "content": "<eos>"}]},
        {"messages": SINGLE, "weight": 0},
        {"prompt": "Hi", "completion": "Yo", "weight": 0},
        {"text": "some text", "train": False},
    ],
)
def test_nothing_but_an_end_is_never_learned(tokenizer, row):
    assert formatting.encode_record(Record(row, "here"), PLAIN, tokenizer)[1] == []


@pytest.mark.parametrize(
    ("row", "learned"),
    [
        ({"text": "some text<eos>\n"}, "some text<eos>"),
        ({"text": "<bos><bos>some text<eos><eos>"}, "some text<eos>"),
        ({"text": "\n<bos>some text"}, "some text<eos>"),
        ({"prompt": "<bos>Hi ", "completion": "Yo<eos>\n"}, "Yo<eos>"),
        ({"instruction": "Hi", "output": "Yo<eos>"}, "Yo<eos>"),
        ({"messages": [SINGLE[0], {"role": "assistant", "content": "Yo<eos>"}]}, "Yo<end_of_turn><eos>"),
    ],
)
def test_ends_that_stand_in_the_data_are_learned_once(tokenizer, row, learned):
    _, (document,) = formatting.encode_record(Record(row, "here"), PLAIN, tokenizer)
    assert text_of(document.tokens[document.loss_mask], tokenizer) == learned
    assert (document.tokens == tokenizer.bos_token_id).sum() == 1


def test_a_generation_tag_that_begins_elsewhere_than_the_prompt_ends():
    later = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<a>\n[{% generation %}{{ m.content }}{% endgeneration %}]<end>\n"
        "{% else %}<u>{{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}<a>\n{% endif %}"
    )
    opens = later.replace("{% if add_generation_prompt %}<a>\n", "{% if add_generation_prompt %}<a>\n[<think>")
    for template, learned in ((later, "[Hello!]<end>"), (opens, "Hello!]<end>")):
        tokenizer = Tokenizer(assets.BASE, template)
        (document,) = documents(read_chat(SINGLE, None, False, "here"), tokenizer)
        ((start, end),) = learned_runs(document)
        assert text_of(document.tokens[start:end], tokenizer) == learned + "<eos>"
        asked = rendering.chat_prompt([SINGLE[0]], tokenizer)
        assert document.tokens[:start].tolist() == encoding.prompt_ids(asked, tokenizer, special=False).tolist()
    other = later.replace("{% if add_generation_prompt %}<a>", "{% if add_generation_prompt %}<b>")
    assert "asks in another way than its generation tags" in refused(SINGLE, Tokenizer(assets.BASE, other))


def test_single_messages_and_messages_as_json_text():
    question, answer = SINGLE
    expected = Chat(SINGLE, [False, True], None)
    rows = [
        {"prompt": question, "completion": answer},
        {"prompt": json.dumps([question]), "completion": json.dumps([answer])},
        {"prompt": "Hi there", "completion": json.dumps([answer])},
    ]
    for row in rows:
        assert formatting.read_sample(row, PLAIN, "here") == expected
    listed = {"prompt": "Give JSON", "completion": '[{"a": 1}]'}
    assert formatting.read_sample(listed, PLAIN, "here") == PromptCompletion("Give JSON", '[{"a": 1}]')


def test_a_chat_that_the_assistant_begins(make):
    messages = [{"role": "assistant", "content": "Welcome."}, *SINGLE]
    tokenizer = make(TEMPLATES["chatml"])
    docs = documents(read_chat(messages, None, False, "here"), tokenizer)
    learned = "".join(text_of(d.tokens[a:b], tokenizer) for d in docs for a, b in learned_runs(d))
    assert "Hello!" in learned
    assert "Welcome" not in learned


def test_alpaca_with_history_is_refused_and_its_system_text_is_kept():
    row = {"instruction": "Hi", "output": "Yo", "system": "Be kind."}
    assert formatting.read_sample(row, PLAIN, "here") == PromptCompletion("Be kind.\nHi\n", "Yo\n")
    with pytest.raises(UserError, match=r"^here: history holds earlier turns"):
        formatting.read_sample({**row, "history": [["a", "b"]]}, PLAIN, "here")


def test_a_token_that_the_base_lacks_is_refused_where_it_stands(tmp_path):
    """A placeholder of multimodal models may stand in the vocabulary, but not in a text."""
    for path in assets.BASE.glob("*.json"):
        shutil.copy(path, tmp_path)
    tokens = json.loads((tmp_path / "tokenizer.json").read_text())
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokens["added_tokens"].append({"id": 4096, "content": "<image_soft_token>", **added})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokens))
    tokenizer = Tokenizer(tmp_path)
    message = "the base has no embedding of the token '<image_soft_token>'; remove it from the text"
    for row in ({"text": "a <image_soft_token> b"}, {"prompt": "<image_soft_token>", "completion": "b"}):
        with pytest.raises(UserError, match=f"^s.jsonl, line 2: {message}$"):
            formatting.encode_record(Record(row, "s.jsonl, line 2"), PLAIN, tokenizer)
    with pytest.raises(UserError, match=f"^{message}$"):
        encoding.prompt_ids("<image_soft_token>", tokenizer)
    assert formatting.encode_record(Record({"text": "a b"}, "here"), PLAIN, tokenizer)[1]
