"""The text of a continuation: exactly that of its tokens, blanks at the beginning included."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm import tokenizer_utils
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from dylora_mlx.generation.stream import GenerationSummary, Sampling, TextPiece, stream_text

BYTES = {"<s>": 0, "</s>": 1, "x": 2, "Ġa": 3, "Ġ": 4, "ĠĠĠ": 5, "b": 6}
PIECES = {"<s>": 0, "</s>": 1, "x": 2, "▁a": 3, "▁": 4, "▁▁▁": 5, "b": 6}
SPM_DECODER = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


def wrapped(vocabulary: dict[str, int], decoder: Any, detokenizer: Any) -> Any:
    """Return mlx-lm's tokenizer of a vocabulary."""
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoder
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    return tokenizer_utils.TokenizerWrapper(fast, detokenizer)


TOKENIZERS = {
    "byte-level": wrapped(BYTES, decoders.ByteLevel(), tokenizer_utils.BPEStreamingDetokenizer),
    "pieces": wrapped(PIECES, SPM_DECODER, tokenizer_utils.SPMStreamingDetokenizer),
    "decoded": wrapped(PIECES, SPM_DECODER, tokenizer_utils.NaiveStreamingDetokenizer),
}


class Fixed(nn.Module):
    """A model that generates the given tokens after a prompt of one token."""

    layers = ()

    def __init__(self, tokens: list[int]):
        super().__init__()
        self._left = [*tokens, 1, 1, 1]

    def make_cache(self) -> list[Any]:
        return []

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        return 9 * mx.eye(len(BYTES))[self._left.pop(0)][None, None]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    ("before", "tokens", "text"),
    [
        (2, [3, 3], " a a"),
        (2, [4, 6], " b"),
        (2, [5, 6, 3], "   b a"),
        (2, [6, 3], "b a"),
        (2, [4], " "),
        (2, [], ""),
        (0, [3, 3], "a a"),
    ],
)
def test_a_continuation_keeps_its_blanks(kind, before, tokens, text):
    """After the beginning of a document (the last row) the first blank is no part of the text."""
    pieces = list(stream_text(Fixed(tokens), TOKENIZERS[kind], np.array([before], np.int32), 8, Sampling()))
    assert "".join(piece.text for piece in pieces if isinstance(piece, TextPiece)) == text
    assert isinstance(pieces[-1], GenerationSummary)
    assert pieces[-1].reason == "stop"


def test_a_stop_string_may_begin_with_the_blank():
    pieces = stream_text(Fixed([3, 6]), TOKENIZERS["byte-level"], np.array([2], np.int32), 8, Sampling(), [" a"])
    assert [piece for piece in pieces if isinstance(piece, TextPiece)] == []
