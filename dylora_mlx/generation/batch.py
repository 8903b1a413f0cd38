"""Many texts at once, through mlx-lm's BatchGenerator: a step of the batch reads the weights once for all of its rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from dylora_mlx.generation.decode import TokenRouted
from dylora_mlx.generation.stream import (
    Beginning,
    GenerationSummary,
    Sampling,
    StopStrings,
    make_processors,
    make_token_sampler,
)
from dylora_mlx.model.decoder import decode_cache

ROWS = 16
"""Texts that are generated at once."""
PROMPT_ROWS = 8
"""Prompts that are read at once."""


class BatchPrompt(NamedTuple):
    """One of many prompts."""

    ids: np.ndarray
    """Token ids, int32 [L]."""
    max_tokens: int
    """Maximum number of generated tokens; 0 for none."""
    stops: Sequence[str] = ()
    """Strings that end the text."""
    fixed_gates: np.ndarray | None = None
    """Gates [E] of every token; None for those of the model."""


class BatchText(NamedTuple):
    """The text after one of many prompts."""

    text: str
    expert_ids: list[int]
    """The expert with the largest gate for each token; empty for a model without a router and for fixed gates."""
    summary: GenerationSummary
    """Counts of this text; the speeds are those of the whole batch."""


class _Row:
    """A text that is being generated."""

    def __init__(self, index: int, prompt: BatchPrompt, tokenizer: Any):
        self.index, self.prompt, self.detokenizer = index, prompt, tokenizer.detokenizer
        self.beginning = Beginning(tokenizer, int(prompt.ids[-1]))
        self.stopper, self.text, self.tokens, self.reason = StopStrings(prompt.stops), "", 0, "length"

    def push(self, token: int, finish_reason: str | None) -> bool:
        """Add a token and return whether the text has ended."""
        self.tokens += 1
        if finish_reason != "stop":
            self.detokenizer.add_token(token)
        if finish_reason is not None:
            self.detokenizer.finalize()
        new = self.beginning.push(token, self.detokenizer.last_segment, finish_reason is not None)
        self.text += self.stopper.push(new)
        if self.stopper.stopped:
            self.reason = "stop"
            return True
        if finish_reason is None:
            return False
        self.reason = finish_reason
        self.text += self.stopper.rest()
        return True


def generate_texts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[BatchPrompt],
    sampling: Sampling,
    on_done: Callable[[], None] = lambda: None,
    rows: int = ROWS,
) -> list[BatchText]:
    """Return the texts that continue the prompts, in order.

    Args:
        model: an mlx-lm model or `TokenRouted`.
        tokenizer: mlx-lm's tokenizer wrapper, which stops at its EOS ids.
        prompts: the prompts.
        sampling: sampler parameters.
        on_done: called after each text.
        rows: texts at once.
    """
    started, texts = time.perf_counter(), [BatchText("", [], _summary(prompt, 0, "length")) for prompt in prompts]
    for index, row, cache in _finished_rows(model, tokenizer, prompts, sampling, rows):
        texts[index] = BatchText(row.text, _expert_ids(row, cache), _summary(row.prompt, row.tokens, row.reason))
        on_done()
    seconds, peak = max(time.perf_counter() - started, 1e-9), mx.get_peak_memory() / 1e9
    prompt_speed = sum(text.summary.prompt_tokens for text in texts) / seconds
    speed = sum(text.summary.tokens for text in texts) / seconds
    return [
        text._replace(summary=text.summary._replace(prompt_speed=prompt_speed, speed=speed, peak_memory=peak))
        for text in texts
    ]


def _summary(prompt: BatchPrompt, tokens: int, reason: str) -> GenerationSummary:
    return GenerationSummary(len(prompt.ids), 0.0, tokens, 0.0, 0.0, reason)


def _finished_rows(
    model: nn.Module, tokenizer: Any, prompts: Sequence[BatchPrompt], sampling: Sampling, rows: int
) -> Iterator[tuple[int, _Row, list[Any] | None]]:
    """Yield the index of each prompt, its text and its caches, as they end. The caches are those of a routed model."""
    from mlx_lm.generate import BatchGenerator, generation_stream

    sampler, processors = make_token_sampler(sampling), make_processors(sampling)
    batch = BatchGenerator(
        model, stop_tokens=[[token] for token in tokenizer.eos_token_ids], sampler=sampler,
        completion_batch_size=rows, prefill_batch_size=min(rows, PROMPT_ROWS),
    )  # fmt: skip
    waiting = iter([(index, prompt) for index, prompt in enumerate(prompts) if prompt.max_tokens > 0])
    routed, at_work = isinstance(model, TokenRouted), {}
    try:
        while True:
            # Not all at once: each prompt that waits in mlx-lm's queue has its caches already.
            while len(at_work) < rows + PROMPT_ROWS and (next_prompt := next(waiting, None)) is not None:
                index, prompt = next_prompt
                caches = [model.make_cache(prompt.fixed_gates)] if isinstance(model, TokenRouted) else None
                (uid,) = batch.insert(
                    [prompt.ids.tolist()], [prompt.max_tokens], caches=caches, logits_processors=[processors]
                )
                at_work[uid] = _Row(index, prompt, tokenizer)
            if not at_work:
                return
            for response in batch.next_generated():
                row = at_work[response.uid]
                if not row.push(response.token, response.finish_reason):
                    continue
                cache = response.prompt_cache
                if response.finish_reason is None:  # a stop string, which mlx-lm does not know
                    cache, _ = batch.remove([response.uid], return_prompt_caches=True)[response.uid]
                del at_work[response.uid]
                yield row.index, row, cache if routed else None
    finally:
        batch.close()
        # mlx-lm has begun a step that nobody waits for; one that is at work when the interpreter ends aborts the process.
        mx.synchronize(generation_stream)


def _expert_ids(row: _Row, cache: list[Any] | None) -> list[int]:
    if cache is None or row.prompt.fixed_gates is not None:
        return []
    gates = np.array(decode_cache.token_gates(cache))
    # A token's expert is that of the position before it, which predicts it.
    first = len(row.prompt.ids) - 1
    return gates[first : first + row.tokens].argmax(-1).tolist()
