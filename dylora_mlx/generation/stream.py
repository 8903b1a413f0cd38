"""Text as it is generated: mlx-lm's own loop, cut at stop strings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from dylora_mlx.generation.decode import TokenRouted


class TextPiece(NamedTuple):
    """Some text, and the column of the expert that served its last token (None where the whole text has one)."""

    text: str
    expert_id: int | None


class GenerationSummary(NamedTuple):
    """Tokens and tokens a second of prompt and text; peak memory in GB; how it ended: stop or length."""

    prompt_tokens: int
    prompt_speed: float
    tokens: int
    speed: float
    peak_memory: float
    reason: str


class Sampling(NamedTuple):
    """As mlx-lm's samplers take it; a temperature of 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 0.0
    min_p: float = 0.0
    top_k: int = 0
    repetition_penalty: float | None = None
    repetition_context: int = 20


class StopStrings:
    """Lets text through up to the first stop string; holds back an end that may be the beginning of one."""

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held, self.stopped = [stop for stop in stops if stop], "", False

    def push(self, text: str) -> str:
        """What may be shown now."""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            shown, self._held = self._held[: min(places)], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def rest(self) -> str:
        """What was held back, at the end."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that a stop string begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def encode_prompt(tokenizer: Any, text: str) -> np.ndarray:
    """Token ids int32 [L] of a text, BOS first."""
    found = tokenizer.encode(text)
    if not found or found[0] != tokenizer.bos_token_id:
        found = [tokenizer.bos_token_id, *found]
    return np.array(found, np.int32)


def stream_text(
    model: nn.Module,
    tokenizer: Any,
    prompt: np.ndarray,
    max_tokens: int,
    sampling: Sampling,
    stops: Sequence[str] = (),
) -> Iterator[TextPiece | GenerationSummary]:
    """Pieces of text after a prompt, token ids [L], then a summary. model: mlx-lm's, or `TokenRouted`."""
    from mlx_lm.generate import stream_generate
    from mlx_lm.sample_utils import make_logits_processors, make_sampler

    sampler = make_sampler(sampling.temperature, top_p=sampling.top_p, min_p=sampling.min_p, top_k=sampling.top_k)
    processors = make_logits_processors(None, sampling.repetition_penalty, sampling.repetition_context)
    routed = model if isinstance(model, TokenRouted) else None
    stopper, first, last = StopStrings(stops), None, None
    responses = stream_generate(
        model, tokenizer, mx.array(prompt), max_tokens, sampler=sampler, logits_processors=processors
    )
    for number, last in enumerate(responses):
        if routed and first is None:
            first = len(routed.chosen_experts) - 2  # the loop is one call ahead
        expert_id = None
        if routed and first is not None:
            place = min(first + number, len(routed.chosen_experts) - 1)
            expert_id = int(np.array(routed.chosen_experts[place])[0])
        text = stopper.push(last.text)
        if last.finish_reason is not None and not stopper.stopped:
            text += stopper.rest()
        if text:
            yield TextPiece(text, expert_id)
        if stopper.stopped:
            break
    assert last is not None
    ended = "stop" if stopper.stopped or last.finish_reason == "stop" else "length"
    yield GenerationSummary(
        last.prompt_tokens, last.prompt_tps, last.generation_tokens, last.generation_tps, last.peak_memory, ended
    )
