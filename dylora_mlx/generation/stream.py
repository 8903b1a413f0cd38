"""Streaming text generation: mlx-lm's decoding loop, cut at stop strings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from dylora_mlx.generation.decode import TokenRouted
from dylora_mlx.model.decoder import decode_cache


class TextPiece(NamedTuple):
    """A piece of generated text."""

    text: str
    expert_id: int | None
    """The expert with the largest gate on the piece's last token; None if one set of gates serves the whole text."""


class GenerationSummary(NamedTuple):
    """Token counts, speed and memory of one generation."""

    prompt_tokens: int
    prompt_speed: float
    """Prompt tokens per second; of many prompts at once, those of all in the time of all."""
    tokens: int
    """Generated tokens."""
    speed: float
    """Generated tokens per second; of many prompts at once, those of all in the time of all."""
    peak_memory: float
    """Peak memory in GB."""
    reason: str
    """Reason for the end of the text: stop or length."""


class Sampling(NamedTuple):
    """Parameters of mlx-lm's samplers. A temperature of 0 is greedy decoding."""

    temperature: float = 0.0
    top_p: float = 0.0
    min_p: float = 0.0
    top_k: int = 0
    repetition_penalty: float | None = None
    repetition_context: int = 20
    """Recent tokens that the repetition penalty applies to."""


class StopStrings:
    """Passes text through up to the first stop string, and holds back an end that may begin one."""

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held, self.stopped = [stop for stop in stops if stop], "", False

    def push(self, text: str) -> str:
        """Add text and return the part that may be shown now."""
        self._held += text
        positions = [position for stop in self._stops if (position := self._held.find(stop)) >= 0]
        if positions:
            self.stopped = True
            released, self._held = self._held[: min(positions)], ""
            return released
        held_length = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        released, self._held = self._held[: len(self._held) - held_length], self._held[len(self._held) - held_length :]
        return released

    def rest(self) -> str:
        """Return the text that is still held back, once the text has ended."""
        released, self._held = self._held, ""
        return released


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of the text that is a proper prefix of a stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _cut_blanks(tokenizer: Any, before: int, tokens: Sequence[int], text: str) -> str:
    """Return the blanks that mlx-lm's detokenizer has cut off the beginning of a continuation, as if a document began there.

    Args:
        tokenizer: mlx-lm's tokenizer wrapper.
        before: the last token of the prompt.
        tokens: the first generated tokens.
        text: their text by the detokenizer.
    """
    if before == tokenizer.bos_token_id:  # a document does begin there, and some tokenizers begin one with a blank
        return ""
    all_text = tokenizer.decode([before, *tokens], clean_up_tokenization_spaces=False)
    own = all_text[len(tokenizer.decode([before], clean_up_tokenization_spaces=False)) :]
    return " " * (_count_blanks(own) - _count_blanks(text))


def _count_blanks(text: str) -> int:
    """Return the number of blanks that a text begins with."""
    return len(text) - len(text.lstrip(" "))


class Beginning:
    """Give the beginning of a continuation back the blanks that mlx-lm's detokenizer cuts off.

    Args:
        tokenizer: mlx-lm's tokenizer wrapper.
        before: the last token of the prompt.
    """

    def __init__(self, tokenizer: Any, before: int):
        self._tokenizer, self._before = tokenizer, before
        self._tokens: list[int] = []
        self._text, self._begun = "", False

    def push(self, token: int, text: str, ended: bool) -> str:
        """Add a token with its new text; return the text that may be shown. Blanks are held back until more follows."""
        if self._begun:
            return text
        self._tokens += [] if token in self._tokenizer.eos_token_ids else [token]
        self._text += text
        self._begun = ended or bool(self._text.strip(" "))
        if not self._begun:
            return ""
        return _cut_blanks(self._tokenizer, self._before, self._tokens, self._text) + self._text


def count_experts(names: Sequence[str], expert_ids: Sequence[int]) -> dict[str, int]:
    """Return the tokens of each expert by its name, for expert_ids [T]; experts without a token are left out."""
    return {name: expert_ids.count(expert_id) for expert_id, name in enumerate(names) if expert_id in expert_ids}


def make_token_sampler(sampling: Sampling) -> Any:
    """Return mlx-lm's sampler for these parameters."""
    from mlx_lm.sample_utils import make_sampler

    return make_sampler(sampling.temperature, top_p=sampling.top_p, min_p=sampling.min_p, top_k=sampling.top_k)


def make_processors(sampling: Sampling) -> list[Any]:
    """Return mlx-lm's logits processors for these parameters."""
    from mlx_lm.sample_utils import make_logits_processors

    return make_logits_processors(None, sampling.repetition_penalty, sampling.repetition_context)


def stream_text(
    model: nn.Module,
    tokenizer: Any,
    prompt: np.ndarray,
    max_tokens: int,
    sampling: Sampling,
    stops: Sequence[str] = (),
) -> Iterator[TextPiece | GenerationSummary]:
    """Yield pieces of text that continue a prompt, then a summary.

    Args:
        model: an mlx-lm model or `TokenRouted`.
        tokenizer: mlx-lm's tokenizer wrapper.
        prompt: token ids int32 [L].
        max_tokens: maximum number of generated tokens.
        sampling: sampler parameters.
        stops: strings that end the text.
    """
    from mlx_lm.generate import generation_stream, stream_generate
    from mlx_lm.models.cache import make_prompt_cache

    sampler, processors = make_token_sampler(sampling), make_processors(sampling)
    cache, expert_ids = make_prompt_cache(model), []

    def note_expert(_: mx.array, logits: mx.array) -> mx.array:
        """Note the expert of the token that these logits choose, to be evaluated together with them."""
        expert_ids.append(decode_cache.token_gates(cache)[-1].argmax())
        return mx.depends(logits, expert_ids[-1])

    routed = isinstance(model, TokenRouted)
    stopper, last = StopStrings(stops), None
    responses = stream_generate(
        model, tokenizer, mx.array(prompt), max_tokens, sampler=sampler, prompt_cache=cache,
        logits_processors=[*processors, *([note_expert] if routed else [])],
    )  # fmt: skip
    beginning = Beginning(tokenizer, int(prompt[-1]))
    try:
        for step, last in enumerate(responses):
            new = beginning.push(last.token, last.text, last.finish_reason is not None)
            text = stopper.push(new)
            if last.finish_reason is not None and not stopper.stopped:
                text += stopper.rest()
            if text:
                # The last response may repeat the token before it, with the text that was held back.
                yield TextPiece(text, int(expert_ids[min(step, len(expert_ids) - 1)].item()) if routed else None)
            if stopper.stopped:
                break
    finally:
        # mlx-lm has begun a step that nobody waits for; one that is at work when the interpreter ends aborts the process.
        mx.synchronize(generation_stream)
    assert last is not None
    reason = "stop" if stopper.stopped or last.finish_reason == "stop" else "length"
    yield GenerationSummary(
        last.prompt_tokens, last.prompt_tps, last.generation_tokens, last.generation_tps, last.peak_memory, reason
    )
