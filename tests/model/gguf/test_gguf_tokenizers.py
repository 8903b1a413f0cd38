"""Tokenizers from GGUF metadata give the ids of the tokenizers that the metadata was written from."""

from __future__ import annotations

import random

import pytest

from dylora_mlx.errors import UserError
from dylora_mlx.model.base.load import load_tokenizer
from dylora_mlx.model.gguf.convert import convert
from dylora_mlx.model.gguf.pre_tokenizers import PRE_TOKENIZERS
from dylora_mlx.model.gguf.tokenizer import ranked_merges
from tests.gguf_files import CHAT, byte_level, sample_texts, spm, trained_byte_level, trained_sentencepiece, write_gguf

VARIED = [
    "", " ", "  ", "\n", "\n\n\n", "\t", "a", " a ", "don't WE'LL i'm", "0 12 123 12345 3.14 1,000", "def f(x):\n    return x\n",
    " " * 40, "x" + " " * 33 + "y", "Zürich “quotes” é e\u0301 Å", "日本語 中文 한국어", "🙂👨‍👩‍👧‍👦🇺🇸", "\x00\x7f\u00a0\u2003",
    "<b>bold</b>",
    "a\r\nb \n c", "hahahahaha ======== ////////", "<tool>x</tool>", "trailing   ", "ab\n\n12",
]  # fmt: skip


def random_texts(count: int, parts: list[str]) -> list[str]:
    rng = random.Random(3)
    return ["".join(rng.choice(parts) for _ in range(rng.randint(1, 30))) for _ in range(count)]


def texts() -> list[str]:
    parts = ["a", "b", "the", " ", "  ", "\n", "\n\n", "1", "23", "é", "日", "🙂", ".", "'s", "_", "<b>", "=", "=="]
    return VARIED + sample_texts()[:60] + random_texts(300, parts)


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2", "gpt-2"])
def test_byte_level_ids_are_the_originals(tmp_path, pre):
    made = write_gguf(tmp_path / "m.gguf", "qwen3", tokenizer=byte_level(pre))
    found, original = load_tokenizer(str(made.path)), trained_byte_level(pre)
    for text in texts():
        # Qwen's published tokenizer composes characters first; the one trained here does not.
        if pre != "qwen2" or "\u0301" not in text:
            assert found.encode_text(text) == original.encode(text, add_special_tokens=False).ids, repr(text)
            assert found.decode(found.encode_text(text)) == text


