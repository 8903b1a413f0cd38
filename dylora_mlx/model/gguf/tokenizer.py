"""tokenizer.json, tokenizer_config.json and the token ids of a GGUF file.

Token ids are llama.cpp's, which reads the same metadata, except where the published tokenizer of a family differs from
llama.cpp (PreTokenizer.nfc). Special tokens in a text are always recognised, as in every Hugging Face tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from dylora_mlx.errors import UserError
from dylora_mlx.model.gguf.pre_tokenizers import DEFAULT, PRE_TOKENIZERS
from dylora_mlx.model.gguf.reader import GGUFFile
from dylora_mlx.system import console

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Values of tokenizer.ggml.token_type."""
SPACE = "▁"
"""The character that stands for a space in SentencePiece vocabularies."""
END_TOKENS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]",
    "<|end_of_text|>", "<end_of_utterance>", "<eos>", "</s>", "<\uff5cend▁of▁sentence\uff5c>",
}  # fmt: skip
"""Control tokens that end a text even if the metadata does not list them, as in llama.cpp."""


class TokenizerFiles(NamedTuple):
    """The tokenizer of a GGUF file."""

    tokenizer: Tokenizer
    """To be saved as tokenizer.json."""
    config: dict[str, Any]
    """tokenizer_config.json."""
    ids: dict[str, Any]
    """bos_token_id, eos_token_id (a list, the tokenizer's own EOS first) and pad_token_id, those that there are."""


class Vocabulary(NamedTuple):
    """Tokens, token types and special token ids from the metadata."""

    tokens: list[str]
    """Texts by id."""
    types: list[int]
    """NORMAL, CONTROL and so on, by id."""
    ids: dict[str, int]
    """Ids of bos, eos, unk and pad, those that there are."""
    ends: list[int]
    """Ids that end a text, the EOS first."""


