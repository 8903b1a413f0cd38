"""How a byte-level tokenizer splits text before merging, by the name in tokenizer.ggml.pre.

The patterns are those of the published tokenizer.json of each family, where llama.cpp has them rewritten for its own
regular expressions. Each pattern splits the pieces that the one before it left, into its matches and what lies between.
"""

from __future__ import annotations

from typing import NamedTuple

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORDS + r"\p{N}{1,3}" + _REST
_QWEN2 = _WORDS + r"\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_END = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}" + _END
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SHORT}|\p{{N}}{{1,3}}"
    + _END
)
_SEED = _WORDS + r"\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-\x{D7FF}]+", r"\p{N}")
_LLAMA_CPP_DEFAULT = (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")


class PreTokenizer(NamedTuple):
    """How text becomes the pieces in which bytes are merged to tokens."""

    patterns: tuple[str, ...]
    """Regular expressions, in order."""
    whole_words: bool = False
    """Whether a piece that is a token stays one, whatever the merges give (ignore_merges)."""
    adds_bos: bool = False
    """Whether a text begins with BOS where the file does not say."""
    nfc: bool = False
    """Whether the published tokenizer composes characters first (NFC), which llama.cpp leaves out."""


_NAMES = {
    PreTokenizer((_LLAMA3,), whole_words=True, adds_bos=True): (
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano"
    ),
    PreTokenizer((_LLAMA3,)): "smaug-bpe dbrx glm4 chatglm-bpe",
    PreTokenizer((_QWEN2,), nfc=True): "qwen2",
    PreTokenizer((_QWEN2,)): "deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
    PreTokenizer((_TEKKEN,), whole_words=True, adds_bos=True): "tekken",
    PreTokenizer((_GPT4O,)): "gpt-4o llama4 kanana2 minimax-m2",
    PreTokenizer((_SEED,)): "seed-coder",
    PreTokenizer((r"\p{N}", _GPT2)): "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    PreTokenizer(_DEEPSEEK_CODER): "deepseek-coder",
    PreTokenizer((_GPT2,)): "gpt-2 phi-2 mpt olmo jais trillion gigachat a.x-4.0 mellum exaone4 granite-docling",
    PreTokenizer(_LLAMA_CPP_DEFAULT): "default",
}
PRE_TOKENIZERS = {name: pre_tokenizer for pre_tokenizer, names in _NAMES.items() for name in names.split()}
"""Pre-tokenizers by the name in tokenizer.ggml.pre."""
DEFAULT = "default"
"""Name for a file that states none, as in llama.cpp."""