def test_special_tokens_and_chat(tmp_path):
    made = write_gguf(tmp_path / "m.gguf", "qwen3")
    found, vocab = load_tokenizer(str(made.path)), trained_byte_level("smollm").get_vocab()
    start, end, other, tool = (vocab[t] for t in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool>"))
    assert found.encode_text("<|im_start|> <tool><|im_end|>") == [start, *found.encode_text(" "), tool, end]
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (start, end, end)
    assert found.eos_token_ids == (end, other)
    assert found.huggingface.encode("a") == found.encode_text("a")
    assert found.chat_template == CHAT
    special = set(found.huggingface.all_special_tokens)
    assert {"<|im_start|>", "<|im_end|>"} <= special
    assert "<tool>" not in special
    assert found.decode([start, tool], skip_special_tokens=True) == "<tool>"


def test_ends_of_text_and_templates_of_the_metadata(tmp_path):
    vocab = trained_byte_level("smollm").get_vocab()
    more = {
        "tokenizer.ggml.eot_token_id": vocab["a"], "tokenizer.ggml.eom_token_id": vocab["b"], "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.eos_token_ids": [vocab["c"]], "tokenizer.chat_templates": ["rag"],
        "tokenizer.chat_template.rag": "RAG", "tokenizer.ggml.mask_token_id": 70000,
    }  # fmt: skip
    made = write_gguf(tmp_path / "m.gguf", "qwen3", tokenizer=byte_level("smollm", **more))
    found = load_tokenizer(str(made.path))
    named = [vocab[t] for t in ("<|im_end|>", "a", "b", "c", "<|endoftext|>")]
    assert found.eos_token_ids == tuple(named)
    assert found.huggingface.encode("d") == [found.bos_token_id, vocab["d"], found.eos_token_id]
    assert found.huggingface.chat_template == {"default": CHAT, "rag": "RAG"}
    assert found.chat_template == CHAT


@pytest.mark.parametrize("prefix", [False, True])
def test_sentencepiece_ids_are_sentencepieces(tmp_path, prefix):
    made = write_gguf(tmp_path / "m.gguf", "gemma3", tokenizer=spm(prefix))
    found, original = load_tokenizer(str(made.path)), trained_sentencepiece(prefix)
    count = 0
    for text in texts():
        # With a prefix, llama.cpp adds a space after every user-defined token too, SentencePiece only at the start.
        if not prefix or not any(token in text for token in ("\n", "<b>")):
            expected = original.encode(text)
            assert found.encode_text(text) == expected, repr(text)
            assert found.decode(expected) == original.decode(expected) or "\ufffd" in original.decode(expected)
            count += 1
    assert count > 30


def test_a_space_follows_every_special_token_with_a_prefix(tmp_path):
    """As in llama.cpp and in the published tokenizer.json of Llama 2."""
    made = write_gguf(tmp_path / "m.gguf", "llama", tokenizer=spm(True))
    found = load_tokenizer(str(made.path))
    turn = found.convert_tokens_to_ids("<start_of_turn>")
    assert found.encode_text("a<start_of_turn>b") == [*found.encode_text("a"), turn, *found.encode_text("b")]
    assert found.encode_text("a")[0] == found.convert_tokens_to_ids("▁a")
    assert found.huggingface.encode("a") == [2, *found.encode_text("a")]


def test_offsets_point_into_the_text(tmp_path):
    for name, tokenizer in {"spm": spm(), "prefix": spm(True), "bytes": byte_level("llama-bpe")}.items():
        made = write_gguf(tmp_path / f"{name}.gguf", "qwen3", tokenizer=tokenizer)
        text = "def f(x):\n    return 'Zürich'  # 12"
        encoded = load_tokenizer(str(made.path)).encode_with_offsets(text)
        assert encoded is not None
        assert encoded[1][0][0] == 0
        assert encoded[1][-1][1] == len(text)
        assert all(0 <= begin <= end <= len(text) for begin, end in encoded[1])


def test_merges_follow_the_scores():
    scores = {"a": -9.0, "b": -9.0, "ab": -1.0, "ba": -0.0, "aba": -2.0}
    ids = {token: i for i, token in enumerate(scores)}
    assert ranked_merges(scores, ids) == [("b", "a"), ("a", "b"), ("a", "ba"), ("ab", "a")]


def test_defaults_for_what_a_file_leaves_out(tmp_path, capsys):
    keys = ("pre", "token_type", "padding_token_id", "add_bos_token")
    made = write_gguf(tmp_path / "m.gguf", "qwen3", metadata={f"tokenizer.ggml.{key}": None for key in keys})
    found = load_tokenizer(str(made.path))
    # Tokens that the metadata names are special even without types; the others are not.
    assert found.encode_text("<|im_end|>") == [found.eos_token_id]
    assert len(found.encode_text("<tool>")) > 1
    assert "does not say how its tokenizer splits text" in capsys.readouterr().err
    assert found.encode_text("a+1234") == [found.get_vocab()[t] for t in "a+1234"]
    sentencepiece = {f"tokenizer.ggml.{key}": None for key in ("add_space_prefix", "add_bos_token")}
    spaced = load_tokenizer(
        str(write_gguf(tmp_path / "s.gguf", "llama", tokenizer=spm(True), metadata=sentencepiece).path)
    )
    assert spaced.huggingface.encode("a") == [2, spaced.convert_tokens_to_ids("▁a")]


def test_every_known_split_can_be_built():
    from tokenizers import Regex, pre_tokenizers

    for name, known in PRE_TOKENIZERS.items():
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in known.patterns]
        pieces = pre_tokenizers.Sequence(steps).pre_tokenize_str("Don't stop: 12345 x\n\n  y!")
        assert "".join(piece for piece, _ in pieces) == "Don't stop: 12345 x\n\n  y!", name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "holds no tokenizer"),
        ({"tokens": None}, "holds no tokenizer"),
        ({"model": "none"}, "holds no tokenizer"),
        ({"model": "t5"}, "a tokenizer of kind 't5' cannot be built, only llama and gpt2 can"),
        ({"model": "bert"}, "of kind 'bert'"),
        ({"pre": "kimi-k2"}, "splits text as 'kimi-k2', which is not known here"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": ["a b c"]}, "merge 0 of its tokenizer is 'a b c'"),
        ({"merges": ["a"]}, "merge 0 of its tokenizer is 'a'"),
        ({"merges": ["a 日"]}, "its tokenizer cannot be built"),
        ({"token_type": [1, 2]}, "tokenizer.ggml.token_type has no number for each token"),
        ({"tokens": ["a", "b", "a"], "token_type": [1, 1, 1]}, "1 of its 3 tokens are there twice"),
        ({"tokens": [f"t{i}" for i in range(700)], "token_type": [1] * 700}, "700 tokens, but the embedding has only 601 rows"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_cannot_be_built_is_refused(tmp_path, changes, message):
    metadata = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    made = write_gguf(tmp_path / "m.gguf", "qwen3", metadata=metadata, vocab_size=601)
    with pytest.raises(UserError, match=message):
        convert(made.path, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf"]