def read_tokenizer(file: GGUFFile, rows: int) -> TokenizerFiles:
    """Return the tokenizer of a file.

    Args:
        file: the file.
        rows: rows of the model's embedding.

    Raises UserError for a file without a tokenizer, or with one that is damaged or of a kind that cannot be built.
    """
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind not in BUILDERS or "tokenizer.ggml.tokens" not in file.metadata:
        if kind is None or kind in ("none", "no_vocab") or kind in BUILDERS:
            raise UserError(
                f"{file.path}: holds no tokenizer; give a GGUF file that has one, or the Hugging Face folder"
            )
        raise UserError(
            f"{file.path}: a tokenizer of kind {kind!r:.40} cannot be built, only {' and '.join(BUILDERS)} can"
        )
    vocabulary = _vocabulary(file, kind)
    if len(vocabulary.tokens) > rows:
        raise UserError(f"{file.path}: {len(vocabulary.tokens)} tokens, but the embedding has only {rows} rows")
    try:
        tokenizer, adds_bos = BUILDERS[kind](file, vocabulary)
        _add_tokens(tokenizer, vocabulary)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # the tokenizers library raises plain Exception, for a merge of unknown tokens for example
        raise UserError(f"{file.path}: its tokenizer cannot be built ({str(error)[:120]})") from error
    if tokenizer.get_vocab() != {token: i for i, token in enumerate(vocabulary.tokens)}:
        raise UserError(f"{file.path}: its tokenizer cannot be built (its special tokens do not fit its vocabulary)")
    adds = {"bos": _flag(file, "add_bos_token", adds_bos), "eos": _flag(file, "add_eos_token", False)}
    _set_post_processor(tokenizer, vocabulary, adds, byte_level=kind == "gpt2")
    names = {name: vocabulary.tokens[i] for name, i in vocabulary.ids.items()}
    config: dict[str, Any] = {
        # The class that takes tokenizer.json as it is; others would replace parts of it by their own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds["bos"],
        "add_eos_token": adds["eos"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.integer("context_length"),
        **{f"{name}_token": token for name, token in names.items()},
    }
    if template := _chat_template(file):
        config["chat_template"] = template
    ids: dict[str, Any] = {
        f"{name}_token_id": vocabulary.ids[name] for name in ("bos", "pad") if name in vocabulary.ids
    }
    if vocabulary.ends:
        ids["eos_token_id"] = vocabulary.ends
    return TokenizerFiles(tokenizer, config, ids)


def _vocabulary(file: GGUFFile, kind: str) -> Vocabulary:
    tokens = _texts(file, "tokens")
    # llama.cpp's name for a token without text, of which there can be several.
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    types = _numbers(file, "token_type", len(tokens), NORMAL)
    repeated = len(tokens) - len(set(tokens))
    if repeated or not tokens:
        raise UserError(
            f"{file.path}: {repeated} of its {len(tokens)} tokens are there twice, so its tokenizer is damaged"
        )
    defaults = {"bos": 1, "eos": 2, "unk": 0} if kind == "llama" else {}
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    stated = {name: _id(file, f"{key}_token_id", len(tokens), defaults.get(name)) for name, key in keys.items()}
    ids = {name: i for name, i in stated.items() if i is not None}
    ends = [ids.get("eos"), *(_id(file, f"{name}_token_id", len(tokens)) for name in ("eot", "eom"))]
    ends += [i for i in _optional_list(file, "eos_token_ids") if type(i) is int and 0 <= i < len(tokens)]  # Ollama's
    ends += [i for i, token in enumerate(tokens) if types[i] == CONTROL and token in END_TOKENS]
    for i in [*ids.values(), *ends]:
        if i is not None and types[i] in (NORMAL, UNUSED):
            types[i] = CONTROL
    return Vocabulary(tokens, types, ids, list(dict.fromkeys(i for i in ends if i is not None)))


def _byte_level(file: GGUFFile, vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    """Return a byte-level BPE tokenizer like GPT-2's, and whether a text begins with BOS by default."""
    name = file.metadata.get("tokenizer.ggml.pre")
    if name is None:
        console.warn(
            f"{file.path}: does not say how its tokenizer splits text; it is split as llama.cpp does by default"
        )
    pre_tokenizer = PRE_TOKENIZERS.get(DEFAULT if name is None else name)
    if pre_tokenizer is None:
        raise UserError(f"{file.path}: its tokenizer splits text as {name!r:.40}, which is not known here")
    merges = [(first, second) for first, _, second in (text.partition(" ") for text in _merge_texts(file))]
    vocab = {token: i for i, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(BPE(vocab, merges, ignore_merges=pre_tokenizer.whole_words))
    if pre_tokenizer.nfc:
        tokenizer.normalizer = normalizers.NFC()
    split: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre_tokenizer.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre_tokenizer.adds_bos


def _merge_texts(file: GGUFFile) -> list[str]:
    """Return the merges, each as two tokens joined by one space.

    Raises UserError for any other text: tokens in GPT-2's byte alphabet contain no space.
    """
    merges = _texts(file, "merges")
    for number, text in enumerate(merges):
        if text.count(" ") != 1 or text[0] == " " or text[-1] == " ":
            raise UserError(f"{file.path}: merge {number} of its tokenizer is {text[:40]!r}, not two tokens")
    return merges


def _sentencepiece(file: GGUFFile, vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    """Return SentencePiece's BPE, which merges the pair whose token has the highest score, with bytes for the rest."""
    scores = _numbers(file, "scores", len(vocabulary.tokens), 0.0)
    vocab = {token: i for i, token in enumerate(vocabulary.tokens)}
    # Control, byte and user-defined tokens are never the result of a merge, nor a part of one.
    pieces = {token: scores[i] for i, token in enumerate(vocabulary.tokens) if vocabulary.types[i] in (NORMAL, UNUSED)}
    unknown = vocabulary.tokens[vocabulary.ids["unk"]] if "unk" in vocabulary.ids else None
    has_bytes = all(f"<0x{byte:02X}>" in vocab for byte in range(256))
    model = BPE(vocab, ranked_merges(pieces, vocab), unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes)
    tokenizer = Tokenizer(model)
    prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", SPACE)
    # Also after special tokens: every text between two of them is normalised separately.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer, True


def ranked_merges(scores: Mapping[str, float], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return every pair of pieces that joins to a piece, the highest score of the joined piece first.

    Args:
        scores: score of each piece that takes part in merges.
        ids: their token ids.
    """
    pairs = [
        (-score, ids[piece], ids[first], first, piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if (first := piece[:cut]) in scores and piece[cut:] in scores
    ]
    return [(first, second) for *_, first, second in sorted(pairs)]


BUILDERS = {"llama": _sentencepiece, "gpt2": _byte_level}
"""Functions that build the tokenizer, by the value of tokenizer.ggml.model."""


def _add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Register special and user-defined tokens, so that they are never split in a text."""
    special = [t for t, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind in (CONTROL, UNKNOWN)]
    other = [t for t, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in other])


def _set_post_processor(
    tokenizer: Tokenizer, vocabulary: Vocabulary, adds: Mapping[str, bool], byte_level: bool
) -> None:
    """Make `encode` add BOS and EOS as `adds` selects."""
    added = {name: i for name, i in vocabulary.ids.items() if adds.get(name)}
    tokens = {name: vocabulary.tokens[i] for name, i in added.items()}
    start, end = ([f"{tokens[name]}:{{}}"] if name in tokens else [] for name in ("bos", "eos"))
    steps: list[Any] = [processors.ByteLevel(trim_offsets=False)] if byte_level else []
    if added:
        single, pair = (
            [part.format(kind) for part in (*start, f"${'AB'[kind]}:{kind}", *end)] for kind in (0, 1)
        )  # fmt: skip
        special = [(tokens[name], i) for name, i in added.items()]
        steps.append(processors.TemplateProcessing(single, [*single, *pair], special))
    if steps:
        tokenizer.post_processor = steps[0] if len(steps) == 1 else processors.Sequence(steps)


def _chat_template(file: GGUFFile) -> str | list[dict[str, str]] | None:
    """Return the chat template; with named ones beside it, a list of all; None if there is none."""
    key = "tokenizer.chat_template"
    named = {
        str(name): file.metadata.get(f"{key}.{name}") for name in _optional_list(file, "", "tokenizer.chat_templates")
    }
    templates = {"default": file.metadata.get(key), **named}
    texts = {name: text for name, text in templates.items() if isinstance(text, str) and text.strip()}
    if texts.keys() <= {"default"}:
        return texts.get("default")
    return [{"name": name, "template": text} for name, text in texts.items()]


def _flag(file: GGUFFile, name: str, default: bool) -> bool:
    value = file.metadata.get(f"tokenizer.ggml.{name}", default)
    return value if isinstance(value, bool) else default


def _id(file: GGUFFile, name: str, count: int, default: int | None = None) -> int | None:
    """Return a token id of the metadata, or the default, or None. One beyond the vocabulary is ignored, as in llama.cpp."""
    for value in (file.metadata.get(f"tokenizer.ggml.{name}"), default):
        if type(value) is int and 0 <= value < count:
            return value
    return None


def _texts(file: GGUFFile, name: str) -> list[str]:
    value = file.metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UserError(f"{file.path}: its tokenizer is damaged (tokenizer.ggml.{name} is missing or no list of texts)")
    return value


def _numbers(file: GGUFFile, name: str, count: int, default: float) -> list[Any]:
    """Return a list of numbers of the metadata, one for each token; the default for each if the file has none."""
    value = file.metadata.get(f"tokenizer.ggml.{name}", [default] * count)
    if not isinstance(value, list) or len(value) != count or not all(isinstance(n, (int, float)) for n in value):
        raise UserError(f"{file.path}: its tokenizer is damaged (tokenizer.ggml.{name} has no number for each token)")
    return list(value)


def _optional_list(file: GGUFFile, name: str, key: str = "") -> Sequence[Any]:
    value = file.metadata.get(key or f"tokenizer.ggml.{name}")
    return value if isinstance(value, list) else []
